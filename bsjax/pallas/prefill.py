"""Prefill attention on GPUs: one program for each tile of query rows and each head.

                       keys, in the order of the schedule
                 text            sinks     image 3          the tile's key ranges
               . F F F F F p . . p p . . F F F F p .         full     [1, 6)   [13, 17)
    tile ->    . F F F F F p . . p p . . F F F F p .         partial  [6, 7)   [9, 11)  [17, 18)
               . F F F F F p . . p p . . F F F F p .

Each column is a block of `block_kv` keys.

    F   Full: every row of the tile sees every key. One pipelined loop visits all full blocks,
        across ranges, and evaluates no mask.
    p   Partial: a second loop evaluates the predicate for every pair. The last block of a range is
        cut at the end of the range.
    .   In no range: never read.

Both loops carry three scalars that say which block is next: the index of its range, where the block
starts, and where the range ends.

All heads, whatever their categories, run in one launch. The first axis of the grid, which runs
fastest, is the query head, and the second is the tile; schedules list the longest tiles first. If
the schedule stacks the heads of text rows, the axes are the key head and the item of the launch
list (`bsjax.masks.launch_order`): an item is a tile of one of the query heads that share the key
head, or a tile of text rows, whose rows are (row, query head) pairs. In both grids, the query heads
that share a key head read the same keys at about the same time, from L2. Where a tile has more rows
than the registers hold, several programs share it. The parts of a tile that is split along the keys
are written to an array of their own, and combined afterwards.

Keys and values are read in place from the cache of all layers, at the index of one of them.

Reads of keys and values are never masked by row, so that the pipelined loops can copy them straight
to shared memory. Masked reads, together with the predicate's reads, would also make Triton's
allocator of shared memory hang (seen with JAX 0.12).

Offsets: Pallas computes the offsets into an array in 64 bits if the array has more than 2**32
bytes. In smaller arrays, with two bytes or more per element, indices are below 2**31 and fit into
32 bits.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from bsjax.gpu.configurations import KernelConfiguration
from bsjax.gpu.keys import block_keys
from bsjax.gpu.parts import combined_parts
from bsjax.gpu.pieces import Piece, pieces_of, width_of
from bsjax.manual_axes import result_shape
from bsjax.masks.launch_order import LaunchItem
from bsjax.masks.schedule import KeyRange, Schedule, Tile
from bsjax.masks.visibility import KeyVisibility, Visibility, sees
from bsjax.pallas import configurations
from bsjax.pallas.exponential import LOG2_E, scaled_exp2


def prefill_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "*layers keys kv_heads head_dim"],
    v: Float[Array, "*layers keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    layer: Int[Array, ""] | None = None,
    *,
    scale: float,
    return_lse: bool = False,
    interpret: bool = False,
    configuration: KernelConfiguration | None = None,
) -> (
    Float[Array, "queries q_heads head_dim"]
    | tuple[Float[Array, "queries q_heads head_dim"], Float[Array, "queries q_heads"]]
):
    """Block-sparse attention to the keys of one layer, for NVIDIA GPUs.

    The arrays must match each other and the schedule; `bsjax.attention.ragged_attention` checks
    that.

    Args:
      q: queries, rows in the order of the schedule; bfloat16, float16 or float32.
      k: keys, in the dtype of `q`. Query head h reads key head h // (q_heads // kv_heads). All must
        be finite, even in padding rows and where no query sees them.
      v: values, of the shape and dtype of `k`; all finite.
      schedule: which blocks to visit. Both block sizes are powers of two, 16 or more.
      head_category: int32, the table of the schedule that each query head uses.
      layer: the layer whose keys and values are read; None if there is no axis of layers.
      scale: factor applied to the scores, above 0.
      return_lse: also return the log-sum-exp of the scores.
      interpret: run in plain JAX on any device, slowly, for tests.
      configuration: how to compile, for tuning; its block sizes must divide those of the schedule.
        By default the result of `configurations.configuration`.

    Returns:
      The output in the dtype of `q`. With `return_lse` also the natural log-sum-exp of every row's
      scores, float32 [queries, q_heads]. A row that sees no key, such as a padding row, yields
      zeros and -inf. Sums are in float32; float32 inputs are multiplied in float32, not in TF32.

    Raises:
      BackendError: the kernel does not support the block sizes, head dimension or dtype.
    """
    if layer is None:
        k, v, layer = k[None], v[None], jnp.int32(0)
    rows, q_heads, head_dim = q.shape
    layers, key_rows, kv_heads, _ = k.shape
    group = q_heads // kv_heads
    pieces = pieces_of(head_dim)
    width = width_of(pieces)
    configuration = configurations.checked_configuration(
        head_dim, q.dtype, schedule.block_q, schedule.block_kv, configuration
    )
    programs_per_tile = schedule.block_q // configuration.block_q
    settings = _Settings(
        pieces=pieces,
        block_q=configuration.block_q,
        programs_per_tile=programs_per_tile,
        block_kv=configuration.block_kv,
        steps_per_block=schedule.block_kv // configuration.block_kv,
        visibility=schedule.visibility,
        stacked_heads=schedule.stacked_heads,
        scale=scale,
        interpret=interpret,
        precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )

    keys = block_keys(k, v, schedule, configuration.block_kv)
    visibility = keys.visibility

    keys_of_head = (layers, keys.rows, None, width)
    launch = []
    kernel = functools.partial(_attend_tile, settings)
    if schedule.stacked_heads:
        launch = [jnp.asarray(schedule.launch_columns)]
        of_key_head = pl.BlockSpec(keys_of_head, lambda kv_head, item: (0, 0, kv_head, 0))
        of_rows = pl.BlockSpec((rows, q_heads, width), lambda kv_head, item: (0, 0, 0))
        lse_of_rows = pl.BlockSpec()
    else:
        kernel = functools.partial(kernel, None)
        of_key_head = pl.BlockSpec(keys_of_head, lambda head, tile: (0, 0, head // group, 0))
        of_rows = pl.BlockSpec((rows, None, width), lambda head, tile: (0, head, 0))
        lse_of_rows = pl.BlockSpec((rows, None), lambda head, tile: (0, head))
    whole = pl.BlockSpec()
    parts = schedule.parts
    result = functools.partial(result_shape, like=q)
    out_shape = [result(q.shape, q.dtype)]
    out_specs = [of_rows]
    if return_lse or parts is not None:
        out_shape.append(result((rows, q_heads), jnp.float32))
        out_specs.append(lse_of_rows)
    heads, entries = schedule.grid(q_heads, kv_heads)
    if parts is not None:
        shape = (parts.count, kv_heads, schedule.block_q)
        out_shape += [
            result((*shape, head_dim), jnp.float32),
            result(shape, jnp.float32),
        ]
        out_specs += [
            pl.BlockSpec((*shape, width), lambda head, tile: (0, 0, 0, 0)),
            pl.BlockSpec(),
        ]
    outputs: Any = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid=(heads, entries * programs_per_tile),
        in_specs=[whole] * len(launch) + [of_rows, of_key_head, of_key_head] + [whole] * 10,
        out_specs=out_specs,
        compiler_params=pltriton.CompilerParams(
            num_warps=configuration.num_warps, num_stages=configuration.num_stages
        ),
        interpret=interpret,
        name="prefill_attention",
    )(
        *launch,
        q,
        keys.k,
        keys.v,
        jnp.asarray(schedule.queries.position),
        jnp.asarray(schedule.queries.image),
        visibility.position[0],
        visibility.image[0],
        visibility.own_from,
        visibility.other_from,
        jnp.asarray(layer, jnp.int32).reshape(1),
        jnp.asarray(head_category),
        jnp.asarray(schedule.tile_columns),
        jnp.asarray(schedule.range_columns),
    )
    if parts is not None:
        out, lse, part_out, part_lse = outputs
        outputs = combined_parts(out, lse, part_out, part_lse, parts, schedule.stacked_heads)
    return tuple(outputs) if return_lse else outputs[0]


class _Settings(NamedTuple):
    """What the kernel is specialised for, in addition to shapes."""

    pieces: tuple[Piece, ...]
    block_q: int
    programs_per_tile: int
    block_kv: int
    steps_per_block: int
    """How many blocks of the kernel make one block of the schedule."""
    visibility: Visibility
    stacked_heads: int
    scale: float
    interpret: bool
    precision: jax.lax.Precision | None


class _NextBlock(NamedTuple):
    """The next block of keys to visit: int32 scalars."""

    range_index: Array
    """Index of the block's range."""
    start: Array
    """First key row of the block."""
    end: Array
    """One past the last key row of the range."""


