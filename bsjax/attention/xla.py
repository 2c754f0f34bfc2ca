"""The schedule in plain JAX: runs wherever XLA does, differentiable, block by block.

One loop over heads, one over the tiles of the head's table, one over the blocks of the tile; trip
counts are read from the schedule, so time falls with the sparsity. The gradient walks the same
tiles and blocks once more and recomputes the weights from the log-sum-exp, as flash attention does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import PADDING_POSITION, Schedule
from bsjax.masks.visibility import TokenInfo, visible

_EXACT = lax.Precision.HIGHEST


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def xla_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    scale: float,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]:
    """Block-sparse attention over a schedule, in the schedule's row order.

    Returns:
      The output, in q's dtype, and the float32 log-sum-exp of the scaled scores. A query that sees
      nothing yields zeros and -inf.
    """
    walk = _Walk.of(q, k, v, schedule, head_category)

    def tile_body(head: Any, tile: "_Tile", carry: Any) -> Any:
        out, lse = carry
        q_tile = walk.rows(walk.q, head, tile.first_row)

        def step(block: "_Block", state: Any) -> Any:
            maximum, total, accumulator = state
            scores = _product(q_tile, block.k, ((1,), (1,))) * scale
            if block.seen is not None:
                scores = jnp.where(block.seen, scores, -jnp.inf)
            new_maximum = jnp.maximum(maximum, scores.max(axis=1))
            # A row that has seen nothing yet keeps -inf; subtracting it would give NaN.
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
            jnp.full(schedule.block_q, -jnp.inf),
            jnp.zeros(schedule.block_q),
            jnp.zeros((schedule.block_q, q.shape[-1])),
        )
        maximum, total, accumulator = walk.blocks(head, tile, step, start)
        seen_any = total > 0
        tile_out = accumulator / jnp.where(seen_any, total, 1.0)[:, None]
        tile_lse = jnp.where(seen_any, maximum + jnp.log(jnp.where(seen_any, total, 1.0)), -jnp.inf)
        return (
            walk.store(out, tile_out.astype(out.dtype), head, tile),
            walk.store(lse, tile_lse, head, tile),
        )

    out = jnp.zeros_like(walk.q)
    lse = jnp.full(walk.q.shape[:2], -jnp.inf, jnp.float32)
    out, lse = walk.tiles(tile_body, (out, lse))
    tokens = q.shape[0]
    return out[:, :tokens].transpose(1, 0, 2), lse[:, :tokens].T


def _forward(
    q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array, scale: float
) -> Any:
    result: Any = xla_attention(q, k, v, schedule, head_category, scale)
    out, lse = result
    return (out, lse), (q, k, v, schedule, head_category, out, lse)


def attention_gradients(scale: float, residuals: Any, gradients: Any) -> Any:
    """Gradients of q, k, v, whichever backend computed the output.

    With weights P, scores S: dS = P * (dO V^T - rowsum(dO O) + dlse).
    """
    q, k, v, schedule, head_category, out, lse = residuals
    out_gradient, lse_gradient = gradients
    walk = _Walk.of(q, k, v, schedule, head_category)
    out_gradient32 = out_gradient.astype(jnp.float32)
    # The log-sum-exp of a row that saw nothing is a constant, whatever flows back into it.
    lse_gradient = jnp.where(jnp.isneginf(lse), 0.0, lse_gradient)
    offset = lse_gradient - (out_gradient32 * out.astype(jnp.float32)).sum(axis=-1)
    out_gradient_rows = walk.by_head(out_gradient)
    # A log-sum-exp of +inf makes every weight of a row that saw nothing, or is no row, zero.
    lse_rows = walk.by_head(jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
    offset_rows = walk.by_head(offset[..., None])

    def tile_body(head: Any, tile: "_Tile", carry: Any) -> Any:
        q_gradient, k_gradient, v_gradient = carry
        kv_head = head // walk.group_size
        in_tile = (jnp.arange(schedule.block_q) < tile.rows)[:, None]
        q_tile = walk.rows(walk.q, head, tile.first_row)
        tile_gradient = walk.rows(out_gradient_rows, head, tile.first_row)
        tile_lse = jnp.where(in_tile, walk.rows(lse_rows, head, tile.first_row), jnp.inf)
        tile_offset = jnp.where(in_tile, walk.rows(offset_rows, head, tile.first_row), 0.0)

        def step(block: "_Block", state: Any) -> Any:
            tile_q_gradient, k_gradient, v_gradient = state
            scores = _product(q_tile, block.k, ((1,), (1,))) * scale
            weights = jnp.exp(scores - tile_lse)
            if block.seen is not None:
                weights = jnp.where(block.seen, weights, 0.0)
            weight_gradient = _product(tile_gradient, block.v, ((1,), (1,)))
            score_gradient = weights * (weight_gradient + tile_offset) * scale
            score_gradient = score_gradient.astype(q.dtype)
            return (
                tile_q_gradient + _product(score_gradient, block.k, ((1,), (0,))),
                _add_rows(
                    k_gradient, kv_head, block.start, _product(score_gradient, q_tile, ((0,), (0,)))
                ),
                _add_rows(
                    v_gradient,
                    kv_head,
                    block.start,
                    _product(weights.astype(q.dtype), tile_gradient, ((0,), (0,))),
                ),
            )

        start = (jnp.zeros((schedule.block_q, q.shape[-1])), k_gradient, v_gradient)
        tile_q_gradient, k_gradient, v_gradient = walk.blocks(head, tile, step, start)
        return walk.store(q_gradient, tile_q_gradient, head, tile), k_gradient, v_gradient

    start = tuple(jnp.zeros(rows.shape, jnp.float32) for rows in (walk.q, walk.k, walk.v))
    q_gradient, k_gradient, v_gradient = (
        rows[:, : q.shape[0]].transpose(1, 0, 2).astype(q.dtype)
        for rows in walk.tiles(tile_body, start)
    )
    return q_gradient, k_gradient, v_gradient, None, None


xla_attention.defvjp(_forward, attention_gradients)


class _Tile(NamedTuple):
    """One row of a schedule's table of tiles, and the table it stands in."""

    table: Any
    first_row: Any
    rows: Any
    first_range: Any
    full_blocks: Any
    partial_blocks: Any


