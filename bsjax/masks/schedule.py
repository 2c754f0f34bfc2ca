"""From a template to the work of a kernel: tiles of query rows, and the key ranges each one visits.

Query rows and key rows are tokens in packed order, or in prompt order when every head is dense (see
`bsjax.masks.rows`). They are the same rows when a whole prompt runs at once; otherwise the queries
are those of a chunk or of a turn, or belong to several conversations. A query row sees at most one
range [low, high) of each key segment, and from row to row of a tile neither end ever decreases (see
`bsjax.masks.query_rows`). A tile visits the union of what its rows see:

    first row of a tile    . . # # # # # # # # . . . .     [low, high) of the first row
    ...                    . . . # # # # # # # # . . .
    last row of the tile   . . . . # # # # # # # # # .     [low, high) of the last row
    the tile's ranges          p p F F F F F F p p p       in blocks of two keys: one partial, three
                                                           full, two partial (the last one cut)

Every row of the tile sees all keys from the last row's low to the first row's high. Blocks inside
that range are *full* and need no element mask. The others are *partial*: the predicate decides pair
by pair. Where consecutive rows of a tile leave a gap of keys that neither sees, the tile has
several ranges. Tiles and ranges never leave a conversation.

A text row sees the same keys in all heads, whatever their categories. Text rows can therefore have
a table of their own, in which a tile stacks the query heads that share a key head: 18 rows x 7
heads in a tile of 128. A chunk of a prompt has few text rows, which see everything before them; a
stacked tile reads those keys once for all of its heads.

If those few tiles visit many more blocks than all others, a GPU would wait for them. They can be
split along the keys into *parts*, whose results are combined by their log-sum-exps. With a table
of text rows, a launch goes by a list of tiles, the longest first (`bsjax.masks.launch_order`).

Everything here is NumPy on the host. No array is ever as large as tokens x tokens or blocks x
blocks.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bsjax.checks import whole_number
from bsjax.errors import MaskError
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.launch_order import LaunchItem, launch_entries, launch_list
from bsjax.masks.query_rows import QueryRows, RowRanges
from bsjax.masks.rows import Rows, Span
from bsjax.masks.template import Template
from bsjax.masks.visibility import CAUSAL, PADDING, TokenInfo, Visibility

LONGEST_TILE = 64
"""A tile of text rows that visits more blocks than this may be split along the keys.

The beginning and end of a program cost about as much as five blocks, and a launch waits for its
longest program: `docs/speed.md` says what other lengths would cost."""

# The largest block size that is accepted, because backends pad their arrays by a block.
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
      part: index of this part among all parts of the table's split tiles; -1 for a whole tile.
    """

    first_row: Any
    rows: Any
    first_range: Any
    full_blocks: Any
    partial_blocks: Any
    part: Any

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


