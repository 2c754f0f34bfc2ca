"""`sparse_attention`: the public entry, prompt order in and out."""

from functools import partial

import jax
from jaxtyping import Array, Float

from bsjax.attention.dispatch import check_shapes, ragged_attention, resolve_backend
from bsjax.masks.block_mask import BlockMask


def sparse_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    mask: BlockMask,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of one prompt under a block mask; invisible blocks are never computed.

    Works inside and outside of `jax.jit`; a mask is a pytree and can be an argument of the jitted
    function, so that masks of the same shapes share one compiled program.

    Args:
      q: queries in prompt order, bfloat16, float16 or float32. Query head h reads
        key-value head h // (q_heads // kv_heads).
      k: keys, of q's dtype; all finite.
      v: values, of q's dtype; all finite, those that no query sees too.
      mask: which keys each query of each head sees.
      scale: factor of the scores, above 0; head_dim ** -0.5 by default.
      backend: `pallas` (GPU kernel, head_dim up to 256; interpreted, hence slow, on a CPU), `xla`
        (anywhere), `reference` (holds the whole score matrix), or `auto`: pallas on an NVIDIA GPU
        of the Ampere generation or later, xla elsewhere. All have first-order gradients in reverse
        mode (`jax.grad`, `jax.vjp`); those of pallas are computed by the code of xla.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [tokens, q_heads, head_dim] in q's dtype; with `return_lse` also the float32
      log-sum-exp [tokens, q_heads] of the scaled scores. A query that sees no key yields zeros and
      -inf.

    Raises:
      MaskError: shapes or dtypes do not fit each other or the mask.
      BackendError: unknown backend, or one that cannot do these shapes.
    """
    check_shapes(q, k, v, mask.schedule, mask.head_category)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return _sparse_attention(q, k, v, mask, scale, resolve_backend(backend), return_lse)


@partial(jax.jit, static_argnums=(4, 5, 6))
def _sparse_attention(
    q: Array, k: Array, v: Array, mask: BlockMask, scale: float, backend: str, return_lse: bool
) -> Array | tuple[Array, Array]:
    result = ragged_attention(
        q[mask.order],
        k[mask.order],
        v[mask.order],
        mask.schedule,
        mask.head_category,
        scale=scale,
        backend=backend,
        return_lse=return_lse,
    )
    return jax.tree.map(lambda rows: rows[mask.row], result)
