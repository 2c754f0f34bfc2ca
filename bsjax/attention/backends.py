"""The backends of attention: their names, which one `auto` takes, and their block sizes."""

import importlib
import importlib.util
from typing import NamedTuple

import jax

from bsjax.checks import shown
from bsjax.errors import BackendError
from bsjax.gpu.configurations import target_in_use

BACKENDS = ("auto", "pallas", "triton", "xla", "reference")

GPU_KERNELS = ("pallas", "triton")
"""The backends that are GPU kernels."""

# Measured on two CPU cores at 8K tokens, head dim 128, float32: if everything is visible, large
# blocks are a quarter faster; if little is, small blocks visit fewer invisible pairs.
_XLA_DENSE_BLOCKS = (256, 512)
_XLA_SPARSE_BLOCKS = (128, 64)


class ChosenBackend(NamedTuple):
    """A backend, and why it was chosen."""

    name: str
    reason: str


def automatic_backend() -> ChosenBackend:
    """What `auto` is on this machine: a GPU kernel where there is a GPU for it, else xla.

    Of the two GPU kernels it is pallas as long as JAX has it, because no measurement says which is
    faster; docs/kernels.md compares how they compile.
    """
    if jax.default_backend() != "gpu":
        return ChosenBackend("xla", "JAX has found no GPU")
    try:
        target_in_use()
    except BackendError:
        return ChosenBackend("xla", "the GPU is not an NVIDIA GPU of Ampere or later")
    if _has_pallas():
        return ChosenBackend("pallas", "the GPU supports it, and this JAX has it")
    problem = triton_problem()
    if problem is None:
        return ChosenBackend("triton", "this JAX has no Pallas for Triton any more")
    return ChosenBackend("xla", f"this JAX has no Pallas for Triton any more. {problem}")


def resolve_backend(backend: str) -> str:
    """The backend that `backend` names, which is installed; `auto` is that of `automatic_backend`.

    Raises:
      BackendError: the name is unknown, or what the backend needs is not installed.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise BackendError(
            f"Unknown attention backend {shown(backend)}; choose one of {', '.join(BACKENDS)}."
        )
    if backend == "auto":
        return automatic_backend().name
    if backend == "pallas" and not _has_pallas():
        raise BackendError(
            f"JAX {jax.__version__} has no Pallas for Triton any more: choose backend='triton', "
            "'xla' or 'auto'."
        )
    if backend == "triton":
        # Raises an error that says what to install.
        importlib.import_module("bsjax.triton")
    return backend


def backend_reason(backend: str) -> str:
    """Why attention is computed by `backend`, which is not `auto`, for people to read."""
    chosen = automatic_backend()
    if backend == chosen.name:
        return f"auto: {chosen.reason}"
    return f"asked for; auto is {chosen.name}: {chosen.reason}"


def _has_pallas() -> bool:
    """Whether JAX still lowers Pallas kernels with Triton: it has deprecated that in 0.11."""
    return _is_installed("jax.experimental.pallas.triton")


def triton_problem() -> str | None:
    """What keeps jax-triton from compiling kernels here; None if nothing does."""
    try:
        importlib.import_module("bsjax.triton.launch").check_versions()
    except BackendError as error:
        return str(error)
    return None


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def block_sizes(
    backend: str, head_dim: int, dtype: jax.typing.DTypeLike, *, sparse: bool
) -> tuple[int, int]:
    """The best (block_q, block_kv) of a schedule for a backend.

    Args:
      backend: one of `BACKENDS`.
      head_dim: channels of a head.
      dtype: dtype of queries, keys and values.
      sparse: whether any head is sparse.

    Raises:
      BackendError: the backend is unknown or not installed, or does not support the head dimension
        or dtype.
    """
    match resolve_backend(backend):
        case "pallas":
            from bsjax.pallas.configurations import default_blocks

            return default_blocks(head_dim, dtype, sparse=sparse)
        case "triton":
            from bsjax.triton.configurations import default_blocks

            return default_blocks(head_dim, dtype, sparse=sparse)
    return _XLA_SPARSE_BLOCKS if sparse else _XLA_DENSE_BLOCKS