class _Softmax(NamedTuple):
    """A softmax over the keys seen so far, in powers of two: scores are multiplied by log2(e)."""

    maximum: Array
    """float32 [block_q]."""
    total: Array
    """float32 [block_q]: sum of exp2(score - maximum)."""
    weighted: tuple[Array, ...]
    """For each piece of the head, float32 [block_q, size]: sum of exp2(score - maximum) * value."""


class _TileRows(NamedTuple):
    """The rows of a program: query rows of one head, or pairs of a query row and a query head.

    The heads of the pairs share a key head.
    """

    table: Array
    tile: Tile
    kv_head: Array
    """The key head of stacked rows."""
    earlier: Array
    """How many of the tile's rows belong to programs before this one."""
    count: Array
    """How many of the tile's rows are left for this program and those after it; 0 or less if this
    program has nothing to do."""
    inside: Array
    """bool [block_q]: which rows belong to the tile."""
    first_row: Array
    """The program's first query row or, if `row` is given, the tile's."""
    row: Array | None
    """int32 [block_q], the query row; None for consecutive rows of one head."""
    head: Array | None
    """int32 [block_q], the query head."""

    def vector(self, array: Any) -> Any:
        """The entries of an array [rows] that belong to the program's rows."""
        if self.row is None:
            return array.at[pl.ds(self.first_row, self.inside.size)]
        return array.at[self.row]

    def of_heads(self, array: Any) -> Any:
        """The entries of an array [rows, heads] or, of one head, [rows]."""
        return self.vector(array) if self.row is None else array.at[self.row, self.head]

    def matrix(self, array: Any, piece: Piece) -> Any:
        """One piece of the rows of an array [rows, heads, head_dim] or [rows, head_dim]."""
        if self.row is None or self.head is None:
            # A computed 0, which the compiler turns into a constant. In interpret mode, all starts
            # of a slice must have the same dtype, and a constant's would be int64 with
            # `jax_enable_x64`.
            start = self.first_row * 0 + piece.start
            return array.at[pl.ds(self.first_row, self.inside.size), pl.ds(start, piece.size)]
        columns = piece.start + jnp.arange(piece.size, dtype=jnp.int32)
        return array.at[self.row[:, None], self.head[:, None], columns[None, :]]


