"""Attention over a schedule in plain JAX: differentiable, block by block, on any device.

Three nested loops: over heads, over the tiles of the head's table, over the blocks of a tile. Trip
counts are read from the schedule, so sparser schedules take less time. If the schedule stacks the
heads of text rows, a second loop goes over key heads and the tiles of the table of text rows.

Keys and values may be the cache of all layers. Blocks are sliced out of it where they are: neither
the cache nor a layer of it is copied.

The gradient visits the same tiles and blocks again and recomputes the weights from the log-sum-exp,
as flash attention does.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bsjax.attention.first_order import first_order_only
from bsjax.manual_axes import varying_axes, varying_over
from bsjax.masks.schedule import KeyRange, Schedule, Tile
from bsjax.masks.visibility import PADDING, TokenInfo, key_visibility, sees

_EXACT = lax.Precision.HIGHEST

# Indices are int32, as in schedules. A plain 0 would be int64 where `jax_enable_x64` is set, and
# slices take indices of one dtype only.
_ZERO = np.int32(0)

Residuals = tuple[Array, Array, Array, Schedule, Array, Any, Array, Array]
"""What the gradient needs: q, k, v, schedule, head_category, layer, output, log-sum-exp."""


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def xla_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "layers keys kv_heads head_dim"],
    v: Float[Array, "layers keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    layer: Int[Array, ""],
    scale: float,
) -> tuple[Float[Array, "queries q_heads head_dim"], Float[Array, "queries q_heads"]]:
    """Block-sparse attention to the keys of one layer, rows in the order of the schedule.

    Returns:
      The output, in the dtype of `q`, and the log-sum-exp of the scaled scores, float32. A query
      that sees nothing yields zeros and -inf.
    """
    loops = _Loops.of(q, k, v, layer, schedule, head_category)

    def tile_body(work: "_Work", carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        q_tile = loops.rows(loops.q, work)

        def step(block: "_Block", state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            maximum, total, accumulator = state
            scores = _product(q_tile, block.k, ((1,), (1,))) * scale
            if block.seen is not None:
                scores = jnp.where(block.seen, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            # The maximum of a row that has seen nothing is -inf; subtracting it would give NaN.
            shift = jnp.where(jnp.isneginf(new_maximum), 0.0, new_maximum)
            weights = jnp.exp(scores - shift[:, None])
            decay = jnp.exp(maximum - shift)
            update = _product(weights.astype(block.v.dtype), block.v, ((1,), (0,)))
            return (
                new_maximum,
                total * decay + weights.sum(axis=1),
                accumulator * decay[:, None] + update,
            )

        start = (
            jnp.full(q_tile.shape[0], -jnp.inf, jnp.float32),
            jnp.zeros(q_tile.shape[0], jnp.float32),
            jnp.zeros(q_tile.shape, jnp.float32),
        )
        maximum, total, accumulator = loops.blocks(work, step, start)
        seen_any = total > 0
        tile_out = accumulator / jnp.where(seen_any, total, 1.0)[:, None]
        tile_lse = jnp.where(seen_any, maximum + jnp.log(jnp.where(seen_any, total, 1.0)), -jnp.inf)
        return (
            loops.store(out, tile_out.astype(out.dtype), work),
            loops.store(lse, tile_lse[:, None], work),
        )

    out = jnp.zeros_like(loops.q)
    lse = jnp.full((*loops.q.shape[:2], 1), -jnp.inf, jnp.float32)
    out, lse = loops.tiles(tile_body, (out, lse))
    queries = q.shape[0]
    return out[:queries], lse[:queries, :, 0]


def _forward(
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Array,
    scale: float,
) -> tuple[tuple[Array, Array], Residuals]:
    result: Any = xla_attention(q, k, v, schedule, head_category, layer, scale)
    out, lse = result
    return (out, lse), (q, k, v, schedule, head_category, layer, out, lse)


def attention_gradients(
    scale: float, residuals: Residuals, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None, None]:
    """Gradients of q, k and v, whichever backend computed the output.

    With weights P and scores S, dS = P * (dO V^T - rowsum(dO O) + dlse).
    """
    residuals, gradients = first_order_only((residuals, gradients))
    q, k, v, schedule, head_category, layer, out, lse = residuals
    out_gradient, lse_gradient = gradients
    loops = _Loops.of(q, k, v, layer, schedule, head_category)
    out_gradient32 = out_gradient.astype(jnp.float32)
    # The log-sum-exp of a row that saw nothing is a constant: its gradient is ignored.
    lse_gradient = jnp.where(jnp.isneginf(lse), 0.0, lse_gradient)
    offset = lse_gradient - (out_gradient32 * out.astype(jnp.float32)).sum(axis=-1)
    out_gradient_rows = loops.padded(out_gradient)
    # A log-sum-exp of +inf makes all weights 0: here for rows that saw nothing, below for rows
    # beyond the end of the tile.
    lse_rows = loops.padded(jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
    offset_rows = loops.padded(offset[..., None])

    def tile_body(work: "_Work", carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        q_gradient, k_gradient, v_gradient = carry
        q_tile = loops.rows(loops.q, work)
        in_tile = (jnp.arange(q_tile.shape[0]) < work.tile.rows * work.heads)[:, None]
        tile_gradient = loops.rows(out_gradient_rows, work)
        tile_lse = jnp.where(in_tile, loops.rows(lse_rows, work), jnp.inf)
        tile_offset = jnp.where(in_tile, loops.rows(offset_rows, work), 0.0)

        def step(block: "_Block", state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            tile_q_gradient, k_gradient, v_gradient = state
            scores = _product(q_tile, block.k, ((1,), (1,))) * scale
            weights = jnp.exp(scores - tile_lse)
            if block.seen is not None:
                weights = jnp.where(block.seen, weights, 0.0)
            weight_gradient = _product(tile_gradient, block.v, ((1,), (1,)))
            score_gradient = weights * (weight_gradient + tile_offset) * scale
            score_gradient = score_gradient.astype(q.dtype)
            add = partial(loops.add_keys, work=work, start=block.start)
            return (
                tile_q_gradient + _product(score_gradient, block.k, ((1,), (0,))),
                add(k_gradient, _product(score_gradient, q_tile, ((0,), (0,)))),
                add(v_gradient, _product(weights.astype(q.dtype), tile_gradient, ((0,), (0,)))),
            )

        start = (jnp.zeros(q_tile.shape, jnp.float32), k_gradient, v_gradient)
        tile_q_gradient, k_gradient, v_gradient = loops.blocks(work, step, start)
        return loops.store(q_gradient, tile_q_gradient, work), k_gradient, v_gradient

    start = tuple(jnp.zeros(rows.shape, jnp.float32) for rows in (loops.q, loops.k, loops.v))
    q_gradient, k_gradient, v_gradient = loops.tiles(tile_body, start)
    q_gradient, k_gradient, v_gradient = (
        gradient[tuple(map(slice, array.shape))].astype(array.dtype)
        for gradient, array in ((q_gradient, q), (k_gradient, k), (v_gradient, v))
    )
    return q_gradient, k_gradient, v_gradient, None, None, None


xla_attention.defvjp(_forward, attention_gradients)


class _Work(NamedTuple):
    """A tile of one head, or of the query heads that share a key head."""

    tile: Tile
    table: Array
    """The tile's table."""
    first_head: Array
    """The first query head."""
    heads: int
    """How many query heads, stacked row by row."""
    kv_head: Array
    most_rows: int
    """Query rows of a tile, at most."""


