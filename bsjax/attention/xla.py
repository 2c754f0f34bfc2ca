"""Attention over a schedule in plain JAX: differentiable, block by block, on any device.

Three nested loops: over heads, over the tiles of the head's table, over the blocks of a tile. Trip
counts are read from the schedule, so sparser schedules take less time. The gradient visits the
same tiles and blocks again and recomputes the weights from the log-sum-exp, as flash attention
does.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from bsjax.masks.schedule import PADDING_POSITION, KeyRange, Schedule, Tile
from bsjax.masks.visibility import TokenInfo, visible

_EXACT = lax.Precision.HIGHEST

# Indices are int32, as in schedules. A plain 0 would be int64 where `jax_enable_x64` is set, and
# slices take indices of one dtype only.
_ZERO = np.int32(0)

Residuals = tuple[Array, Array, Array, Schedule, Array, Array, Array]
"""What the gradient needs: q, k, v, schedule, head_category, output, log-sum-exp."""


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def xla_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    scale: float,
) -> tuple[Float[Array, "tokens q_heads head_dim"], Float[Array, "tokens q_heads"]]:
    """Block-sparse attention, rows in the order of the schedule.

    Returns:
      The output, in the dtype of `q`, and the log-sum-exp of the scaled scores, float32. A query
      that sees nothing yields zeros and -inf.
    """
    loops = _Loops.of(q, k, v, schedule, head_category)

    def tile_body(head: Array, tile: Tile, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = carry
        q_tile = loops.rows(loops.q, head, tile.first_row)

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
            jnp.full(schedule.block_q, -jnp.inf, jnp.float32),
            jnp.zeros(schedule.block_q, jnp.float32),
            jnp.zeros((schedule.block_q, q.shape[-1]), jnp.float32),
        )
        maximum, total, accumulator = loops.blocks(head, tile, step, start)
        seen_any = total > 0
        tile_out = accumulator / jnp.where(seen_any, total, 1.0)[:, None]
        tile_lse = jnp.where(seen_any, maximum + jnp.log(jnp.where(seen_any, total, 1.0)), -jnp.inf)
        return (
            loops.store(out, tile_out.astype(out.dtype), head, tile),
            loops.store(lse, tile_lse, head, tile),
        )

    out = jnp.zeros_like(loops.q)
    lse = jnp.full(loops.q.shape[:2], -jnp.inf, jnp.float32)
    out, lse = loops.tiles(tile_body, (out, lse))
    tokens = q.shape[0]
    return out[:, :tokens].transpose(1, 0, 2), lse[:, :tokens].T


def _forward(
    q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array, scale: float
) -> tuple[tuple[Array, Array], Residuals]:
    result: Any = xla_attention(q, k, v, schedule, head_category, scale)
    out, lse = result
    return (out, lse), (q, k, v, schedule, head_category, out, lse)


def attention_gradients(
    scale: float, residuals: Residuals, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None]:
    """Gradients of q, k and v, whichever backend computed the output.

    With weights P and scores S, dS = P * (dO V^T - rowsum(dO O) + dlse).
    """
    q, k, v, schedule, head_category, out, lse = residuals
    out_gradient, lse_gradient = gradients
    loops = _Loops.of(q, k, v, schedule, head_category)
    out_gradient32 = out_gradient.astype(jnp.float32)
    # The log-sum-exp of a row that saw nothing is a constant: its gradient is ignored.
    lse_gradient = jnp.where(jnp.isneginf(lse), 0.0, lse_gradient)
    offset = lse_gradient - (out_gradient32 * out.astype(jnp.float32)).sum(axis=-1)
    out_gradient_rows = loops.by_head(out_gradient)
    # A log-sum-exp of +inf makes all weights 0: here for rows that saw nothing, below for rows
    # beyond the end of the tile.
    lse_rows = loops.by_head(jnp.where(jnp.isneginf(lse), jnp.inf, lse)[..., None])
    offset_rows = loops.by_head(offset[..., None])

    def tile_body(
        head: Array, tile: Tile, carry: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        q_gradient, k_gradient, v_gradient = carry
        kv_head = head // loops.group_size
        in_tile = (jnp.arange(schedule.block_q) < tile.rows)[:, None]
        q_tile = loops.rows(loops.q, head, tile.first_row)
        tile_gradient = loops.rows(out_gradient_rows, head, tile.first_row)
        tile_lse = jnp.where(in_tile, loops.rows(lse_rows, head, tile.first_row), jnp.inf)
        tile_offset = jnp.where(in_tile, loops.rows(offset_rows, head, tile.first_row), 0.0)

        def step(block: "_Block", state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
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

        start = (jnp.zeros((schedule.block_q, q.shape[-1]), jnp.float32), k_gradient, v_gradient)
        tile_q_gradient, k_gradient, v_gradient = loops.blocks(head, tile, step, start)
        return loops.store(q_gradient, tile_q_gradient, head, tile), k_gradient, v_gradient

    start = tuple(jnp.zeros(rows.shape, jnp.float32) for rows in (loops.q, loops.k, loops.v))
    q_gradient, k_gradient, v_gradient = (
        rows[:, : q.shape[0]].transpose(1, 0, 2).astype(q.dtype)
        for rows in loops.tiles(tile_body, start)
    )
    return q_gradient, k_gradient, v_gradient, None, None


xla_attention.defvjp(_forward, attention_gradients)


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

    Arrays are laid out by head and padded, so that slices of tiles and blocks stay in bounds.
    """

    q: Float[Array, "q_heads padded_tokens head_dim"]
    k: Float[Array, "kv_heads padded_tokens head_dim"]
    v: Float[Array, "kv_heads padded_tokens head_dim"]
    info: TokenInfo
    schedule: Schedule
    head_category: Int[Array, "q_heads"]

    @classmethod
    def of(cls, q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array) -> "_Loops":
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

    def rows(self, array: Array, head: Array, first_row: Array) -> Array:
        """The `block_q` rows of a head that start at `first_row`."""
        size = (1, self.schedule.block_q, array.shape[-1])
        return lax.dynamic_slice(array, (head, first_row, _ZERO), size)[0]

    def store(self, array: Array, tile_rows: Array, head: Array, tile: Tile) -> Array:
        """Writes the rows of a tile; the rows after a short tile keep their values."""
        start = (head, tile.first_row) + (_ZERO,) * (array.ndim - 2)
        old = lax.dynamic_slice(array, start, (1, *tile_rows.shape))[0]
        keep = jnp.arange(tile_rows.shape[0]) < tile.rows
        keep = keep.reshape(keep.shape + (1,) * (tile_rows.ndim - 1))
        return lax.dynamic_update_slice(array, jnp.where(keep, tile_rows, old)[None], start)

    def tiles(self, body: Callable[[Array, Tile, Any], Any], carry: Any) -> Any:
        """Folds `body(head, tile, carry)` over all heads and the tiles of each head's table."""
        tile_count = (self.schedule.tiles.rows > 0).sum(axis=1, dtype=jnp.int32)

        def head_body(head: Array, carry: Any) -> Any:
            head = head.astype(jnp.int32)
            table = self.head_category[head]

            def tile_body(index: Array, carry: Any) -> Any:
                return body(head, Tile(*self.schedule.tile_columns[table, index]), carry)

            return lax.fori_loop(_ZERO, tile_count[table], tile_body, carry)

        return lax.fori_loop(0, self.q.shape[0], head_body, carry)

    def blocks(
        self, head: Array, tile: Tile, step: Callable[[_Block, Any], Any], state: Any
    ) -> Any:
        """Folds `step(block, state)` over the full blocks of a tile, then over its partial ones."""
        schedule = self.schedule
        kv_head = head // self.group_size
        table = self.head_category[head]
        ranges = KeyRange(*(bound[table] for bound in schedule.ranges))

        def take(array: Array, start: Array) -> Array:
            size = (1, schedule.block_kv, array.shape[-1])
            return lax.dynamic_slice(array, (kv_head, start, _ZERO), size)[0]

        def token_info(start: Array, size: int) -> TokenInfo:
            return TokenInfo(*(lax.dynamic_slice(part, (start,), (size,)) for part in self.info))

        def seen(start: Array, end: Array) -> Array:
            query = token_info(tile.first_row, schedule.block_q)
            key = token_info(start, schedule.block_kv)
            in_range = start + jnp.arange(schedule.block_kv) < end
            return in_range[None, :] & visible(
                TokenInfo(*(part[:, None] for part in query)),
                TokenInfo(*(part[None, :] for part in key)),
                schedule.groups[table],
                schedule.visibility,
            )

        def visit(masked: bool, _: Array, carry: Any) -> Any:
            index, start, state = carry
            end = ranges.end[index]
            block = _Block(
                start,
                take(self.k, start),
                take(self.v, start),
                seen(start, end) if masked else None,
            )
            state = step(block, state)
            start = start + schedule.block_kv
            index = index + (start >= end)
            return index, jnp.where(start >= end, ranges.start[index], start), state

        carry = (tile.first_range, ranges.start[tile.first_range], state)
        carry = lax.fori_loop(_ZERO, tile.full_blocks, partial(visit, False), carry)
        carry = lax.fori_loop(_ZERO, tile.partial_blocks, partial(visit, True), carry)
        return carry[2]


def _by_head(array: Float[Array, "tokens heads channels"], margin: int) -> Array:
    """The rows of each head next to each other, with `margin` more rows of padding."""
    return jnp.pad(array.transpose(1, 0, 2), ((0, 0), (0, margin), (0, 0)))


def _product(left: Array, right: Array, contract: tuple[tuple[int], tuple[int]]) -> Array:
    """A product accumulated in float32; float32 inputs are not rounded to TF32 or bfloat16."""
    return lax.dot_general(
        left, right, (contract, ((), ())), precision=_EXACT, preferred_element_type=jnp.float32
    )


def _add_rows(array: Array, head: Array, start: Array, rows: Array) -> Array:
    """Adds `rows` to the rows of a head that start at `start`."""
    old = lax.dynamic_slice(array, (head, start, _ZERO), (1, *rows.shape))
    return lax.dynamic_update_slice(array, old + rows[None], (head, start, _ZERO))