def _tile_rows(
    settings: _Settings, launch_ref: Any, category_ref: Any, tiles_ref: Any
) -> _TileRows:
    """What the program with these indices has to do."""
    programs_per_tile = np.int32(settings.programs_per_tile)
    entry = jax.lax.div(pl.program_id(1), programs_per_tile)
    earlier = jax.lax.rem(pl.program_id(1), programs_per_tile) * settings.block_q
    indices = jnp.arange(settings.block_q, dtype=jnp.int32)
    if launch_ref is None:
        head = pl.program_id(0)
        table = category_ref[head]
        tile = Tile.read(lambda column: tiles_ref[table, entry, column])
        count = tile.rows - earlier
        first_row = tile.first_row + earlier
        return _TileRows(table, tile, head, earlier, count, indices < count, first_row, None, None)
    kv_head = pl.program_id(0)
    item = LaunchItem.read(lambda column: launch_ref[entry, column])
    first_head = kv_head * np.int32(settings.stacked_heads) + jnp.maximum(item.head, 0)
    of_text = np.int32(tiles_ref.shape[0] - 1)
    table = jnp.where(item.head < 0, of_text, category_ref[first_head])
    tile = Tile.read(lambda column: tiles_ref[table, item.tile, column])
    index = earlier + indices
    count = tile.rows * item.heads - earlier
    # Not `item.heads`, which may be 0. With it, the kernel spilled in float32 on Hopper.
    heads = jnp.where(item.head < 0, np.int32(settings.stacked_heads), np.int32(1))
    heads = jnp.broadcast_to(heads, index.shape)
    return _TileRows(
        table,
        tile,
        kv_head,
        earlier,
        count,
        indices < count,
        tile.first_row,
        tile.first_row + jax.lax.div(index, heads),
        first_head + jax.lax.rem(index, heads),
    )


