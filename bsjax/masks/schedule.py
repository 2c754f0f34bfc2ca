"""From a template to the work of a kernel: tiles of query rows, and the key ranges each one visits.

Rows are tokens in the order of the schedule: packed order, or prompt order when every head is
dense. A query row sees at most one range [low, high) of each key segment, and both ends only grow
from row to row (see `bsjax.masks.query_rows`). A tile visits the union of what its rows see:

    first row of a tile    . . # # # # # # # # . . . .     [low, high) of the first row
    ...                    . . . # # # # # # # # . . .
    last row of the tile   . . . . # # # # # # # # # .     [low, high) of the last row
    the tile's ranges          p p F F F F F F p p p       in blocks of two keys: one partial, three
                                                           full, two partial (the last one cut)

Every row of the tile sees all keys from the last row's low to the first row's high. Blocks inside
that range are *full* and need no element mask. The others are *partial*: the predicate decides pair
by pair. Where consecutive rows of a tile leave a gap of keys that neither sees, the tile has
several ranges.

Everything here is NumPy on the host. No array is ever as large as tokens x tokens or blocks x
blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bsjax.checks import whole_number
from bsjax.errors import MaskError
from bsjax.masks.categories import HeadCategory, KeyGroup
from bsjax.masks.query_rows import QueryRows, RowRanges
from bsjax.masks.template import Template
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility

PADDING_POSITION = np.iinfo(np.int32).max
"""The position of padding rows, which no query sees."""

# Backends pad their arrays by a block.
_LARGEST_BLOCK = 65536


class Tile(NamedTuple):
    """Query rows that are processed together, and the key ranges that they visit.

    A schedule keeps all tiles in one int32 array, so that a kernel reads a tile from one place in
    memory. The fields here are the columns of that array, in order: scalars for one tile, arrays
    for many.

    Attributes:
      first_row: first query row.
      rows: number of rows; 0 for an entry after a table's last tile.
      first_range: index of the tile's first range among those of its table.
      full_blocks: blocks of keys in its full ranges.
      partial_blocks: blocks of keys in its partial ranges, which follow the full ones.
    """

    first_row: Any
    rows: Any
    first_range: Any
    full_blocks: Any
    partial_blocks: Any

    @classmethod
    def read(cls, column: Callable[[int], Any]) -> "Tile":
        """The tile whose fields are `column(0)`, `column(1)`, ..."""
        return cls(*map(column, range(len(cls._fields))))

    @property
    def blocks(self) -> Any:
        """Blocks of keys that the tile visits."""
        return self.full_blocks + self.partial_blocks


class KeyRange(NamedTuple):
    """Consecutive key rows that a tile visits. Kept in one array, like `Tile`.

    Attributes:
      start: first key row.
      end: one past the last key row.
    """

    start: Any
    end: Any

    @classmethod
    def read(cls, column: Callable[[int], Any]) -> "KeyRange":
        """The range whose fields are `column(0)` and `column(1)`."""
        return cls(*map(column, range(len(cls._fields))))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles and key ranges that attention over one template visits, as a pytree.

    Arrays are padded to buckets: another template of similar size has the same shapes, so that
    nothing is compiled again. Each query head uses one of the tables.

    Attributes:
      position: int32 [tokens], prompt position of each row; `PADDING_POSITION` for padding.
      image: int32 [tokens], image number of each row; -1 for text and padding.
      sink: bool [tokens], whether the row is a sink token.
      groups: int32 [tables], the `KeyGroup` bits of each table.
      tile_columns: int32 [tables, tiles, fields of `Tile`], the tiles with the most blocks first.
        In each table that is not empty, every row is in exactly one tile; padding rows are in tiles
        without blocks. Entries after a table's last tile have no rows.
      range_columns: int32 [tables, ranges, fields of `KeyRange`]. From its `first_range` on, a tile
        has first its full ranges (whole multiples of `block_kv`), then its partial ones. Blocks
        step by `block_kv` from a range's start; the last block of a partial range is cut at the end
        of the range. One extra entry lets kernels look one range ahead without leaving the bounds.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      visibility: what the model itself lets a query see.
    """

    position: Any
    image: Any
    sink: Any
    groups: Any
    tile_columns: Any
    range_columns: Any
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})
    visibility: Visibility = field(metadata={"static": True})

    @property
    def tokens(self) -> int:
        """Rows of the schedule, padding included."""
        return self.position.shape[0]

    @property
    def info(self) -> TokenInfo:
        """What the predicate needs to know about every row."""
        return TokenInfo(self.position, self.image, self.sink)

    @property
    def tiles(self) -> Tile:
        """All tiles: every field is an int32 array [tables, tiles]."""
        return Tile.read(lambda column: self.tile_columns[..., column])

    @property
    def ranges(self) -> KeyRange:
        """All key ranges: both fields are int32 arrays [tables, ranges]."""
        return KeyRange.read(lambda column: self.range_columns[..., column])


