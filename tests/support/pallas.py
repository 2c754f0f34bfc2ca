"""Whether this JAX lowers Pallas kernels with Triton, which it has deprecated."""

import importlib.util

import pytest


def _is_there() -> bool:
    try:
        return importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    except ModuleNotFoundError:
        return False


HAS_PALLAS = _is_there()
needs_pallas = pytest.mark.skipif(not HAS_PALLAS, reason="this JAX has no Pallas for Triton")