class Parts(NamedTuple):
    """The split tile that each part belongs to: int32 arrays [parts].

    Attributes:
      tile: index of the tile among all split tiles. For entries after the last part it is the
        length of the array, which is out of bounds.
      first_row: the tile's first query row.
      rows: how many query rows the tile has.
    """

    tile: Any
    first_row: Any
    rows: Any

    @property
    def count(self) -> int:
        """How many parts there is room for."""
        return self.tile.shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Schedule:
    """The tiles of some query rows, and the ranges of key rows that they visit, as a pytree.

    Arrays are padded to buckets: another template of similar size has the same shapes, so that
    nothing is compiled again. Each query head uses one of the tables. If heads are stacked, the
    last table is for text rows, and the others have no tiles for them.

    Attributes:
      queries: arrays [query rows]: what the predicate needs to know about them. The position of
        padding rows is `PADDING_POSITION`.
      keys: the same for the key rows, arrays [key rows].
      groups: int32 [tables], the `KeyGroup` bits of each table.
      tile_columns: int32 [tables, tiles, fields of `Tile`], the tiles with the most blocks first.
        In each table that is not empty, every query row that the table is for is in exactly one
        tile, or in all parts of one; padding rows are in tiles without blocks. Entries after a
        table's last tile have no rows. With `parts`, entries of tables for image rows that come
        before and between them may have no rows either (see `bsjax.masks.launch_order`).
      range_columns: int32 [tables, ranges, fields of `KeyRange`]. From its `first_range` on, a tile
        has first its full ranges (whole multiples of `block_kv`), then its partial ones. Blocks
        step by `block_kv` from a range's start; the last block of a partial range is cut at the end
        of the range. One extra entry lets kernels look one range ahead without leaving the bounds.
      block_q: query rows of a tile, at most; of a stacked tile, pairs of a query row and a head.
      block_kv: keys of a block.
      visibility: what the model itself lets a query see.
      parts: the parts of split tiles of text rows; None if no tile may be split.
      stacked_heads: how many query heads the tiles of text rows stack; 0 if text rows are treated
        like image rows. In prompt order, all rows are stacked.
      launch_columns: int32 [items, fields of `LaunchItem`], what a launch starts for every key
        head, in this order, if heads are stacked; else None, and it starts the first entry of every
        query head's table, then the second of every head's.
      transposed: the `bsjax.masks.transposed.TransposedSchedule`, for gradients on GPUs; or None.
    """

    queries: TokenInfo
    keys: TokenInfo
    groups: Any
    tile_columns: Any
    range_columns: Any
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})
    visibility: Visibility = field(metadata={"static": True})
    parts: Parts | None = None
    stacked_heads: int = field(default=0, metadata={"static": True})
    launch_columns: Any = None
    transposed: Any = None

    @property
    def query_rows(self) -> int:
        """Rows of queries, padding included."""
        return self.queries.position.shape[0]

    @property
    def key_rows(self) -> int:
        """Rows of keys, padding included."""
        return self.keys.position.shape[0]

    @property
    def tiles(self) -> Tile:
        """All tiles: every field is an int32 array [tables, tiles]."""
        return Tile.read(lambda column: self.tile_columns[..., column])

    @property
    def ranges(self) -> KeyRange:
        """All key ranges: both fields are int32 arrays [tables, ranges]."""
        return KeyRange.read(lambda column: self.range_columns[..., column])

    @property
    def launch(self) -> LaunchItem:
        """The launch list, if heads are stacked: every field is an int32 array [items]."""
        return LaunchItem.read(lambda column: self.launch_columns[..., column])

    def grid(self, q_heads: int, kv_heads: int) -> tuple[int, int]:
        """What is launched, if each tile has one program; the first axis runs fastest.

        It is (key heads, items of the launch list), or without one (query heads, tiles).
        """
        if self.launch_columns is None:
            return q_heads, self.tile_columns.shape[1]
        return kv_heads, self.launch_columns.shape[0]


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


class Capacity(NamedTuple):
    """How many entries the arrays of a schedule have room for.

    Attributes:
      tiles: tiles of a table.
      ranges: key ranges of a table.
      items: items of the launch list; without stacked heads there is none.
    """

    tiles: int
    ranges: int
    items: int


