"""`python -m bsjax` is the console script."""

import sys

from bsjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
