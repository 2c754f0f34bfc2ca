"""Triton's interpreter, in a process of its own.

Triton decides when it is imported whether kernels are compiled or interpreted, and other tests
compile.
"""

import atexit
import functools
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

_PACKAGES = ("triton", "jax_triton")


def require_triton() -> None:
    """Skips the calling test or module where Triton or jax-triton is missing."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"The Triton kernels need {' and '.join(missing)}: pip install '.[test]'.",
            allow_module_level=True,
        )


def compiles_triton() -> bool:
    """Whether Triton is new enough for kernels to be compiled, and not only interpreted."""
    triton, jax_triton = (
        tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
        for name in ("triton", "jax-triton")
    )
    return triton >= ((3, 9) if jax_triton < (0, 4) else (3, 7))


def require_triton_compiler() -> None:
    """Skips the calling module where Triton is missing or older than what kernels need."""
    require_triton()
    if not compiles_triton():
        pytest.skip("This Triton is too old to compile the kernels.", allow_module_level=True)


def interpreted(function: str, *arguments: Any, **options: Any) -> Any:
    """The result of a function of a module, "module:function", whose kernels are interpreted.

    Arguments and results are pytrees of arrays, which become NumPy's on the way.
    """
    arguments, options = jax.tree.map(_as_numpy, (arguments, options))
    return _process().submit(_run, function, arguments, options).result()


def _as_numpy(leaf: Any) -> Any:
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _run(function: str, arguments: Any, options: Any) -> Any:
    module, name = function.split(":")
    result = getattr(importlib.import_module(module), name)(*arguments, **options)
    return jax.tree.map(_as_numpy, result)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


@functools.cache
def _process() -> ProcessPoolExecutor:
    executor = ProcessPoolExecutor(
        1, mp_context=multiprocessing.get_context("spawn"), initializer=_interpret
    )
    atexit.register(executor.shutdown)
    return executor
