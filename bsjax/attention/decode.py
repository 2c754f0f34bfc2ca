"""Attention of decoding: one new token per sequence against a cache, dense."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.attention.dispatch import resolve_backend
from bsjax.pallas.decode import check_decode_arguments
from bsjax.pallas.decode import decode_attention as pallas_decode_attention


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    k_cache: Float[Array, "layers batch rows kv_heads head_dim"],
    v_cache: Float[Array, "layers batch rows kv_heads head_dim"],
    layer: Int[Array, ""],
    lengths: Int[Array, "batch"],
    own_k: Float[Array, "batch kv_heads head_dim"] | None = None,
    own_v: Float[Array, "batch kv_heads head_dim"] | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention of one token per sequence to the valid rows of one layer of a cache.

    Takes the cache of all layers, so that a loop over layers need not slice it: the kernel reads
    the rows where they are. The tokens' own keys and values can stand beside the cache instead of
    in it; one write for all layers, after the last one, then puts them there.

    Args:
      q: queries; bfloat16, float16 or float32. Query head h reads key-value head
        h // (q_heads // kv_heads).
      k_cache: keys of all layers, of q's dtype.
      v_cache: values, of q's dtype.
      layer: which layer is read.
      lengths: how many rows are valid in each sequence, from 0 to `rows`. What the other rows hold
        has no effect.
      own_k: the tokens' own keys, seen in addition to the cache.
      own_v: their values; given where `own_k` is.
      scale: factor of the scores, above 0.
      backend: `pallas`, `xla` or `auto` as in `sparse_attention`; `reference` is `xla` here, which
        holds all scores of the one row anyway.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [batch, q_heads, head_dim] in q's dtype; with `return_lse` also the float32
      log-sum-exp [batch, q_heads] of the scaled scores. A token that sees nothing yields zeros and
      -inf. Sums are in float32.

    Raises:
      BackendError: unknown backend, or arrays that do not fit each other or the backend.
    """
    check_decode_arguments(q, k_cache, v_cache, lengths, own_k, own_v, scale)
    layer, lengths = jnp.asarray(layer), jnp.asarray(lengths)
    result: Any
    if resolve_backend(backend) == "pallas":
        # Chosen by the platform compiled for, which need not be one this machine has.
        result = jax.lax.platform_dependent(
            q,
            k_cache,
            v_cache,
            layer,
            lengths,
            own_k,
            own_v,
            cpu=partial(pallas_decode_attention, scale=scale, interpret=True),
            default=partial(pallas_decode_attention, scale=scale),
        )
    else:
        result = _xla_decode_attention(q, k_cache, v_cache, layer, lengths, own_k, own_v, scale)
    return result if return_lse else result[0]


def _xla_decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    lengths: Array,
    own_k: Array | None,
    own_v: Array | None,
    scale: float,
) -> tuple[Array, Array]:
    """The whole row of scores at once, in plain JAX."""
    batch, q_heads, head_dim = q.shape
    rows, kv_heads = k_cache.shape[2:4]
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    product = partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    k, v = (
        jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False) for cache in (k_cache, v_cache)
    )
    valid = jnp.arange(rows) < lengths[:, None]
    # A weight of 0 does not undo what padding rows may hold: infinities, NaN.
    v = jnp.where(valid[:, :, None, None], v, 0)

    scores = scale * product("bkgd,bckd->bkgc", grouped, k)
    scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
    # Finite also when no key is seen, so that no infinities are subtracted.
    greatest = jnp.max(scores, axis=-1, keepdims=True, initial=float(jnp.finfo(jnp.float32).min))
    own_score = None
    if own_k is not None:
        own_score = scale * product("bkgd,bkd->bkg", grouped, own_k)[..., None]
        greatest = jnp.maximum(greatest, own_score)
    weights = jnp.exp(scores - greatest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    output = product("bkgc,bckd->bkgd", weights.astype(v.dtype), v)
    if own_score is not None and own_v is not None:
        own_weight = jnp.exp(own_score - greatest)
        total = total + own_weight
        output = output + own_weight * own_v[:, :, None, :].astype(jnp.float32)
    some = total > 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, greatest + jnp.log(total), -jnp.inf)
    return (
        (output / total).astype(q.dtype).reshape(q.shape),
        lse.reshape(batch, q_heads),
    )
