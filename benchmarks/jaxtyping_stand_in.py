"""Lets bsjax be imported on a machine without jaxtyping.

bsjax uses jaxtyping only in annotations. With this stand-in, `Float[np.ndarray, "tokens"]` becomes
`np.ndarray`, and nothing is checked.
"""

import importlib.util
import sys
import types
from typing import Any

import jax


class _Annotation:
    """Replaces every annotation of jaxtyping: indexing it gives the array type."""

    def __class_getitem__(cls, parameters: tuple[Any, str]) -> Any:
        return parameters[0]


def install_where_missing() -> None:
    """Puts a module named jaxtyping into `sys.modules` unless jaxtyping is installed."""
    if sys.modules.get("jaxtyping") is not None:
        return
    # A module that is None in `sys.modules` cannot be imported, and find_spec would raise for it.
    if "jaxtyping" not in sys.modules and importlib.util.find_spec("jaxtyping") is not None:
        return
    module: Any = types.ModuleType("jaxtyping", "A stand-in: see benchmarks/jaxtyping_stand_in.py.")
    module.Array = jax.Array
    # Any other name is an annotation (PEP 562).
    module.__getattr__ = _annotation
    sys.modules["jaxtyping"] = module


def _annotation(name: str) -> Any:
    # The import system looks up dunder names and must not find them.
    if name.startswith("_"):
        raise AttributeError(name)
    return _Annotation