def _attend_tile(
    settings: _Settings,
    launch_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    query_position_ref: Any,
    query_image_ref: Any,
    position_ref: Any,
    image_ref: Any,
    own_from_ref: Any,
    other_from_ref: Any,
    layer_ref: Any,
    category_ref: Any,
    tiles_ref: Any,
    ranges_ref: Any,
    out_ref: Any,
    lse_ref: Any = None,
    part_out_ref: Any = None,
    part_lse_ref: Any = None,
) -> None:
    """One program: the attention of a tile's rows, or of some of them."""
    work = _tile_rows(settings, launch_ref, category_ref, tiles_ref)
    table, tile = work.table, work.tile
    # A constant index of the only layer saves a register.
    layer = layer_ref[0] if k_ref.shape[0] > 1 else table * 0

    to_log2 = settings.scale * LOG2_E

    def load(ref: Any, start: Array) -> list[Array]:
        """Rows of a block of keys or values, piece by piece."""
        return [
            pltriton.load(
                ref.at[layer, pl.ds(start, settings.block_kv), pl.ds(piece.start, piece.size)],
                mask=piece.inside,
                other=None if piece.inside is None else 0.0,
            )
            for piece in settings.pieces
        ]

    def product(left: Array, right: Array) -> Array:
        return jnp.dot(
            left, right, precision=settings.precision, preferred_element_type=jnp.float32
        )

    def scores_of(queries: list[Array], keys: list[Array]) -> Array:
        pieces = zip(queries, keys, strict=True)
        first, *others = (product(q_piece, k_piece.T) for q_piece, k_piece in pieces)
        return sum(others, start=first)

    def attend(softmax: _Softmax, scores: Array, values: list[Array]) -> _Softmax:
        # The maximum starts finite, so that a row that has seen nothing subtracts no infinities.
        maximum = jnp.maximum(softmax.maximum, scores.max(axis=1) * to_log2)
        weights = scaled_exp2(scores, to_log2, -maximum[:, None], interpret=settings.interpret)
        rescale = jnp.exp2(softmax.maximum - maximum)
        return _Softmax(
            maximum,
            softmax.total * rescale + weights.sum(axis=1),
            tuple(
                weighted * rescale[:, None] + product(weights.astype(part.dtype), part)
                for weighted, part in zip(softmax.weighted, values, strict=True)
            ),
        )

    def bound(range_index: Array, name: str) -> Array:
        """The start or the end of a key range."""
        return ranges_ref[table, range_index, KeyRange._fields.index(name)]

    def advance(step: Array, block: _NextBlock) -> _NextBlock:
        start = block.start + settings.block_kv
        done = start >= block.end
        if settings.steps_per_block > 1:
            # The schedule's last block of a range may reach beyond the range. All of its steps are
            # run, with the keys beyond the range masked.
            done &= jax.lax.rem(step + 1, np.int32(settings.steps_per_block)) == 0
        range_index = jnp.where(done, block.range_index + 1, block.range_index)
        return _NextBlock(
            range_index,
            jnp.where(done, bound(range_index, "start"), start),
            bound(range_index, "end"),
        )

    @pl.when(work.count > 0)
    def _() -> None:
        queries = [
            pltriton.load(
                work.matrix(q_ref, piece), mask=_both(work.inside[:, None], piece.inside), other=0.0
            )
            for piece in settings.pieces
        ]
        query_position, query_image = (
            pltriton.load(work.vector(ref), mask=work.inside, other=0)[:, None]
            for ref in (query_position_ref, query_image_ref)
        )
        last_start = k_ref.shape[1] - settings.block_kv

        def full_block(
            step: Array, carry: tuple[_NextBlock, _Softmax]
        ) -> tuple[_NextBlock, _Softmax]:
            block, softmax = carry
            keys = load(k_ref, block.start)
            values = load(v_ref, block.start)
            softmax = attend(softmax, scores_of(queries, keys), values)
            return advance(step, block), softmax

        def partial_block(
            step: Array, carry: tuple[_NextBlock, _Softmax]
        ) -> tuple[_NextBlock, _Softmax]:
            block, softmax = carry
            # Reads are not masked by row: a block that would reach beyond the last key is read
            # from further up, and the keys before its start are masked.
            first_key = jnp.minimum(block.start, last_start)
            key_rows = first_key + jnp.arange(settings.block_kv, dtype=jnp.int32)
            in_block = (key_rows >= block.start) & (key_rows < block.end)
            keys = load(k_ref, first_key)
            values = load(v_ref, first_key)
            in_memory = pl.ds(first_key, settings.block_kv)
            key = KeyVisibility(
                *(
                    pltriton.load(part)[None, :]
                    for part in (
                        position_ref.at[in_memory],
                        image_ref.at[in_memory],
                        own_from_ref.at[table, in_memory],
                        other_from_ref.at[table, in_memory],
                    )
                )
            )
            seen = in_block[None, :] & sees(query_position, query_image, key, settings.visibility)
            scores = jnp.where(seen, scores_of(queries, keys), -jnp.inf)
            return advance(step, block), attend(softmax, scores, values)

        block = _NextBlock(
            tile.first_range, bound(tile.first_range, "start"), bound(tile.first_range, "end")
        )
        softmax = _Softmax(
            jnp.full((settings.block_q,), jnp.finfo(jnp.float32).min),
            jnp.zeros((settings.block_q,), jnp.float32),
            tuple(
                jnp.zeros((settings.block_q, piece.size), jnp.float32) for piece in settings.pieces
            ),
        )
        carry = jax.lax.fori_loop(
            0, tile.full_blocks * settings.steps_per_block, full_block, (block, softmax)
        )
        _, softmax = jax.lax.fori_loop(
            0, tile.partial_blocks * settings.steps_per_block, partial_block, carry
        )

        total = jnp.where(softmax.total > 0, softmax.total, 1.0)
        lse = (softmax.maximum + jnp.log2(total)) / LOG2_E
        lse = jnp.where(softmax.total > 0, lse, -jnp.inf)

        def store_rows(inside: Array) -> None:
            for piece, weighted in zip(settings.pieces, softmax.weighted, strict=True):
                pltriton.store(
                    work.matrix(out_ref, piece),
                    (weighted / total[:, None]).astype(out_ref.dtype),
                    mask=_both(inside[:, None], piece.inside),
                )
            if lse_ref is not None:
                pltriton.store(work.of_heads(lse_ref), lse, mask=inside)

        if part_out_ref is None:
            store_rows(work.inside)
            return

        # Branches, because the addresses of both ways together would not fit into registers.
        @pl.when(tile.part < 0)
        def _() -> None:
            store_rows(work.inside)

        @pl.when(tile.part >= 0)
        def _() -> None:
            own_rows = pl.ds(work.earlier, settings.block_q)
            for piece, weighted in zip(settings.pieces, softmax.weighted, strict=True):
                columns = pl.ds(tile.part * 0 + piece.start, piece.size)
                pltriton.store(
                    part_out_ref.at[tile.part, work.kv_head, own_rows, columns],
                    weighted / total[:, None],
                    mask=_both(work.inside[:, None], piece.inside),
                )
            pltriton.store(
                part_lse_ref.at[tile.part, work.kv_head, own_rows], lse, mask=work.inside
            )


def _both(rows: Array, columns: Array | None) -> Array:
    """The mask of a block from those of its rows and of its columns; None masks nothing."""
    return rows if columns is None else rows & columns