class _Block(NamedTuple):
    """One block of keys and values of a head."""

    start: Int[Array, ""]
    """First key row of the block."""
    k: Float[Array, "block_kv head_dim"]
    v: Float[Array, "block_kv head_dim"]
    seen: Bool[Array, "block_q block_kv"] | None
    """Which rows of the tile see which keys; None where every row sees every key."""


class _Loops(NamedTuple):
    """The loops over tiles and blocks, and the arrays that they slice.

    Queries are padded, so that slices of tiles stay in bounds. Keys are not, because they may be a
    whole cache: a block that would reach beyond the last key is read from further up.
    """

    q: Float[Array, "padded_queries q_heads head_dim"]
    k: Float[Array, "layers keys kv_heads head_dim"]
    v: Float[Array, "layers keys kv_heads head_dim"]
    layer: Int[Array, ""]
    queries: TokenInfo
    schedule: Schedule
    head_category: Int[Array, "q_heads"]

    @classmethod
    def of(
        cls,
        q: Array,
        k: Array,
        v: Array,
        layer: Any,
        schedule: Schedule,
        head_category: Array,
    ) -> "_Loops":
        margin = schedule.block_q
        schedule = jax.tree.map(jnp.asarray, schedule)
        queries = TokenInfo(
            *(
                jnp.pad(part, (0, margin), constant_values=value)
                for part, value in zip(schedule.queries, PADDING, strict=True)
            )
        )
        # Only a prompt that is shorter than one block needs padding.
        missing = max(0, schedule.block_kv - k.shape[1])
        if missing:
            k, v = (jnp.pad(rows, ((0, 0), (0, missing), (0, 0), (0, 0))) for rows in (k, v))
            keys = TokenInfo(
                *(
                    jnp.pad(part, (0, missing), constant_values=value)
                    for part, value in zip(schedule.keys, PADDING, strict=True)
                )
            )
            schedule = replace(schedule, keys=keys)
        return cls(
            _padded(q, margin),
            k,
            v,
            jnp.asarray(layer, jnp.int32),
            queries,
            schedule,
            jnp.asarray(head_category),
        )

    def padded(self, array: Float[Array, "queries q_heads channels"]) -> Array:
        return _padded(array, self.schedule.block_q)

    def rows(self, array: Array, work: _Work) -> Array:
        """The rows of a tile, head by head within each row; those after a short tile are others."""
        size = (work.most_rows, work.heads, array.shape[-1])
        start = (work.tile.first_row, work.first_head, _ZERO)
        return lax.dynamic_slice(array, start, size).reshape(-1, array.shape[-1])

    def store(self, array: Array, tile_rows: Array, work: _Work) -> Array:
        """Writes the rows of a tile; the rows after a short tile keep their values."""
        size = (work.most_rows, work.heads, array.shape[-1])
        start = (work.tile.first_row, work.first_head, _ZERO)
        old = lax.dynamic_slice(array, start, size)
        keep = (jnp.arange(work.most_rows) < work.tile.rows)[:, None, None]
        return lax.dynamic_update_slice(array, jnp.where(keep, tile_rows.reshape(size), old), start)

    def add_keys(self, array: Array, rows: Array, work: _Work, start: Array) -> Array:
        """Adds `rows` to the rows of a block that starts at `start`."""
        index = (self.layer, start, work.kv_head, _ZERO)
        rows = rows[None, :, None]
        return lax.dynamic_update_slice(
            array, lax.dynamic_slice(array, index, rows.shape) + rows, index
        )

    def tiles(self, body: Callable[[_Work, Any], Any], carry: Any) -> Any:
        """Folds `body(work, carry)` over all heads and the tiles of each head's table."""
        schedule = self.schedule
        tile_count = (schedule.tiles.rows > 0).sum(axis=1, dtype=jnp.int32)
        q_heads, kv_heads = self.q.shape[1], self.k.shape[2]
        group = np.int32(q_heads // kv_heads)

        def over_tiles(
            table: Array, first_head: Array, kv_head: Array, heads: int, carry: Any
        ) -> Any:
            most_rows = max(1, schedule.block_q // heads)

            def tile_body(index: Array, carry: Any) -> Any:
                tile = Tile(*schedule.tile_columns[table, index])
                return body(_Work(tile, table, first_head, heads, kv_head, most_rows), carry)

            return lax.fori_loop(_ZERO, tile_count[table], tile_body, carry)

        def head_body(head: Array, carry: Any) -> Any:
            head = head.astype(jnp.int32)
            return over_tiles(self.head_category[head], head, head // group, 1, carry)

        def kv_head_body(kv_head: Array, carry: Any) -> Any:
            kv_head = kv_head.astype(jnp.int32)
            table = jnp.int32(schedule.tile_columns.shape[0] - 1)
            return over_tiles(table, kv_head * group, kv_head, int(group), carry)

        carry = varying_over(varying_axes(self.q), carry)
        carry = lax.fori_loop(0, q_heads, head_body, carry)
        if schedule.stacked_heads:
            carry = lax.fori_loop(0, kv_heads, kv_head_body, carry)
        return carry

    def blocks(self, work: _Work, step: Callable[[_Block, Any], Any], state: Any) -> Any:
        """Folds `step(block, state)` over the full blocks of a tile, then over its partial ones."""
        schedule, table, tile = self.schedule, work.table, work.tile
        ranges = KeyRange(*(bound[table] for bound in schedule.ranges))
        last_start = np.int32(self.k.shape[1] - schedule.block_kv)

        def take(array: Array, start: Array) -> Array:
            size = (1, schedule.block_kv, 1, array.shape[-1])
            return lax.dynamic_slice(array, (self.layer, start, work.kv_head, _ZERO), size)[0, :, 0]

        def seen(first: Array, start: Array, end: Array) -> Array:
            query_position, query_image = (
                jnp.repeat(
                    lax.dynamic_slice(part, (tile.first_row,), (work.most_rows,)), work.heads
                )[:, None]
                for part in (self.queries.position, self.queries.image)
            )
            key = TokenInfo(
                *(
                    lax.dynamic_slice(part, (first,), (schedule.block_kv,))[None, :]
                    for part in schedule.keys
                )
            )
            rows = first + jnp.arange(schedule.block_kv, dtype=jnp.int32)
            in_range = (rows >= start) & (rows < end)
            visibility = schedule.visibility
            keys = key_visibility(key, schedule.groups[table], visibility)
            return in_range[None, :] & sees(query_position, query_image, keys, visibility)

        def visit(masked: bool, _: Array, carry: Any) -> Any:
            index, start, state = carry
            end = ranges.end[index]
            first = jnp.minimum(start, last_start) if masked else start
            block = _Block(
                first,
                take(self.k, first),
                take(self.v, first),
                seen(first, start, end) if masked else None,
            )
            state = step(block, state)
            start = start + schedule.block_kv
            index = index + (start >= end)
            return index, jnp.where(start >= end, ranges.start[index], start), state

        carry = (tile.first_range, ranges.start[tile.first_range], state)
        carry = varying_over(varying_axes(self.q), carry)
        carry = lax.fori_loop(_ZERO, tile.full_blocks, partial(visit, False), carry)
        carry = lax.fori_loop(_ZERO, tile.partial_blocks, partial(visit, True), carry)
        return carry[2]


def _padded(array: Float[Array, "queries heads channels"], margin: int) -> Array:
    return jnp.pad(array, ((0, margin), (0, 0), (0, 0)))


def _product(left: Array, right: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """A product accumulated in float32; float32 inputs are not rounded to TF32 or bfloat16."""
    return lax.dot_general(
        left, right, (contract, ((), ())), precision=_EXACT, preferred_element_type=jnp.float32
    )