class _Block(NamedTuple):
    """One block of keys and values; `seen` is None where every row of the tile sees every key."""

    start: Any
    k: Float[Array, "block_kv head_dim"]
    v: Float[Array, "block_kv head_dim"]
    seen: Any


class _Walk(NamedTuple):
    """Arrays by head, padded so that slices of tiles and blocks are in bounds; and loops."""

    q: Float[Array, "q_heads padded_tokens head_dim"]
    k: Float[Array, "kv_heads padded_tokens head_dim"]
    v: Float[Array, "kv_heads padded_tokens head_dim"]
    info: TokenInfo
    schedule: Schedule
    head_category: Int[Array, "q_heads"]

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array) -> "_Walk":
        margin = max(schedule.block_q, schedule.block_kv)
        info = TokenInfo(
            jnp.pad(schedule.position, (0, margin), constant_values=PADDING_POSITION),
            jnp.pad(schedule.image, (0, margin), constant_values=-1),
            jnp.pad(schedule.sink, (0, margin)),
        )
        schedule = jax.tree.map(jnp.asarray, schedule)
        rows_q, rows_k, rows_v = (_by_head(array, margin) for array in (q, k, v))
        return cls(rows_q, rows_k, rows_v, info, schedule, jnp.asarray(head_category))

    @property
    def group_size(self) -> int:
        return self.q.shape[0] // self.k.shape[0]

    def by_head(self, array: Float[Array, "tokens heads channels"]) -> Array:
        return _by_head(array, max(self.schedule.block_q, self.schedule.block_kv))

    def rows(self, array: Array, head: Any, first_row: Any) -> Array:
        """The `block_q` rows of a head from `first_row` on."""
        size = (1, self.schedule.block_q, array.shape[-1])
        return lax.dynamic_slice(array, (head, first_row, 0), size)[0]

    def store(self, array: Array, tile_rows: Array, head: Any, tile: _Tile) -> Array:
        """Writes a tile's rows, leaving the rows after a ragged tile as they are."""
        start = (head, tile.first_row) + (0,) * (array.ndim - 2)
        old = lax.dynamic_slice(array, start, (1, *tile_rows.shape))[0]
        keep = jnp.arange(tile_rows.shape[0]) < tile.rows
        keep = keep.reshape(keep.shape + (1,) * (tile_rows.ndim - 1))
        return lax.dynamic_update_slice(array, jnp.where(keep, tile_rows, old)[None], start)

    def tiles(self, body: Callable[[Any, _Tile, Any], Any], carry: Any) -> Any:
        """Folds `body(head, tile, carry)` over all heads and the tiles of each head's table."""
        tile_count = (self.schedule.tiles[:, :, 1] > 0).sum(axis=1)

        def head_body(head: Any, carry: Any) -> Any:
            table = self.head_category[head]

            def tile_body(index: Any, carry: Any) -> Any:
                columns = self.schedule.tiles[table, index]
                return body(head, _Tile(table, *(columns[i] for i in range(5))), carry)

            return lax.fori_loop(0, tile_count[table], tile_body, carry)

        return lax.fori_loop(0, self.q.shape[0], head_body, carry)

    def blocks(self, head: Any, tile: _Tile, step: Callable[[_Block, Any], Any], state: Any) -> Any:
        """Folds `step(block, state)` over a tile's full blocks, then over its partial ones."""
        schedule = self.schedule
        kv_head = head // self.group_size
        ranges = schedule.ranges[tile.table]

        def take(array: Array, start: Any) -> Array:
            size = (1, schedule.block_kv, array.shape[-1])
            return lax.dynamic_slice(array, (kv_head, start, 0), size)[0]

        def token_info(start: Any, size: int) -> TokenInfo:
            return TokenInfo(*(lax.dynamic_slice(part, (start,), (size,)) for part in self.info))

        def seen(start: Any, end: Any) -> Array:
            query = token_info(tile.first_row, schedule.block_q)
            key = token_info(start, schedule.block_kv)
            in_range = start + jnp.arange(schedule.block_kv) < end
            return in_range[None, :] & visible(
                TokenInfo(*(part[:, None] for part in query)),
                TokenInfo(*(part[None, :] for part in key)),
                schedule.groups[tile.table],
                schedule.visibility,
            )

        def visit(masked: bool, _: Any, carry: Any) -> Any:
            index, start, state = carry
            end = ranges[index, 1]
            block = _Block(
                start,
                take(self.k, start),
                take(self.v, start),
                seen(start, end) if masked else None,
            )
            state = step(block, state)
            start = start + schedule.block_kv
            index = index + (start >= end)
            return index, jnp.where(start >= end, ranges[index, 0], start), state

        carry = (tile.first_range, ranges[tile.first_range, 0], state)
        carry = lax.fori_loop(0, tile.full_blocks, partial(visit, False), carry)
        carry = lax.fori_loop(0, tile.partial_blocks, partial(visit, True), carry)
        return carry[2]


def _by_head(array: Float[Array, "tokens heads channels"], margin: int) -> Array:
    """Rows of a head next to each other, with `margin` rows more."""
    return jnp.pad(array.transpose(1, 0, 2), ((0, 0), (0, margin), (0, 0)))


def _product(left: Array, right: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """A product accumulated in float32; float32 inputs are not rounded to TF32 or bfloat16."""
    return lax.dot_general(
        left, right, (contract, ((), ())), precision=_EXACT, preferred_element_type=jnp.float32
    )


def _add_rows(array: Array, head: Any, start: Any, rows: Array) -> Array:
    """Adds rows to a head's rows from `start` on."""
    old = lax.dynamic_slice(array, (head, start, 0), (1, *rows.shape))
    return lax.dynamic_update_slice(array, old + rows[None], (head, start, 0))
