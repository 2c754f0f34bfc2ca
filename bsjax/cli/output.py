"""What a command does when its output cannot be written."""

import contextlib
import os
import sys


def output_failed(error: OSError) -> int:
    """Says why in one line, unless the reader of the output has simply gone.

    Args:
      error: raised while standard output was written: its disk is full, or its pipe is closed.

    Returns:
      The exit status.
    """
    # What is still buffered would fail again, with a traceback, when the process ends.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    with contextlib.suppress(OSError, ValueError):  # Some replacements of stdout have no number.
        os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    if not isinstance(error, BrokenPipeError):
        print(f"error: the output cannot be written: {error}", file=sys.stderr)
    return 2
