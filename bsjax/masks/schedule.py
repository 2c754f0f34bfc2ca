"""From a template to the work of a kernel: tiles of query rows, and the key ranges each must visit.

Rows are tokens in the schedule's own order: packed order, or prompt order when every head is dense.
In either order the rows of one *key segment* (text, sinks, the rest; or all rows at once in prompt
order) stand by position, so a query row sees at most one contiguous range [low, high) of each
segment, and neither end ever decreases from one row of a segment to the next:

    first row of a tile    . . # # # # # # # # . . . .     [low, high) of the first row
    ...                    . . . # # # # # # # # . . .
    last row of the tile   . . . . # # # # # # # # # .     [low, high) of the last row
    the tile's range           p p F F F F F F p p p       in blocks of two keys: one partial, three
                                                           full, two partial (the last one cut)

Blocks inside [low of the last row, high of the first row) are seen whole by every row: *full*, no
element mask. The others are *partial*: the predicate decides pair by pair. Where consecutive rows
of a tile leave keys between their ranges that neither of them sees, the tile gets several ranges.

Everything here is NumPy on the host. Nothing is ever as large as tokens x tokens or blocks x
blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bsjax.checks import whole_number
from bsjax.errors import MaskError
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.template import Template
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility

PADDING_POSITION = np.iinfo(np.int32).max
TILE_WINDOWS = 4
"""Positions that a tile of a packed schedule with a window spans at most, in windows (in lengths of
a tile, where these are longer)."""


class Tile(NamedTuple):
    """Query rows that one kernel program does, and which key ranges it visits.

    Schedules keep tiles as columns of one int32 array, so that a kernel reads a tile from one place
    in memory; the fields here are those columns, in order. They are scalars for one tile, arrays
    for many.

    Attributes:
      first_row: first query row.
      rows: how many rows; 0 for an entry after a table's last tile.
      first_range: where the tile's ranges start among those of its table.
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
    """Consecutive keys that a tile visits, in key rows. Stored like `Tile`, as columns.

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
    """What attention over one template has to visit. A pytree: arrays are inputs, never constants.

    Arrays are padded to buckets, so that a template of like size has the same shapes and compiles
    nothing. A query head uses the table that its `head_category` names.

    Attributes:
      position: int32 [tokens], prompt index of each row; the greatest int32 for padding rows.
      image: int32 [tokens], image number of each row; -1 for text and padding.
      sink: bool [tokens], whether the row is a sink token.
      groups: int32 [tables], the `KeyGroup` bits of each table.
      tile_columns: int32 [tables, tiles, fields of `Tile`], tiles with most blocks first. Every row
        is in exactly one tile of each table, padding rows in tiles without blocks. Entries after a
        table's last tile have no rows.
      range_columns: int32 [tables, ranges, fields of `KeyRange`]. From its `first_range` on, a tile
        has first its full ranges (whole multiples of `block_kv`), then its partial ones. Blocks
        step by `block_kv` from a range's start; the last block of a partial range is cut at its
        end. There is one entry more than any tile uses, so that looking one ahead stays in bounds.
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
    """The least size of a coarse grid that holds `size`: `steps` sizes between powers of two.

    Shapes drawn from the grid keep the number of compiled programs small; `steps` trades programs
    against padding (4 steps: at most 25 % more than asked for).
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
    """Computes tiles and ranges of a template for several sets of key groups.

    Args:
      template: the prompt.
      tables: the key groups of each table; None leaves a table empty, for sets no head uses.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      visibility: what the model itself lets a query see.
      tokens: rows to pad to; None pads nothing.

    Returns:
      The schedule, in prompt order if every table keeps all groups, else in packed order.

    Raises:
      MaskError: a block size below 1, or fewer `tokens` than the template has.
    """
    for name, value in (("block_q", block_q), ("block_kv", block_kv)):
        whole_number(name, value, least=1, error=MaskError)
    tokens = template.tokens if tokens is None else tokens
    if tokens < template.tokens:
        raise MaskError(f"Cannot pad a template of {template.tokens} tokens to {tokens}.")

    rows = _Rows(template, tables, visibility)
    built = [_build_table(rows, groups, block_q, block_kv, tokens) for groups in tables]
    # Room for images down to twice block_q: nearly all templates padded to one length share shapes.
    usual_tiles = bucket(2 * tokens // block_q + 4, smallest=16, steps=1)
    max_tiles = bucket(
        max((len(tiles) for tiles, _ in built), default=0), smallest=usual_tiles, steps=1
    )
    # One entry more than is used keeps `first_range + 1` in bounds.
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
    """Tables indexed by `HeadCategory`; those that `categories` do not use are None."""
    used = set(np.unique(np.asarray(categories)).tolist())
    return [category.groups if category in used else None for category in HeadCategory]


def without_text_queries(schedule: Schedule, tables: Iterable[int]) -> Schedule:
    """A packed schedule whose text rows visit no block in some of its tables.

    Text queries see everything whatever the table. Where several tables are combined, the rows of
    the text need to be computed in one of them only; in the others they come out as rows that see
    nothing.

    Args:
      schedule: in packed order, as NumPy arrays.
      tables: indices of the tables that leave text rows out.

    Raises:
      MaskError: the schedule is in prompt order, where a tile may hold rows of text and of images.
    """
    text_rows = np.append(0, np.cumsum(schedule.image < 0))
    changed = replace(schedule, tile_columns=schedule.tile_columns.copy())
    for table in tables:
        tiles = Tile(*(field[table] for field in changed.tiles))
        of_text = text_rows[tiles.first_row + tiles.rows] - text_rows[tiles.first_row]
        if np.any((of_text > 0) & (of_text < tiles.rows)):
            raise MaskError(
                "Only a schedule in packed order can leave out its text rows: this one has tiles "
                "with rows of text and of images."
            )
        # The fields are views of the columns.
        tiles.full_blocks[of_text > 0] = 0
        tiles.partial_blocks[of_text > 0] = 0
        # Tiles with most blocks first, entries without rows last, as in any table.
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
    """The schedule of ragged full attention: rows see all rows of their own segment, and no others.

    This is what a vision tower does, per image or per window: heads are INTRA_IMAGE over a template
    that holds nothing but images.

    Args:
      lengths: rows of each segment, each at least 1, in the order in which they stand.
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