def bucket(size: int, *, smallest: int, steps: int = 4) -> int:
    """Rounds `size` up to a coarse grid, so that few different shapes are compiled.

    Args:
      size: the size that has to fit.
      smallest: the smallest size of the grid.
      steps: sizes per factor of two. More steps mean more programs and less padding: 4 steps add at
        most 25 %.
    """
    if size <= smallest:
        return smallest
    step = max(1 << (size - 1).bit_length() - 1, smallest) // steps
    return -(-size // step) * step


def build_schedule(
    template: Template,
    tables: Sequence[KeyGroup | None],
    *,
    block_q: int,
    block_kv: int,
    visibility: Visibility = CAUSAL,
    tokens: int | None = None,
) -> Schedule:
    """Computes the tiles and ranges of a template for several sets of key groups.

    Args:
      template: the prompt.
      tables: the key groups of each table; None for a table that no head uses, which stays empty.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      visibility: what the model itself lets a query see.
      tokens: rows to pad to; None pads nothing.

    Returns:
      The schedule, in prompt order if every table keeps all groups, else in packed order.

    Raises:
      MaskError: a block size is below 1 or above 65536, or `tokens` is less than the template has.
    """
    for name, value in (("block_q", block_q), ("block_kv", block_kv)):
        whole_number(name, value, least=1, most=_LARGEST_BLOCK, error=MaskError)
    tokens = template.tokens if tokens is None else tokens
    if tokens < template.tokens:
        raise MaskError(f"Cannot pad a template of {template.tokens} tokens to {tokens}.")

    rows = QueryRows(template, tables, visibility)
    built = [_build_table(rows, groups, block_q, block_kv, tokens) for groups in tables]
    # Enough for images of 2 * block_q tokens or more, so that nearly all templates padded to the
    # same length share their shapes.
    usual_tiles = bucket(2 * tokens // block_q + 4, smallest=16, steps=1)
    max_tiles = bucket(
        max((len(tiles) for tiles, _ in built), default=0), smallest=usual_tiles, steps=1
    )
    # One extra entry, because kernels read the range after a tile's last one.
    most_ranges = 1 + max((len(ranges) for _, ranges in built), default=0)
    max_ranges = bucket(most_ranges, smallest=4 * usual_tiles, steps=1)
    padding = (0, tokens - template.tokens)
    return Schedule(
        position=np.pad(rows.order, padding, constant_values=PADDING_POSITION),
        image=np.pad(rows.image, padding, constant_values=-1),
        sink=np.pad(template.sink[rows.order], padding),
        groups=np.asarray([int(groups or 0) for groups in tables], np.int32),
        tile_columns=_stack([tiles for tiles, _ in built], max_tiles),
        range_columns=_stack([ranges for _, ranges in built], max_ranges),
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
    )


def category_tables(categories: Sequence[int] | np.ndarray) -> list[KeyGroup | None]:
    """The key groups of each `HeadCategory`, in order; None for categories that do not occur."""
    used = set(np.unique(np.asarray(categories)).tolist())
    return [category.groups if category in used else None for category in HeadCategory]


def without_text_queries(schedule: Schedule, tables: Iterable[int]) -> Schedule:
    """Returns the schedule without blocks for text rows in some of its tables.

    Text queries see the same keys in every table. Where the outputs of several tables are combined,
    one table is enough for text rows; in the others they see nothing.

    Args:
      schedule: in packed order, with NumPy arrays.
      tables: indices of the tables without text rows.

    Raises:
      MaskError: the schedule is in prompt order, where a tile may have rows of both text and
        images.
    """
    text_rows = np.append(0, np.cumsum(schedule.image < 0))
    changed = replace(schedule, tile_columns=schedule.tile_columns.copy())
    for table in tables:
        tiles = Tile(*(field[table] for field in changed.tiles))
        of_text = text_rows[tiles.first_row + tiles.rows] - text_rows[tiles.first_row]
        if np.any((of_text > 0) & (of_text < tiles.rows)):
            raise MaskError(
                "Only a schedule in packed order can leave out its text rows, but this one has "
                "tiles with rows of both text and images: build it with a sparse table."
            )
        # The fields are views of the columns.
        tiles.full_blocks[of_text > 0] = 0
        tiles.partial_blocks[of_text > 0] = 0
        # As in any table: tiles with the most blocks first, entries without rows last.
        order = np.lexsort((-tiles.blocks, tiles.rows == 0))
        changed.tile_columns[table] = changed.tile_columns[table, order]
    return changed


def segment_schedule(
    lengths: Sequence[int] | Int[np.ndarray, "segments"],
    *,
    block_q: int,
    block_kv: int,
    tokens: int | None = None,
) -> Schedule:
    """The schedule of attention within segments: a row sees exactly the rows of its own segment.

    Vision towers attend like this, within images or within windows. It is INTRA_IMAGE over a
    template that consists of images only.

    Args:
      lengths: rows of each segment, in order; at least 1 each.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      tokens: rows to pad to; None pads nothing.
    """
    lengths = np.asarray(lengths, np.int64)
    image = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    return build_schedule(
        Template(image, np.zeros(image.shape, bool)),
        category_tables([HeadCategory.INTRA_IMAGE]),
        block_q=block_q,
        block_kv=block_kv,
        visibility=Visibility(bidirectional_images=True),
        tokens=tokens,
    )


class _TileRanges(NamedTuple):
    """Key ranges of one segment: the tile, start and end of each."""

    tile: Int[np.ndarray, "ranges"]
    start: Int[np.ndarray, "ranges"]
    end: Int[np.ndarray, "ranges"]


def _build_table(
    rows: QueryRows, groups: KeyGroup | None, block_q: int, block_kv: int, tokens: int
) -> tuple[Int[np.ndarray, "tiles fields"], Int[np.ndarray, "ranges bounds"]]:
    """The tiles and ranges of one table, as columns."""
    if groups is None:
        empty = np.zeros(0, np.int32)
        return _columns(Tile.read(lambda _: empty)), _columns(KeyRange(empty, empty))
    starts = rows.tile_starts(groups, block_q)
    probes = rows.probes(starts, block_q)
    first_probes = np.searchsorted(probes, starts)
    full: list[_TileRanges] = []
    partial: list[_TileRanges] = []
    for segment in rows.segments:
        if segment.first_row < segment.end_row:
            seen = rows.ranges(segment, groups, probes)
            segment_full, *segment_partial = _cut_ranges(seen, first_probes, block_kv)
            full.append(segment_full)
            partial.extend(segment_partial)

    starts_padding = np.arange(rows.tokens, tokens, block_q)
    first_row = np.concatenate([starts, starts_padding])
    tile_rows = np.diff(first_row, append=tokens)
    full_blocks = _blocks_per_tile(full, block_kv, len(first_row))
    partial_blocks = _blocks_per_tile(partial, block_kv, len(first_row))
    order = np.argsort(-(full_blocks + partial_blocks), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)

    tile = np.concatenate([rank[part.tile] for part in full + partial] or [order[:0]])
    is_partial = np.repeat(
        [0, 1], [sum(len(part.tile) for part in kind) for kind in (full, partial)]
    )
    by_tile = np.argsort(tile * 2 + is_partial, kind="stable")
    ranges = KeyRange(
        np.concatenate([part.start for part in full + partial] or [order[:0]]),
        np.concatenate([part.end for part in full + partial] or [order[:0]]),
    )
    first_range = np.searchsorted(tile[by_tile], np.arange(order.size))
    tiles = Tile(first_row, tile_rows, first_range[rank], full_blocks, partial_blocks)
    return _columns(tiles)[order], _columns(ranges)[by_tile]


def _columns(fields: Tile | KeyRange) -> Int[np.ndarray, "entries fields"]:
    """Stacks the fields as columns, which is how a schedule stores them."""
    return np.stack(fields, axis=1).astype(np.int32)


def _cut_ranges(
    seen: RowRanges, starts: Int[np.ndarray, "tiles"], block_kv: int
) -> tuple[_TileRanges, _TileRanges, _TileRanges]:
    """Unites the ranges of each tile's rows, then cuts each union into full and partial ranges.

    Args:
      seen: the ranges of the probes.
      starts: the first probe of each tile.
      block_kv: keys of a block.

    Returns:
      The full ranges, the partial ranges before them, and the partial ranges after them.
    """
    low, high = seen
    last_rows = np.append(starts[1:], low.size) - 1
    starts_range = np.zeros(low.size, bool)
    starts_range[1:] = low[1:] > high[:-1]
    starts_range[starts] = True
    first = np.flatnonzero(starts_range)
    last = np.append(first[1:], low.size) - 1
    start, end = low[first].astype(np.int64), high[last].astype(np.int64)
    tile = np.searchsorted(starts, first, side="right") - 1

    # A tile with several unions has no key that all rows see: [seen_low, seen_high) is empty.
    seen_low, seen_high = low[last_rows][tile], high[starts][tile]
    full_start = start + -(-(seen_low - start) // block_kv) * block_kv
    full_end = full_start + np.maximum(seen_high - full_start, 0) // block_kv * block_kv
    has_full = full_end > full_start
    full_start = np.where(has_full, full_start, start)
    full_end = np.where(has_full, full_end, start)

    def nonempty(begin: np.ndarray, stop: np.ndarray) -> _TileRanges:
        keep = begin < stop
        return _TileRanges(tile[keep], begin[keep], stop[keep])

    return nonempty(full_start, full_end), nonempty(start, full_start), nonempty(full_end, end)


def _blocks_per_tile(
    parts: Sequence[_TileRanges], block_kv: int, tiles: int
) -> Int[np.ndarray, "tiles"]:
    """How many blocks the ranges of each tile have."""
    blocks = np.zeros(tiles, np.int64)
    for part in parts:
        np.add.at(blocks, part.tile, -(-(part.end - part.start) // block_kv))
    return blocks


def _stack(tables: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks tables of unequal length, padded with zeros to `length`."""
    stacked = np.zeros((len(tables), length, tables[0].shape[1] if tables else 0), np.int32)
    for index, table in enumerate(tables):
        stacked[index, : len(table)] = table
    return stacked
