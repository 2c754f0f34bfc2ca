"""Block sizes, warps and pipeline stages of the kernels of the gradients.

Chosen from compiled code: of the block sizes that spill no registers (with head dimensions 64, 72,
80, 128 and 256), those whose loop over full
blocks is fastest by the model of speed (docs/speed.md). None has been timed on a GPU yet.
"""

from typing import Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from bsjax.gpu.configurations import (
    KernelConfiguration,
    check_supported,
    table_width,
    target_in_use,
)

_16 = KernelConfiguration(16, 16, 4, 2)
_16_8 = KernelConfiguration(16, 16, 8, 2)
_32 = KernelConfiguration(32, 32, 4, 2)
_32_16 = KernelConfiguration(32, 16, 4, 2)
_32_8 = KernelConfiguration(32, 32, 8, 2)

# With three stages, copies start two blocks ahead, and the loops do not wait for them.
_64_AHEAD = KernelConfiguration(64, 64, 4, 3)
_64_32_AHEAD = KernelConfiguration(64, 32, 4, 3)
_32_64_AHEAD = KernelConfiguration(32, 64, 4, 3)
_32_8_AHEAD = KernelConfiguration(32, 32, 8, 3)
_128_AHEAD = KernelConfiguration(128, 64, 8, 3)
_128_32_AHEAD = KernelConfiguration(128, 32, 8, 3)

_IN_16_BITS = {
    # target: {width: (of queries, of keys)}
    "sm_80": {
        64: (_64_AHEAD, _64_AHEAD),
        80: (_64_32_AHEAD, _64_AHEAD),
        128: (_64_32_AHEAD, _32_64_AHEAD),
        # Two programs that wait are faster than one that does not.
        256: (_32, _32),
    },
    "sm_89": {
        64: (_64_32_AHEAD, _32_64_AHEAD),
        80: (_64_32_AHEAD, _32_64_AHEAD),
        128: (_128_32_AHEAD, _32_64_AHEAD),
        256: (KernelConfiguration(32, 32, 4, 3), KernelConfiguration(16, 32, 4, 3)),
    },
    # On Hopper and Blackwell, products of warp groups need tiles of 64 keys. Heads of 256 leave no
    # registers for them: products of warps are used.
    "sm_90": {
        64: (_64_AHEAD, _64_AHEAD),
        80: (_64_AHEAD, _32_64_AHEAD),
        128: (_128_AHEAD, _32_64_AHEAD),
        256: (_128_32_AHEAD, _32_8_AHEAD),
    },
    "sm_100": {
        64: (_128_AHEAD, _64_AHEAD),
        80: (_64_AHEAD, _32_64_AHEAD),
        128: (_128_32_AHEAD, KernelConfiguration(64, 64, 8, 3)),
        256: (KernelConfiguration(128, 32, 8, 2), _32_8_AHEAD),
    },
}

# Where a window is evaluated, too, other sizes fit into registers.
_WITH_WINDOWS = {
    ("keys", "sm_90", 128): KernelConfiguration(16, 64, 4, 3),
    ("queries", "sm_100", 128): _128_AHEAD,
}

# Products of float32 do not use tensor cores and need all operands in registers: small blocks.
_IN_32_BITS = {
    64: (_32, _32_8),
    80: (_32_16, _32_8),
    128: (_32_16, KernelConfiguration(16, 32, 8, 2)),
    256: (_16, _16_8),
}


def gradient_configuration(
    kernel: Literal["queries", "keys"],
    head_dim: int,
    dtype: DTypeLike,
    block_q: int,
    block_kv: int,
    *,
    windowed: bool,
) -> KernelConfiguration:
    """How a kernel of the gradients is compiled for a schedule of these block sizes.

    Args:
      kernel: that of the gradients of queries, or of keys and values.
      head_dim: channels of a head.
      dtype: dtype of queries, keys and values.
      block_q: query rows of a tile of the schedule; for keys, of a block of the transposed one.
      block_kv: keys of a block of the schedule; for keys, of a tile of the transposed one.
      windowed: whether the schedule has a window.

    Raises:
      BackendError: the kernels do not support the head dimension or dtype.
    """
    check_supported(head_dim, dtype)
    in_16_bits = jnp.dtype(dtype).itemsize == 2
    target, width = target_in_use(), table_width(head_dim)
    tabled = (_IN_16_BITS[target] if in_16_bits else _IN_32_BITS)[width][kernel == "keys"]
    if windowed and in_16_bits:
        tabled = _WITH_WINDOWS.get((kernel, target, width), tabled)
    return tabled._replace(
        block_q=min(block_q, tabled.block_q), block_kv=min(block_kv, tabled.block_kv)
    )