def visible_pairs(template: Template, groups: KeyGroup, visibility: Visibility = CAUSAL) -> int:
    """How many (query, key) pairs a head that keeps `groups` sees, exactly."""
    rows = _Rows(template, [groups], visibility)
    every_row = np.arange(rows.tokens)
    ranges = [rows.ranges(segment, groups, every_row) for segment in rows.segments]
    return sum(int((high - low).sum(dtype=np.int64)) for low, high in ranges)


class _Segment(NamedTuple):
    """Key rows that stand by position: which of them a row sees is one range."""

    first_row: int
    last_row: int
    before: Int[np.ndarray, "tokens+1"]
    """First key row of the segment at or after each prompt position."""
    own: KeyGroup
    """The group its keys are in for queries of their own image (all groups: whatever the query)."""
    other: KeyGroup
    """The group its keys are in for all other image queries."""


class _Rows:
    """Query rows in the order of a schedule, and the key ranges each of them sees."""

    def __init__(
        self,
        template: Template,
        tables: Sequence[KeyGroup | None],
        visibility: Visibility,
    ) -> None:
        self.tokens = template.tokens
        self.packed = any(groups not in (None, ALL_KEY_GROUPS) for groups in tables)
        if self.packed:
            text = template.image < 0
            parts = [
                (text, KeyGroup.TEXT, KeyGroup.TEXT),
                (template.sink, KeyGroup.OWN_SINK, KeyGroup.OTHER_SINK),
                (~text & ~template.sink, KeyGroup.OWN, KeyGroup.OTHER),
            ]
            self.order = template.packed_order
        else:
            parts = [(np.ones(self.tokens, bool), ALL_KEY_GROUPS, ALL_KEY_GROUPS)]
            self.order = np.arange(self.tokens, dtype=np.int32)
        self.image = template.image[self.order]
        # First rows of the runs of one image's, or the text's, rows.
        self.runs = np.flatnonzero(np.append(-2, self.image[:-1]) != self.image)

        self.segments: list[_Segment] = []
        first_row = 0
        for member, own, other in parts:
            before = np.zeros(self.tokens + 1, np.int32)
            np.cumsum(member, out=before[1:])
            last_row = first_row + int(before[-1])
            self.segments.append(_Segment(first_row, last_row, before + first_row, own, other))
            first_row = last_row

        self._visibility = visibility
        self._image_first = template.image_first
        self._image_end = template.image_first + np.asarray(template.image_tokens, np.int64)

    def ranges(
        self, segment: _Segment, groups: KeyGroup, rows: Int[np.ndarray, "rows"]
    ) -> "_RowRanges":
        """The range of the segment's key rows that each of `rows` sees when it keeps `groups`."""
        position, image = self.order[rows], self.image[rows]
        is_image = image >= 0
        begin = np.zeros_like(position)
        if self._visibility.window is not None:
            begin = np.maximum(position + 1 - self._visibility.window, 0)
        end = position + 1
        if self._visibility.bidirectional_images and self._image_end.size:
            end = np.where(is_image, self._image_end[image], end)
        low, high = segment.before[begin], segment.before[end]
        own, other = bool(groups & segment.own), bool(groups & segment.other)
        if not (own and other) and self._image_first.size:
            # Text rows index the last image here, and keep what they have.
            image_first = segment.before[self._image_first[image]]
            if own:
                low = np.where(is_image, np.maximum(low, image_first), low)
            elif other:
                high = np.where(is_image, np.minimum(high, image_first), high)
            else:
                high = np.where(is_image, low, high)
        return _RowRanges(low, np.maximum(low, high))

    def probes(self, starts: Int[np.ndarray, "tiles"], block_q: int) -> Int[np.ndarray, "probes"]:
        """Rows whose ranges tell those of all rows of their tile.

        Inside one image, and inside the text, rows start at the same key unless there is a window:
        what the first and the last row see is what all of them see together.

        With a window that holds while positions are consecutive and the window's far end moves
        inside one run of a segment's keys, or past keys of others alone: each end of the range then
        stands still or goes on by one key a row. Both go on where the window has one run's keys
        only, and the last row's range begins where the first row's ends, or before, as a tile has
        no more rows than the window has positions. Else every row is probed.
        """
        if not self.tokens:
            return np.arange(0)
        first = np.concatenate([starts, self.runs])
        if self._visibility.window is not None:
            if self._visibility.window < block_q:
                return np.arange(self.tokens)
            # Rows whose window begins where an image, a run of sinks, of other image tokens or of
            # text does. Those of one segment and image stand together in either order.
            begins = np.sort(self.order[np.append(0, self._steps)])
            far = begins + self._visibility.window - 1
            enters = self._row_at[far[far < self.tokens]]
            first = np.concatenate([first, self._steps, enters, enters + 1])
            first = first[first < self.tokens]
        return np.unique(np.concatenate([first, first[first > 0] - 1, [self.tokens - 1]]))

    @cached_property
    def _steps(self) -> Int[np.ndarray, "steps"]:
        """Rows whose position does not follow that of the row before."""
        return np.flatnonzero(np.diff(self.order) != 1) + 1

    @cached_property
    def _row_at(self) -> Int[np.ndarray, "tokens"]:
        """The row of each prompt position."""
        row = np.empty(self.tokens, np.int64)
        row[self.order] = np.arange(self.tokens)
        return row

    def tile_starts(self, groups: KeyGroup, block_q: int) -> Int[np.ndarray, "tiles"]:
        """First rows of all tiles: sparse tables never put two images' rows into one tile.

        Sink rows are the exception: images have few of them, and they share most of their keys.

        With a window, what rows far apart see has nothing in common. In packed order a tile of sink
        rows would reach over the whole prompt, and visit all of it when the other tiles are long
        done: tiles end where a span of `TILE_WINDOWS` does.
        """
        if not self.tokens:
            return np.zeros(0, np.int64)
        borders = [np.asarray([segment.first_row for segment in self.segments])]
        if groups != ALL_KEY_GROUPS:
            borders.append(self.runs[self.runs >= self.segments[-1].first_row])
        if self.packed and self._visibility.window is not None:
            span = self.order // (TILE_WINDOWS * max(self._visibility.window, block_q))
            borders.append(np.flatnonzero(np.diff(span)) + 1)
        starts = np.unique(np.concatenate(borders))
        starts = starts[starts < self.tokens]
        lengths = np.diff(starts, append=self.tokens)
        tiles = -(-lengths // block_q)
        index_in_run = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        return np.repeat(starts, tiles) + index_in_run * block_q


class _RowRanges(NamedTuple):
    """For one key segment: the key rows [low, high) that each of some query rows sees."""

    low: Int[np.ndarray, "rows"]
    high: Int[np.ndarray, "rows"]


class _TileRanges(NamedTuple):
    """Key ranges of one segment: the tile each belongs to, and where it starts and ends."""

    tile: Int[np.ndarray, "ranges"]
    start: Int[np.ndarray, "ranges"]
    end: Int[np.ndarray, "ranges"]


def _build_table(
    rows: _Rows, groups: KeyGroup | None, block_q: int, block_kv: int, tokens: int
) -> tuple[Int[np.ndarray, "tiles fields"], Int[np.ndarray, "ranges bounds"]]:
    """Tiles and ranges of one table."""
    if groups is None:
        empty = np.zeros(0, np.int32)
        return _columns(Tile.read(lambda _: empty)), _columns(KeyRange(empty, empty))
    starts = rows.tile_starts(groups, block_q)
    probes = rows.probes(starts, block_q)
    first_probes = np.searchsorted(probes, starts)
    full: list[_TileRanges] = []
    partial: list[_TileRanges] = []
    for segment in rows.segments:
        if segment.first_row < segment.last_row:
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
    """The fields next to each other, as a schedule keeps them."""
    return np.stack(fields, axis=1).astype(np.int32)


def _cut_ranges(
    seen: _RowRanges, starts: Int[np.ndarray, "tiles"], block_kv: int
) -> tuple[_TileRanges, _TileRanges, _TileRanges]:
    """Unites the rows' ranges tile by tile; cuts each union: full, and before and after it."""
    low, high = seen
    last_rows = np.append(starts[1:], low.size) - 1
    starts_range = np.zeros(low.size, bool)
    starts_range[1:] = low[1:] > high[:-1]
    starts_range[starts] = True
    first = np.flatnonzero(starts_range)
    last = np.append(first[1:], low.size) - 1
    start, end = low[first].astype(np.int64), high[last].astype(np.int64)
    tile = np.searchsorted(starts, first, side="right") - 1

    # A tile with several unions has no key that all its rows see: its [seen_low, seen_high) is
    # empty.
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
    """Blocks of all ranges, summed by tile."""
    blocks = np.zeros(tiles, np.int64)
    for part in parts:
        np.add.at(blocks, part.tile, -(-(part.end - part.start) // block_kv))
    return blocks


def _stack(tables: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Stacks tables of unequal length, zeros after their ends."""
    stacked = np.zeros((len(tables), length, tables[0].shape[1] if tables else 0), np.int32)
    for index, table in enumerate(tables):
        stacked[index, : len(table)] = table
    return stacked
