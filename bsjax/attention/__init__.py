"""Block-sparse attention: one public function, three backends over the same schedule.

reference   the definition, with the whole score matrix
xla         plain JAX: any device, differentiable
pallas      the GPU kernel (Triton lowering)
"""

from bsjax.attention.decode import decode_attention
from bsjax.attention.dispatch import BACKENDS, block_sizes, ragged_attention, resolve_backend
from bsjax.attention.sparse import sparse_attention

__all__ = [
    "BACKENDS",
    "block_sizes",
    "decode_attention",
    "ragged_attention",
    "resolve_backend",
    "sparse_attention",
]
