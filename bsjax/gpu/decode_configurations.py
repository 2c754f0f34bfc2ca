"""Block sizes, warps, pipeline stages and splits of the decode kernels, in Pallas and in Triton."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.gpu.configurations import check_supported

# Two for each of 128 multiprocessors. Their shared memory and registers let all of them run at the
# same time on the GPUs that we compile for, except with heads of more than 128 elements.
_PROGRAMS = 256

COMBINED_ELEMENTS = 4096
"""Elements of partial outputs that one program of the combining kernel holds at a time."""


class DecodeConfiguration(NamedTuple):
    """How the decode kernel is compiled."""

    block_kv: int
    """Keys of a block; a power of two. wgmma needs 64 or more."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in shared memory at a time, including the one in use."""


# Chosen from compiled code: no spills, wgmma where the GPU has it, and two programs per
# multiprocessor wherever blocks of 64 keys allow it. None has been timed on a GPU yet.
_CONFIGURATIONS = {
    # (head dim padded to a power of two, bytes of an element): configuration
    (64, 2): DecodeConfiguration(block_kv=128, num_warps=4, num_stages=2),
    (128, 2): DecodeConfiguration(block_kv=64, num_warps=4, num_stages=2),
    (256, 2): DecodeConfiguration(block_kv=64, num_warps=4, num_stages=2),
    # Products of float32 do not use tensor cores and need all operands in registers: small blocks.
    (64, 4): DecodeConfiguration(block_kv=32, num_warps=4, num_stages=2),
    (128, 4): DecodeConfiguration(block_kv=16, num_warps=4, num_stages=2),
    (256, 4): DecodeConfiguration(block_kv=16, num_warps=8, num_stages=2),
}


def decode_configuration(head_dim: int, dtype: DTypeLike) -> DecodeConfiguration:
    """How the kernel is compiled for heads of `head_dim` elements of `dtype`.

    Raises:
      BackendError: the kernel does not support the head dimension or dtype.
    """
    check_supported(head_dim, dtype)
    width = max(64, 1 << (head_dim - 1).bit_length())
    return _CONFIGURATIONS[width, jnp.dtype(dtype).itemsize]


def default_splits(batch: int, kv_heads: int, rows: int, block_kv: int) -> int:
    """How many programs share the rows of a sequence and key head, so that a large GPU is busy.

    Args:
      batch: sequences.
      kv_heads: key heads.
      rows: rows of a sequence of the cache.
      block_kv: keys of a block.
    """
    return max(1, min(_PROGRAMS // max(1, batch * kv_heads), -(-rows // block_kv)))
