"""Attention for decoding: one new token per sequence sees its whole cache."""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.attention.backends import resolve_backend
from bsjax.errors import MaskError

_XLA_BLOCK = 1024
"""How many rows of the cache the `xla` backend computes the scores of at a time, of all sequences
together. A sequence has at least `_SMALLEST_XLA_BLOCK` of them."""

_SMALLEST_XLA_BLOCK = 128


@overload
def decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    lengths: Array,
    own_k: Array | None = None,
    own_v: Array | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    layer: Array,
    lengths: Array,
    own_k: Array | None = None,
    own_v: Array | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


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

    Accepts the cache of all layers, so that a loop over layers need not slice it: the kernel reads
    the rows in place. The tokens' own keys and values may be in the cache already, or be passed as
    `own_k` and `own_v`. In that case a model can write those of all layers to the cache at once,
    after its last layer.

    Args:
      q: queries; bfloat16, float16 or float32. Query head h reads key-value head
        h // (q_heads // kv_heads).
      k_cache: keys of all layers, in the dtype of `q`.
      v_cache: values of all layers, in the dtype of `q`.
      layer: index of the layer to read.
      lengths: how many rows are valid in each sequence, from 0 to `rows`. The contents of the other
        rows have no effect.
      own_k: the tokens' own keys, seen in addition to the cache.
      own_v: the tokens' own values; required with `own_k`.
      scale: factor applied to the scores, above 0.
      backend: `pallas`, `triton`, `xla` or `auto`, as in `sparse_attention`. `reference` is the
        same as `xla` here.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [batch, q_heads, head_dim] in the dtype of `q`. With `return_lse` also the
      log-sum-exp [batch, q_heads] of the scaled scores, float32. A token that sees nothing yields
      zeros and -inf. Sums are in float32.

    Raises:
      MaskError: shapes or dtypes do not match, or the scale is not above 0.
      BackendError: the backend is unknown, or does not support the head dimension or dtype.
    """
    _check(q, k_cache, v_cache, lengths, own_k, own_v, scale)
    layer, lengths = jnp.asarray(layer), jnp.asarray(lengths)
    arrays = q, k_cache, v_cache, layer, lengths, own_k, own_v
    result: Any
    match resolve_backend(backend):
        case "pallas":
            from bsjax.pallas.decode import decode_attention as kernel

            # Chosen by the platform being compiled for, which this machine may not have.
            result = jax.lax.platform_dependent(
                *arrays,
                cpu=partial(kernel, scale=scale, interpret=True),
                default=partial(kernel, scale=scale),
            )
        case "triton":
            from bsjax.triton.decode import decode_attention as kernel

            result = kernel(*arrays, scale=scale)
        case _:
            result = _xla_decode_attention(*arrays, scale)
    return result if return_lse else result[0]


def with_own_token(
    parts: Float[Array, "parts batch q_heads head_dim"],
    lse: Float[Array, "parts batch q_heads"],
    q: Float[Array, "batch q_heads head_dim"],
    own_k: Float[Array, "batch kv_heads head_dim"],
    own_v: Float[Array, "batch kv_heads head_dim"],
    *,
    scale: float,
) -> Float[Array, "batch q_heads head_dim"]:
    """Attention to a cache in several parts and to the token itself.

    Args:
      parts: the output of `decode_attention` for each part of the cache.
      lse: the log-sum-exp of each.
      q: queries.
      own_k: the tokens' own keys.
      own_v: the tokens' own values.
      scale: factor applied to the scores.

    Returns:
      The output for all parts and the token, in the dtype of `q`.
    """
    group = q.shape[1] // own_k.shape[1]
    k, v = (jnp.repeat(own.astype(jnp.float32), group, axis=1) for own in (own_k, own_v))
    own_lse = scale * jnp.sum(q.astype(jnp.float32) * k, axis=-1)
    # A part without any valid row has an lse of -inf and no weight.
    weights = jax.nn.softmax(jnp.concatenate([lse, own_lse[None]]), axis=0)
    outputs = jnp.concatenate([parts.astype(jnp.float32), v[None]])
    return jnp.sum(weights[..., None] * outputs, axis=0).astype(q.dtype)


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
    """Plain JAX, block by block up to the longest valid length, whatever the cache's capacity."""
    batch, q_heads, head_dim = q.shape
    rows, kv_heads = k_cache.shape[2:4]
    block = min(rows, max(_XLA_BLOCK // max(batch, 1), _SMALLEST_XLA_BLOCK))
    # Without a batch axis of length 1, for which XLA may choose another layout and copy the cache.
    caches = [jax.lax.squeeze(cache, (1,)) if batch == 1 else cache for cache in (k_cache, v_cache)]
    batches = (batch,) * (batch != 1)
    grouped = q.reshape(batch, kv_heads, q_heads // kv_heads, head_dim)
    product = partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    def attend(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        greatest, total, output = carry
        # If the last block would reach beyond the cache, it is read from further up, and the rows
        # before its start are masked.
        first = index * block
        start = jnp.minimum(first, rows - block).astype(jnp.int32)
        k, v = (
            jax.lax.dynamic_slice(
                cache,
                (layer, *[zero] * len(batches), start, zero, zero),
                (1, *batches, block, kv_heads, head_dim),
            ).reshape(batch, block, kv_heads, head_dim)
            for cache in caches
        )
        row = start + jnp.arange(block, dtype=jnp.int32)
        valid = (row >= first) & (row < lengths[:, None])
        # Invalid rows may hold infinities or NaN, which a weight of 0 would not remove.
        v = jnp.where(valid[:, :, None, None], v, 0)
        scores = scale * product("bkgd,bckd->bkgc", grouped, k)
        scores = jnp.where(valid[:, None, None, :], scores, -jnp.inf)
        maximum = jnp.maximum(greatest, jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - maximum)
        rescale = jnp.exp(greatest - maximum)
        return (
            maximum,
            total * rescale + jnp.sum(weights, axis=-1, keepdims=True),
            output * rescale + product("bkgc,bckd->bkgd", weights.astype(v.dtype), v),
        )

    zero = jnp.int32(0)
    layer = layer.astype(jnp.int32)
    lengths = lengths.astype(jnp.int32)
    if own_k is not None and own_v is not None:
        greatest = scale * product("bkgd,bkd->bkg", grouped, own_k)[..., None]
        total = jnp.ones_like(greatest)
        output = jnp.broadcast_to(
            own_v[:, :, None, :].astype(jnp.float32), (*greatest.shape[:3], head_dim)
        )
    else:
        # Finite even where no key is seen, so that no infinities are subtracted.
        shape = (*grouped.shape[:3], 1)
        greatest = jnp.full(shape, jnp.finfo(jnp.float32).min, jnp.float32)
        total, output = jnp.zeros(shape, jnp.float32), jnp.zeros(grouped.shape, jnp.float32)
    blocks = (jnp.max(lengths, initial=0) + (block - 1)) // max(block, 1)
    if rows:
        greatest, total, output = jax.lax.fori_loop(
            zero, blocks.astype(jnp.int32), attend, (greatest, total, output)
        )
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    lse = jnp.where(seen, greatest + jnp.log(total), -jnp.inf)
    return (
        (output / total).astype(q.dtype).reshape(q.shape),
        lse.reshape(batch, q_heads),
    )


def _check(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    lengths: Array,
    own_k: Array | None,
    own_v: Array | None,
    scale: float,
) -> None:
    """Rejects arrays that do not match each other, whichever backend is used.

    Raises:
      MaskError: names the shapes or dtypes given and those expected.
    """
    shapes = f"q {q.shape}, k_cache {k_cache.shape}, v_cache {v_cache.shape}"
    if q.ndim != 3 or k_cache.ndim != 5 or k_cache.shape != v_cache.shape:
        raise MaskError(
            "Decoding needs q [batch, q_heads, head_dim] and k_cache, v_cache "
            f"[layers, batch, rows, kv_heads, head_dim], got {shapes}."
        )
    batch, q_heads, head_dim = q.shape
    _, cached_batch, _, kv_heads, cached_head_dim = k_cache.shape
    if cached_batch != batch or cached_head_dim != head_dim or lengths.shape != (batch,):
        raise MaskError(
            f"{shapes} and lengths {lengths.shape} must agree in batch size and head dimension."
        )
    if q_heads % kv_heads:
        raise MaskError(f"The query heads must be a multiple of the key heads, got {shapes}.")
    arrays = [q, k_cache, v_cache]
    if (own_k is None) != (own_v is None):
        raise MaskError("own_k and own_v must be given together.")
    for own in (own_k, own_v):
        if own is not None:
            arrays.append(own)
            if own.shape != (batch, kv_heads, head_dim):
                raise MaskError(
                    f"own_k and own_v must have shape {(batch, kv_heads, head_dim)}, got "
                    f"{own.shape}."
                )
    if len({array.dtype for array in arrays}) > 1:
        raise MaskError(
            f"All arrays must have one dtype, got {', '.join(str(a.dtype) for a in arrays)}."
        )
    if not scale > 0:
        raise MaskError(f"The scale of attention scores must be above 0, got {scale}.")
