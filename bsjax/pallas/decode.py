"""Decode attention on GPUs: one new token per sequence against a cache that is read once.

    cache rows of one sequence and key head                 programs      splits of the valid length
    |..............|..............|............./////////|
     split 0        split 1        split 2     ^length       3 of 3        combined by log-sum-exp

Decoding is bound by memory: every valid row of the cache should be read once, by many programs at
the same time, and nothing else should be read.

  * The kernel accepts the cache of all layers and the index of one layer. A loop over layers that
    passed a slice would copy it before every launch.
  * One program computes all query heads of the key head whose keys it has read.
  * The valid length, not the capacity, is divided evenly among a fixed number of programs.

There are too few queries for the rows of a matrix product on tensor cores (wgmma computes 64 at a
time), but enough keys and enough channels. Both products are therefore transposed, and the softmax
runs down the columns:

    scores  [block_kv, heads] = keys     [block_kv, head_dim] x queries^T [head_dim, heads]
    output  [head_dim, heads] = values^T [head_dim, block_kv] x weights   [block_kv, heads]

Rows beyond the valid length are masked in the copies to shared memory, which fill in zeros: the
cache is never read there.

A second kernel, one program per sequence and query head, combines the splits and, where they are
passed separately, the new token's own key and value.

For offsets into large arrays see `bsjax.pallas.prefill`.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from bsjax.gpu.decode_configurations import (
    COMBINED_ELEMENTS,
    DecodeConfiguration,
    decode_configuration,
    default_splits,
)
from bsjax.gpu.pieces import SHORTEST_SIDE
from bsjax.pallas.exponential import LOG2_E


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
    interpret: bool = False,
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """Attention of one token per sequence to one layer of a cache, for NVIDIA GPUs.

    The arrays must match each other; `bsjax.attention.decode_attention` checks that.

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
      interpret: run in plain JAX on any device, slowly, for tests.

    Returns:
      The output in the dtype of `q`, and the natural log-sum-exp of the scaled scores, float32. A
      token that sees no key yields zeros and -inf. Sums are in float32; float32 inputs are
      multiplied in float32, not in TF32.

    Raises:
      BackendError: the kernel does not support the head dimension or dtype.
    """
    batch, q_heads, head_dim = q.shape
    _, _, rows, kv_heads, _ = k_cache.shape
    compiled = decode_configuration(head_dim, q.dtype)
    if splits is None:
        splits = default_splits(batch, kv_heads, rows, compiled.block_kv)
    settings = _Settings(
        head_dim=head_dim,
        group=q_heads // kv_heads,
        splits=max(1, splits),
        compiled=compiled,
        to_log2=scale * LOG2_E,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        interpret=interpret,
    )
    partials = _split_attention(settings, q, k_cache, v_cache, layer, lengths)
    own = () if own_k is None or own_v is None else (own_k, own_v)
    return _combined(settings, *partials, q, own)


class _Settings(NamedTuple):
    """What the kernels are specialised for, in addition to shapes."""

    head_dim: int
    group: int
    splits: int
    compiled: DecodeConfiguration
    to_log2: float
    """scale * log2(e): the softmax is computed in powers of two."""
    precision: jax.lax.Precision | None
    interpret: bool

    @property
    def padded_dim(self) -> int:
        return _padded(self.head_dim)

    @property
    def padded_group(self) -> int:
        return _padded(self.group)

    def inside_head(self) -> Array | None:
        """Which elements belong to the head rather than to the next one; None if all do."""
        if self.padded_dim == self.head_dim:
            return None
        return jnp.arange(self.padded_dim, dtype=jnp.int32) < self.head_dim


def _padded(side: int) -> int:
    return max(SHORTEST_SIDE, pl.next_power_of_2(side))


def _split_attention(
    settings: _Settings,
    q: Float[Array, "batch q_heads head_dim"],
    k_cache: Float[Array, "layers batch rows kv_heads head_dim"],
    v_cache: Float[Array, "layers batch rows kv_heads head_dim"],
    layer: Int[Array, ""],
    lengths: Int[Array, "batch"],
) -> tuple[Float[Array, "batch q_heads splits head_dim"], Float[Array, "batch q_heads splits"]]:
    """The output of every split and its log-sum-exp in powers of two, both float32.

    The log-sum-exp of a split without keys is -inf, and its output is undefined.
    """
    layers, batch, rows, kv_heads, head_dim = k_cache.shape
    group, splits = settings.group, settings.splits
    padded_group, padded_dim = settings.padded_group, settings.padded_dim
    whole = pl.BlockSpec()
    of_cache = pl.BlockSpec(
        (layers, None, rows, None, padded_dim),
        lambda kv_head, split, sequence: (0, sequence, 0, kv_head, 0),
    )
    output, lse = pl.pallas_call(
        functools.partial(_attend_split, settings),
        out_shape=[
            jax.ShapeDtypeStruct((batch, kv_heads, group, splits, head_dim), jnp.float32),
            jax.ShapeDtypeStruct((batch, kv_heads, group, splits), jnp.float32),
        ],
        # Key heads run fastest: they are next to each other in the cache.
        grid=(kv_heads, splits, batch),
        in_specs=[
            whole,
            whole,
            pl.BlockSpec(
                (None, None, padded_group, padded_dim),
                lambda kv_head, split, sequence: (sequence, kv_head, 0, 0),
            ),
            of_cache,
            of_cache,
        ],
        out_specs=[
            pl.BlockSpec(
                (None, None, padded_group, None, padded_dim),
                lambda kv_head, split, sequence: (sequence, kv_head, 0, split, 0),
            ),
            pl.BlockSpec(
                (None, None, padded_group, None),
                lambda kv_head, split, sequence: (sequence, kv_head, 0, split),
            ),
        ],
        compiler_params=pltriton.CompilerParams(
            num_warps=settings.compiled.num_warps, num_stages=settings.compiled.num_stages
        ),
        interpret=settings.interpret,
        name="decode_attention",
    )(
        jnp.asarray(layer, jnp.int32).reshape(1),
        lengths.astype(jnp.int32),
        q.reshape(batch, kv_heads, group, head_dim),
        k_cache,
        v_cache,
    )
    return output.reshape(*q.shape[:2], splits, head_dim), lse.reshape(*q.shape[:2], splits)


def _combined(
    settings: _Settings,
    partial_output: Float[Array, "batch q_heads splits head_dim"],
    partial_lse: Float[Array, "batch q_heads splits"],
    q: Float[Array, "batch q_heads head_dim"],
    own: tuple[Array, ...],
) -> tuple[Float[Array, "batch q_heads head_dim"], Float[Array, "batch q_heads"]]:
    """The output and its natural log-sum-exp, from all splits and the tokens' own keys."""
    batch, q_heads, _ = q.shape
    splits, padded_dim = settings.splits, settings.padded_dim
    of_query = pl.BlockSpec((None, None, padded_dim), lambda head, sequence: (sequence, head, 0))
    of_key = pl.BlockSpec(
        (None, None, padded_dim), lambda head, sequence: (sequence, head // settings.group, 0)
    )
    output, lse = pl.pallas_call(
        functools.partial(_combine_splits, settings),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((batch, q_heads), jnp.float32),
        ],
        grid=(q_heads, batch),
        in_specs=[
            pl.BlockSpec(
                (None, None, splits, padded_dim), lambda head, sequence: (sequence, head, 0, 0)
            ),
            pl.BlockSpec((None, None, splits), lambda head, sequence: (sequence, head, 0)),
            of_query,
            *[of_key] * len(own),
        ],
        out_specs=[of_query, pl.BlockSpec((None, None), lambda head, sequence: (sequence, head))],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=settings.interpret,
        name="combine_splits",
    )(partial_output, partial_lse, q, *own)
    return output, lse


