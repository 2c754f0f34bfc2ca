"""bsjax: block-sparse prefill for vision-language models in JAX (BlindSight, arXiv 2507.09071).

The public names are those of `bsjax.__all__` and `bsjax.profiling.__all__`; everything else may
change without notice. A name is imported when it is first used, so that a program that only calls
`sparse_attention`, or asks the console script for help, does not import transformers.
`__init__.pyi` says which module provides each.
"""

import lazy_loader

# At once, because it has to see every fork.
import bsjax.checks as _checks  # noqa: F401

__version__ = "0.1.0"
__getattr__, _public_names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __dir__() -> list[str]:
    return [*_public_names(), "__version__"]
