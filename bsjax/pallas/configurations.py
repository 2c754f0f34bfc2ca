"""Block sizes, warps and pipeline stages of the prefill kernel, as data.

Every entry was chosen by compiling the kernel for sm_90 and reading what the assembler reports: no
register spills, shared memory within the limit of one block. None has been timed on a GPU yet.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.errors import BackendError
from bsjax.pallas.pieces import SHORTEST_SIDE

# What one kernel may use on sm_90, less room for the tokens' positions and images.
_SHARED_MEMORY = 220 * 1024


class KernelConfiguration(NamedTuple):
    """How one kernel is compiled."""

    block_q: int
    """Query rows of a program; a power of two."""
    block_kv: int
    """Keys of a block; a power of two."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in shared memory at a time, the one at work included."""


_CONFIGURATIONS = {
    # (head dim padded to a power of two, bytes of an element): configuration
    (64, 2): KernelConfiguration(block_q=128, block_kv=64, num_warps=8, num_stages=3),
    (128, 2): KernelConfiguration(block_q=128, block_kv=64, num_warps=8, num_stages=3),
    (256, 2): KernelConfiguration(block_q=128, block_kv=32, num_warps=8, num_stages=3),
    # float32 products run outside the tensor cores, with all operands in registers: small blocks.
    (64, 4): KernelConfiguration(block_q=32, block_kv=32, num_warps=4, num_stages=2),
    (128, 4): KernelConfiguration(block_q=32, block_kv=16, num_warps=16, num_stages=2),
    (256, 4): KernelConfiguration(block_q=32, block_kv=16, num_warps=8, num_stages=2),
}


def default_blocks(head_dim: int, dtype: DTypeLike) -> tuple[int, int]:
    """`(block_q, block_kv)` that schedules for heads of `head_dim` elements of `dtype` should have.

    Raises:
      BackendError: the kernel takes no such heads.
    """
    chosen = _tabled(head_dim, dtype)
    return chosen.block_q, chosen.block_kv


def configuration(
    head_dim: int, dtype: DTypeLike, block_q: int, block_kv: int
) -> KernelConfiguration:
    """How the kernel is compiled for a schedule of these block sizes.

    With the sizes of `default_blocks` that is the table's entry. With others, several programs
    share a tile's rows where one would spill, and fewer blocks are in flight where they would not
    fit.

    Raises:
      BackendError: the kernel takes no such heads.
    """
    tabled = _tabled(head_dim, dtype)
    scores = tabled.block_q * tabled.block_kv
    rows = min(block_q, tabled.block_q, max(SHORTEST_SIDE, scores // block_kv))
    row_bytes = _padded(head_dim) * jnp.dtype(dtype).itemsize
    fitting = (_SHARED_MEMORY - rows * row_bytes) // (2 * block_kv * row_bytes)
    return KernelConfiguration(
        rows, block_kv, tabled.num_warps, max(1, min(tabled.num_stages, fitting))
    )


def _tabled(head_dim: int, dtype: DTypeLike) -> KernelConfiguration:
    element = jnp.dtype(dtype)
    if element not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise BackendError(
            f"The GPU kernel computes in bfloat16, float16 or float32, not in {element}."
        )
    if not 1 <= head_dim <= 256:
        raise BackendError(f"The GPU kernel takes head dimensions up to 256, got {head_dim}.")
    return _CONFIGURATIONS[_padded(head_dim), element.itemsize]


def _padded(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())
