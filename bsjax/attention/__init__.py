"""Block-sparse attention: several backends that compute the same result, and decoding.

api         what users and models call: checks the arguments and chooses a backend
reference   the definition, with the whole score matrix
xla         plain JAX, for any device; also computes the gradients of every backend
explicit    attention on meshes with explicit axes
decode      one new token per sequence against a cache

The GPU kernels are in `bsjax.pallas` and `bsjax.triton`.
"""

from bsjax.attention.api import (
    BACKENDS,
    block_sizes,
    ragged_attention,
    resolve_backend,
    sparse_attention,
)
from bsjax.attention.decode import decode_attention, with_own_token

__all__ = [
    "BACKENDS",
    "block_sizes",
    "decode_attention",
    "ragged_attention",
    "resolve_backend",
    "sparse_attention",
    "with_own_token",
]