def build_schedule(
    template: Template,
    tables: Sequence[KeyGroup | None],
    *,
    block_q: int,
    block_kv: int,
    visibility: Visibility = CAUSAL,
    tokens: int | None = None,
) -> Schedule:
    """The schedule of a whole template: all its tokens are queries and keys.

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
    rows = Rows([template], [Span(0, template.tokens)], packed=uses_packed_order(tables))
    return build_span_schedule(
        rows,
        rows,
        tables,
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
        query_rows=tokens,
        key_rows=tokens,
    )


def build_span_schedule(
    queries: Rows,
    keys: Rows,
    tables: Sequence[KeyGroup | None],
    *,
    block_q: int,
    block_kv: int,
    visibility: Visibility = CAUSAL,
    query_rows: int | None = None,
    key_rows: int | None = None,
    stacked_heads: int = 0,
    capacity: Capacity | None = None,
    most_parts: int = 0,
) -> Schedule:
    """The schedule of any queries and keys.

    Args:
      queries: the query rows, in packed order unless every table keeps all groups. Sinks may stay
        in their images (`Rows.sinks_apart`).
      keys: the key rows, of the same templates, in packed order if the queries are.
      tables: the key groups of each table; None for a table that no head uses, which stays empty.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      visibility: what the model itself lets a query see.
      query_rows: query rows to pad to; None pads nothing.
      key_rows: key rows to pad to; None pads nothing.
      stacked_heads: how many query heads share a key head, if text rows have a table in which tiles
        stack these heads; 0 for no such table. In prompt order, where every head is dense, all rows
        are in that table.
      capacity: the entries that the arrays have room for; by default enough for most templates of
        this many rows. More entries are padded to buckets.
      most_parts: how many parts long tiles of text rows may be split into, all together; 0 splits
        none.

    Raises:
      MaskError: a block size is below 1 or above 65536, or there are more rows than `query_rows` or
        `key_rows`.
    """
    for name, value in (("block_q", block_q), ("block_kv", block_kv)):
        whole_number(name, value, least=1, most=_LARGEST_BLOCK, error=MaskError)
    query_rows = queries.tokens if query_rows is None else query_rows
    key_rows = keys.tokens if key_rows is None else key_rows
    for rows, padded in ((queries, query_rows), (keys, key_rows)):
        if padded < rows.tokens:
            raise MaskError(f"Cannot pad {rows.tokens} tokens to {padded}.")
    spans = [QueryRows(queries, index, keys, visibility) for index in range(len(queries.spans))]
    build = partial(
        _table_of,
        list(zip(spans, queries.first_row, strict=True)),
        tokens=queries.tokens,
        padded=query_rows,
        block_kv=block_kv,
    )
    built = [build(groups, block_q, "images" if stacked_heads else "all") for groups in tables]
    all_groups = [int(groups or 0) for groups in tables]
    if stacked_heads:
        built.append(build(ALL_KEY_GROUPS, max(1, block_q // stacked_heads), "text"))
        all_groups.append(int(ALL_KEY_GROUPS))
    parts = None
    if most_parts and stacked_heads:
        built[-1], parts = _split_long_tiles(built[-1], block_kv, most_parts)
    if capacity is None:
        # Enough for images of 2 * block_q tokens or more, so that nearly all templates padded to
        # the same length share their shapes.
        usual_tiles = bucket(2 * query_rows // block_q + 4, smallest=16, steps=1)
        capacity = Capacity(usual_tiles, 4 * usual_tiles, stacked_heads * usual_tiles)
    most_tiles = max((len(table.tiles) for table in built), default=0)
    # One extra entry, because kernels read the range after a tile's last one.
    most_ranges = 1 + max((len(table.ranges) for table in built), default=0)
    tiles = [table.tiles for table in built]
    room = bucket(most_tiles, smallest=capacity.tiles, steps=1)
    launch = None
    if stacked_heads:
        # Only the kernels whose launches wait for long tiles combine parts. Others may rely on
        # tables without gaps.
        tiles, launch = _in_launch_order(
            tiles, stacked_heads, room, capacity.items, gaps=parts is not None
        )
    return Schedule(
        queries=_padded(queries.info, query_rows),
        keys=_padded(keys.info, key_rows),
        groups=np.asarray(all_groups, np.int32),
        tile_columns=_stack(tiles, room),
        range_columns=_stack(
            [table.ranges for table in built],
            bucket(most_ranges, smallest=capacity.ranges, steps=1),
        ),
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
        parts=parts,
        stacked_heads=stacked_heads,
        launch_columns=launch,
    )


def uses_packed_order(tables: Iterable[KeyGroup | None]) -> bool:
    """Whether any table leaves out a key group, so that packed order pays."""
    return any(groups not in (None, ALL_KEY_GROUPS) for groups in tables)


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
    text_rows = np.append(0, np.cumsum(schedule.queries.image < 0))
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


def share_of_tiles(schedule: Schedule, share: Any, shares: int) -> Schedule:
    """The schedule in which only some tiles of each table have blocks: one share of several.

    Shares have about equally many blocks: in each table, tiles are dealt from longest to shortest,
    back and forth over the shares.

    Args:
      schedule: the schedule; may be traced.
      share: which share; may be traced.
      shares: how many there are.
    """
    turn = np.arange(schedule.tile_columns.shape[1]) % (2 * shares)
    owner = np.minimum(turn, 2 * shares - 1 - turn).astype(np.int32)
    has_blocks = np.isin(Tile._fields, ("full_blocks", "partial_blocks"))
    is_kept = (owner == share)[:, None] | ~has_blocks
    return replace(schedule, tile_columns=schedule.tile_columns * is_kept)


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


def stacked_arrays(*arrays: np.ndarray) -> np.ndarray:
    """Stacks arrays of several schedules on a new leading axis, for `jax.tree.map`.

    Tables of tiles and ranges and launch lists, [..., entries, fields], are padded with zeros to
    the longest one: entries of zeros have no rows. All other arrays have one axis, and one shape.
    """
    if np.ndim(arrays[0]) < 2:
        return np.stack(arrays)
    longest = max(array.shape[-2] for array in arrays)
    none = [(0, 0)] * (arrays[0].ndim - 2)
    return np.stack(
        [np.pad(array, (*none, (0, longest - array.shape[-2]), (0, 0))) for array in arrays]
    )


class _TileRanges(NamedTuple):
    """Key ranges of one segment: the tile, start and end of each."""

    tile: Int[np.ndarray, "ranges"]
    start: Int[np.ndarray, "ranges"]
    end: Int[np.ndarray, "ranges"]


class _SpanTiles(NamedTuple):
    """The tiles of one span: first row and rows of each, and their full and partial ranges."""

    rows: Int[np.ndarray, "tiles 2"]
    full: list[_TileRanges]
    partial: list[_TileRanges]


class _Table(NamedTuple):
    """A table, as columns."""

    tiles: Int[np.ndarray, "tiles fields"]
    ranges: Int[np.ndarray, "ranges bounds"]

    @classmethod
    def of(
        cls, spans: Sequence[_SpanTiles], padding: Int[np.ndarray, "tiles 2"], block_kv: int
    ) -> "_Table":
        """Puts the tiles of all spans into one table, those with the most blocks first.

        Args:
          spans: the tiles of each span.
          padding: first row and rows of the tiles of padding rows.
          block_kv: keys of a block.
        """
        rows = np.concatenate([np.zeros((0, 2), np.int64), *(each.rows for each in spans), padding])
        first_tile = np.cumsum([0, *(len(each.rows) for each in spans)]).tolist()
        full, partial = (
            [
                part._replace(tile=part.tile + first)
                for each, first in zip(spans, first_tile, strict=False)
                for part in parts(each)
            ]
            for parts in (lambda each: each.full, lambda each: each.partial)
        )
        full_blocks = _blocks_per_tile(full, block_kv, len(rows))
        partial_blocks = _blocks_per_tile(partial, block_kv, len(rows))
        order = np.argsort(-(full_blocks + partial_blocks), kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)

        tile = np.concatenate([order[:0], *(rank[part.tile] for part in full + partial)])
        is_partial = np.repeat(
            [0, 1], [sum(len(part.tile) for part in kind) for kind in (full, partial)]
        )
        by_tile = np.argsort(tile * 2 + is_partial, kind="stable")
        ranges = KeyRange(
            np.concatenate([order[:0], *(part.start for part in full + partial)]),
            np.concatenate([order[:0], *(part.end for part in full + partial)]),
        )
        first_range = np.searchsorted(tile[by_tile], np.arange(order.size))
        tiles = Tile(
            rows[:, 0],
            rows[:, 1],
            first_range[rank],
            full_blocks,
            partial_blocks,
            np.full(len(rows), -1),
        )
        return cls(_columns(tiles)[order], _columns(ranges)[by_tile])


def _split_long_tiles(table: _Table, block_kv: int, most_parts: int) -> tuple[_Table, Parts]:
    """Splits tiles that are much longer than the others along their keys.

    Args:
      table: the table of text rows.
      block_kv: keys of a block.
      most_parts: how many parts there may be.
    """
    blocks = Tile.read(lambda column: table.tiles[:, column]).blocks
    most_blocks = _blocks_of_parts(blocks, most_parts)
    tiles, ranges = [table.tiles[blocks <= most_blocks]], [table.ranges]
    parts = Parts(*(np.zeros(most_parts, np.int32) for _ in Parts._fields))
    parts.tile[:] = most_parts
    next_range, next_part = len(table.ranges), 0
    for split, columns in enumerate(table.tiles[blocks > most_blocks].tolist()):
        tile = Tile(*columns)
        # Where each of its blocks begins and ends.
        bounds = []
        index, left = tile.first_range, tile.blocks
        while left:
            start, end = table.ranges[index].tolist()
            starts = range(start, end, block_kv)
            bounds += [(first, min(first + block_kv, end)) for first in starts]
            left -= len(starts)
            index += 1
        count = -(-tile.blocks // most_blocks)
        for first, end in itertools.pairwise(np.linspace(0, tile.blocks, count + 1).astype(int)):
            full = max(0, min(end, tile.full_blocks) - first)
            own = [
                *_united(bounds[first : first + full], block_kv),
                *_united(bounds[first + full : end], block_kv),
            ]
            ranges.append(np.asarray(own, np.int32))
            part = Tile(tile.first_row, tile.rows, next_range, full, end - first - full, next_part)
            tiles.append(np.asarray([part], np.int32))
            for column, value in zip(parts, (split, tile.first_row, tile.rows), strict=True):
                column[next_part] = value
            next_range, next_part = next_range + len(own), next_part + 1
    all_tiles = np.concatenate(tiles)
    order = np.argsort(-Tile.read(lambda column: all_tiles[:, column]).blocks, kind="stable")
    return _Table(all_tiles[order], np.concatenate(ranges)), parts


def _blocks_of_parts(blocks: Int[np.ndarray, "tiles"], most_parts: int) -> int:
    """The most blocks of a part: as few as there may be parts for.

    Where tiles are many, they need no parts: none of them is longer than the others together.
    """
    fewest = max(LONGEST_TILE, -(-int(blocks.sum()) // most_parts))
    most = max(fewest, int(blocks.max(initial=0)))
    while fewest < most:
        middle = (fewest + most) // 2
        longer = blocks[blocks > middle]
        if int((-(-longer // middle)).sum()) <= most_parts:
            most = middle
        else:
            fewest = middle + 1
    return most


def _in_launch_order(
    tables: Sequence[Int[np.ndarray, "_ tile_fields"]],
    heads: int,
    room: int,
    fewest_items: int,
    *,
    gaps: bool,
) -> tuple[list[Int[np.ndarray, "_ tile_fields"]], Int[np.ndarray, "items item_fields"]]:
    """The tiles of all tables, the last of them for text rows, and the launch list.

    Args:
      tables: the tiles of each table, without padding.
      heads: how many query heads share a key head.
      room: how many entries a table has.
      fewest_items: how many items the launch list has room for, or more if they do not suffice.
      gaps: whether tables may have entries without rows between others.
    """
    *images, text = tables
    *blocks, text_blocks = (Tile.read(partial(np.take, own, axis=1)).blocks for own in tables)
    needed = len(text) + heads * max((len(own) for own in images), default=0)
    items = bucket(needed, smallest=fewest_items, steps=1)
    entries = [np.arange(len(own)) for own in images]
    if gaps:
        entries = launch_entries(blocks, min(room, (items - len(text)) // heads))
    spread = [np.zeros((room, len(Tile._fields)), np.int32) for _ in images]
    for all_entries, own, places in zip(spread, images, entries, strict=True):
        all_entries[places] = own
    return [*spread, text], launch_list(blocks, entries, text_blocks, heads, items)


def _united(blocks: Sequence[tuple[int, int]], block_kv: int) -> list[tuple[int, int]]:
    """Joins blocks that follow each other into ranges. A block that is cut short ends its range."""
    ranges: list[tuple[int, int]] = []
    for start, end in blocks:
        if ranges and ranges[-1][1] == start and (start - ranges[-1][0]) % block_kv == 0:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((start, end))
    return ranges


def _table_of(
    spans: Sequence[tuple[QueryRows, int]],
    groups: KeyGroup | None,
    most_rows: int,
    part: Literal["all", "text", "images"],
    *,
    tokens: int,
    padded: int,
    block_kv: int,
) -> _Table:
    """The tiles of all spans for some key groups, and of the padding behind them.

    Args:
      spans: the query rows of each span, and the first of them.
      groups: the key groups; None for a table that stays empty.
      most_rows: query rows of a tile, at most.
      part: which rows have tiles.
      tokens: query rows without padding.
      padded: query rows with padding.
      block_kv: keys of a block.
    """
    if groups is None:
        return _Table.of([], np.zeros((0, 2), np.int64), block_kv)
    parts = [
        _tiles_of_span(span, first_row, groups, most_rows, block_kv, part)
        for span, first_row in spans
    ]
    end = tokens if part == "text" else padded
    padding = np.arange(tokens, end, most_rows)
    padding_tiles = np.stack([padding, np.diff(padding, append=end)], axis=1)
    return _Table.of(parts, padding_tiles, block_kv)


def _tiles_of_span(
    span: QueryRows,
    first_row: int,
    groups: KeyGroup,
    block_q: int,
    block_kv: int,
    part: Literal["all", "text", "images"],
) -> _SpanTiles:
    """The tiles of a span's rows, or of its text rows or image rows only."""
    rows = range(
        span.text_rows if part == "images" else 0,
        span.text_rows if part == "text" else span.tokens,
    )
    starts = span.tile_starts(groups, block_q, rows)
    full: list[_TileRanges] = []
    partial: list[_TileRanges] = []
    if starts.size:
        probes = span.probes(starts, block_q, rows)
        first_probes = np.searchsorted(probes, starts)
        for segment in span.segments:
            seen = span.ranges(segment, groups, probes)
            segment_full, *segment_partial = _cut_ranges(seen, first_probes, block_kv)
            full.append(segment_full)
            partial.extend(segment_partial)
    lengths = np.diff(starts, append=rows.stop)
    return _SpanTiles(np.stack([starts + first_row, lengths], axis=1), full, partial)


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

    bounds = ((full_start, full_end), (start, full_start), (full_end, end))
    kept = [(begin, stop, begin < stop) for begin, stop in bounds]
    full, before, after = (
        _TileRanges(tile[keep], begin[keep], stop[keep]) for begin, stop, keep in kept
    )
    return full, before, after


def _blocks_per_tile(
    parts: Sequence[_TileRanges], block_kv: int, tiles: int
) -> Int[np.ndarray, "tiles"]:
    """How many blocks the ranges of each tile have."""
    blocks = np.zeros(tiles, np.int64)
    for part in parts:
        np.add.at(blocks, part.tile, -(-(part.end - part.start) // block_kv))
    return blocks


def _padded(info: TokenInfo, rows: int) -> TokenInfo:
    """The tokens of all rows, followed by padding."""
    padding = (0, rows - info.position.size)
    return TokenInfo(
        *(
            np.pad(part, padding, constant_values=value)
            for part, value in zip(info, PADDING, strict=True)
        )
    )


def _stack(tables: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks tables of unequal length, padded with zeros to `length`."""
    stacked = np.zeros((len(tables), length, tables[0].shape[1] if tables else 0), np.int32)
    for index, table in enumerate(tables):
        stacked[index, : len(table)] = table
    return stacked
