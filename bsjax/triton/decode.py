"""Decode attention on GPUs, in Triton: one new token per sequence against a cache."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.gpu.decode_configurations import (
    COMBINED_ELEMENTS,
    decode_configuration,
    default_splits,
)
from bsjax.triton.decode_kernels import attend_split, combine_splits
from bsjax.triton.heads import power_of_two
from bsjax.triton.launch import Launch, call
from bsjax.triton.product import precision_of


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
    splits: int | None = None,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Attention of one token per sequence to one layer of a cache, for NVIDIA GPUs.

    The same function of its arguments as `bsjax.pallas.decode.decode_attention`. The arrays must
    match each other; `bsjax.attention.decode_attention` checks that.

    Args:
      q: queries; bfloat16, float16 or float32. Query head h reads key head
        h // (q_heads // kv_heads).
      k_cache: keys of all layers, in the dtype of `q`.
      v_cache: values, of the shape and dtype of `k_cache`.
      layer: index of the layer to read.
      lengths: how many rows of the cache are valid in each sequence, from 0 to `rows`. The contents
        of the other rows, even NaN, have no effect.
      own_k: the tokens' own keys, seen in addition to the cache.
      own_v: the tokens' own values; required with `own_k`.
      scale: factor applied to the scores, above 0.
      splits: how many programs share the valid rows of a sequence and key head. The default keeps a
        large GPU busy.

    Returns:
      The output in the dtype of `q`, and the natural log-sum-exp of the scaled scores, float32. A
      token that sees no key yields zeros and -inf. Sums are in float32; float32 inputs are
      multiplied in float32, not in TF32.

    Raises:
      BackendError: the kernel does not support the head dimension or dtype.
    """
    batch, q_heads, head_dim = q.shape
    _, _, rows, kv_heads, _ = k_cache.shape
    group = q_heads // kv_heads
    chosen = decode_configuration(head_dim, q.dtype)
    if splits is None:
        splits = default_splits(batch, kv_heads, rows, chosen.block_kv)
    splits = max(1, splits)
    width = power_of_two(head_dim)
    to_log2 = scale * math.log2(math.e)
    partial, partial_lse = call(
        attend_split,
        [
            jnp.asarray(layer, jnp.int32).reshape(1),
            lengths.astype(jnp.int32),
            q,
            k_cache,
            v_cache,
            batch,
            rows,
        ],
        [
            jax.ShapeDtypeStruct((batch, q_heads, splits, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, q_heads, splits), jnp.float32),
        ],
        {
            "HEAD_DIM": head_dim,
            "WIDTH": width,
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "PADDED_GROUP": power_of_two(group),
            "SPLITS": splits,
            "BLOCK_KV": chosen.block_kv,
            "TO_LOG2": to_log2,
            "PRECISION": precision_of(q.dtype),
            "STAGES": chosen.num_stages,
        },
        # Key heads run fastest: they are next to each other in the cache.
        Launch("decode_attention", (kv_heads, splits, batch), chosen.num_warps, chosen.num_stages),
    )
    with_own = own_k is not None and own_v is not None
    out, lse = call(
        combine_splits,
        [partial, partial_lse, q, *((own_k, own_v) if with_own else (q, q))],
        [
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
        ],
        {
            "HEAD_DIM": head_dim,
            "WIDTH": width,
            "Q_HEADS": q_heads,
            "GROUP": group,
            "SPLITS": splits,
            "PADDED_SPLITS": power_of_two(splits),
            "BLOCK": COMBINED_ELEMENTS // width,
            "OWN": with_own,
            "TO_LOG2": to_log2,
        },
        Launch("combine_splits", (q_heads, batch), 4, 1),
    )
    return out, lse
