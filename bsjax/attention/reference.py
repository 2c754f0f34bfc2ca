"""Attention with the whole score matrix: the definition that all other backends must match."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import Schedule
from bsjax.masks.visibility import PADDING_POSITION, TokenInfo, visible


def reference_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    scale: float,
) -> tuple[Float[Array, "queries q_heads head_dim"], Float[Array, "queries q_heads"]]:
    """Dense softmax under the predicate; does not use the tiles and ranges of the schedule.

    Returns:
      The output, in the dtype of `q`, and the log-sum-exp of the scaled scores, float32. A query
      that sees nothing yields zeros and -inf.
    """
    query = TokenInfo(*(jnp.asarray(part)[None, :, None] for part in schedule.queries))
    key = TokenInfo(*(jnp.asarray(part)[None, None, :] for part in schedule.keys))
    groups = jnp.asarray(schedule.groups)[head_category][:, None, None]
    seen = visible(query, key, groups, schedule.visibility)
    seen = seen & (query.position != PADDING_POSITION)

    group_size = q.shape[1] // k.shape[1]
    k = jnp.repeat(k, group_size, axis=1)
    v = jnp.repeat(v, group_size, axis=1)
    scores = jnp.einsum(
        "qhd,khd->hqk",
        q,
        k,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    scores = jnp.where(seen, scores * scale, -jnp.inf)
    # Rows that see nothing: no infinities are subtracted, so that their gradients are zeros.
    maximum = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True, initial=-jnp.inf))
    maximum = jnp.where(jnp.isneginf(maximum), 0.0, maximum)
    weights = jnp.exp(scores - maximum)
    total = weights.sum(axis=-1, keepdims=True)
    seen_any = total > 0
    total = jnp.where(seen_any, total, 1.0)
    lse = jnp.where(seen_any, maximum + jnp.log(total), -jnp.inf)[..., 0]
    out = jnp.einsum(
        "hqk,khd->qhd",
        weights / total,
        v.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return out.astype(q.dtype), lse.T
