"""Block sizes, warps and pipeline stages of the Triton kernels.

configurations.json is of the same format as that of `bsjax.pallas`, and chosen in the same way.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.pallas.configurations import ConfigurationTable, check_supported
from bsjax.triton.heads import power_of_two

_TABLE = ConfigurationTable("bsjax.triton")
default_blocks = _TABLE.default_blocks
configuration = _TABLE.configuration


class DecodeConfiguration(NamedTuple):
    """How the decode kernel is compiled."""

    block_kv: int
    """Keys of a block; a power of two. wgmma needs 64 or more."""
    num_warps: int
    num_stages: int
    """Blocks of keys and values in shared memory at a time, including the one in use."""


# Chosen from compiled code: no spills, wgmma where the GPU has it, and two programs per
# multiprocessor wherever blocks of 64 keys allow it. None has been timed on a GPU yet.
_DECODE_CONFIGURATIONS = {
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
    return _DECODE_CONFIGURATIONS[max(64, power_of_two(head_dim)), jnp.dtype(dtype).itemsize]