def _attend_split(
    settings: _Settings,
    layer_ref: Any,
    lengths_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    out_ref: Any,
    lse_ref: Any,
) -> None:
    """One program: all queries of one key head against one split of the keys."""
    split = pl.program_id(1)
    # The padding of a group reaches beyond the end of the array, and is masked. JAX refuses such a
    # slice, even a masked one, if its start is a constant.
    group = pl.ds(split * 0, settings.padded_group)
    # The other axis also starts at a computed 0. In interpret mode, all starts of a slice must have
    # the same dtype, and a constant's would be int64 with `jax_enable_x64`.
    head = pl.ds(split * 0, settings.padded_dim)
    length = lengths_ref[pl.program_id(2)]
    layer = layer_ref[0]
    padded_group, padded_dim = settings.padded_group, settings.padded_dim
    block_kv = settings.compiled.block_kv
    blocks = jax.lax.div(length + (block_kv - 1), np.int32(block_kv))
    first = jax.lax.div(split * blocks, np.int32(settings.splits))
    last = jax.lax.div((split + 1) * blocks, np.int32(settings.splits))
    inside_group = jnp.arange(padded_group, dtype=jnp.int32) < settings.group
    inside_head = settings.inside_head()

    def inside(rows: Array) -> Array:
        return rows[:, None] if inside_head is None else rows[:, None] & inside_head[None, :]

    @pl.when(first >= last)
    def _() -> None:
        pltriton.store(
            lse_ref.at[group],
            jnp.full((padded_group,), -jnp.inf, jnp.float32),
            mask=inside_group,
        )

    @pl.when(first < last)
    def _() -> None:
        queries = pltriton.load(q_ref.at[group, :], mask=inside(inside_group), other=0.0).T

        def attend(block: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, weighted = carry
            start = block * block_kv
            valid = start + jnp.arange(block_kv, dtype=jnp.int32) < length
            keys, values = (
                pltriton.load(
                    ref.at[layer, pl.ds(start, block_kv), :],
                    mask=inside(valid),
                    other=0.0,
                )
                for ref in (k_ref, v_ref)
            )
            product = functools.partial(
                jnp.dot, precision=settings.precision, preferred_element_type=jnp.float32
            )
            scores = jnp.where(valid[:, None], product(keys, queries) * settings.to_log2, -jnp.inf)
            greatest = jnp.maximum(maximum, scores.max(axis=0))
            weights = jnp.exp2(scores - greatest)
            rescale = jnp.exp2(maximum - greatest)
            # Totals are summed over keys only at the end, which saves a sum across warps per block.
            return (
                greatest,
                total * rescale + weights,
                weighted * rescale + product(values.T, weights.astype(values.dtype)),
            )

        maximum, total, weighted = jax.lax.fori_loop(
            first,
            last,
            attend,
            (
                jnp.full((padded_group,), jnp.finfo(jnp.float32).min),
                jnp.zeros((block_kv, padded_group), jnp.float32),
                jnp.zeros((padded_dim, padded_group), jnp.float32),
            ),
        )
        # A split with a block has a valid key, so no total is 0.
        total = total.sum(axis=0)
        pltriton.store(
            out_ref.at[group, head],
            (weighted / total).T,
            mask=inside(inside_group),
        )
        pltriton.store(lse_ref.at[group], maximum + jnp.log2(total), mask=inside_group)


def _combine_splits(
    settings: _Settings, partial_ref: Any, partial_lse_ref: Any, q_ref: Any, *refs: Any
) -> None:
    """One program: the output of one query head, from its splits and the token's own key."""
    *own_refs, out_ref, lse_ref = refs
    padded_dim = settings.padded_dim
    inside_head = settings.inside_head()
    no_other = None if inside_head is None else 0.0
    block = COMBINED_ELEMENTS // padded_dim
    zero = pl.program_id(0) * 0

    def load_lse(start: Array, size: int) -> Array:
        # In powers of two; -inf where a split had no keys and its output is undefined.
        mask = start + jnp.arange(size, dtype=jnp.int32) < settings.splits
        return pltriton.load(partial_lse_ref.at[pl.ds(start, size)], mask=mask, other=-jnp.inf)

    every_lse = load_lse(zero, pl.next_power_of_2(settings.splits))
    # Finite even where no key is seen, so that no infinities are subtracted.
    maximum = jnp.maximum(every_lse.max(), jnp.finfo(jnp.float32).min)
    own_total, own_weighted = 0.0, 0.0
    if own_refs:
        query, own_key, own_value = (
            pltriton.load(ref.at[:], mask=inside_head, other=no_other).astype(jnp.float32)
            for ref in (q_ref, *own_refs)
        )
        own_score = (query * own_key).sum() * settings.to_log2
        maximum = jnp.maximum(maximum, own_score)
        own_total = jnp.exp2(own_score - maximum)
        own_weighted = own_total * own_value
    total = jnp.exp2(every_lse - maximum).sum() + own_total

    def add(index: Array, weighted: Array) -> Array:
        start = index * block
        lse = load_lse(start, block)
        used = (lse > -jnp.inf)[:, None]
        outputs = pltriton.load(
            partial_ref.at[pl.ds(start, block), :],
            mask=used if inside_head is None else used & inside_head[None, :],
            other=0.0,
        )
        return weighted + jnp.exp2(lse - maximum)[:, None] * outputs

    weighted = jax.lax.fori_loop(
        0, pl.cdiv(settings.splits, block), add, jnp.zeros((block, padded_dim), jnp.float32)
    )
    seen = total > 0
    divisor = jnp.where(seen, total, 1.0)
    pltriton.store(
        out_ref.at[:],
        ((weighted.sum(axis=0) + own_weighted) / divisor).astype(out_ref.dtype),
        mask=inside_head,
    )
    lse_ref[...] = jnp.where(seen, (maximum + jnp.log2(divisor)) / LOG2_E, -jnp.inf)
