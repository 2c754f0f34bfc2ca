"""Block-sparse attention: several backends that compute the same result, and decoding.

api           what users and models call: checks the arguments
backends      the names of backends, and which one `auto` takes
reference     the definition, with the whole score matrix
xla           plain JAX, for any device; also gradients of GPU kernels without kernels of their own
explicit      attention on meshes with explicit axes
first_order   refuses gradients of gradients
decode        one new token per sequence against a cache

The GPU kernels are in `bsjax.pallas` and `bsjax.triton`.
"""

from bsjax.attention.api import ragged_attention, sparse_attention
from bsjax.attention.backends import (
    BACKENDS,
    GPU_KERNELS,
    backend_reason,
    block_sizes,
    resolve_backend,
)
from bsjax.attention.decode import decode_attention, with_own_token

__all__ = [
    "BACKENDS",
    "GPU_KERNELS",
    "backend_reason",
    "block_sizes",
    "decode_attention",
    "ragged_attention",
    "resolve_backend",
    "sparse_attention",
    "with_own_token",
]
