"""The transposed schedule: which query rows see each tile of keys, for the gradients of keys.

A schedule says which keys a tile of query rows visits. The gradient of a key needs the query rows
that see it. Keys are therefore divided into tiles of their own, and a key tile visits ranges of
query rows:

    the schedule: two tiles        . . F F F p . .        keys, in blocks that are key tiles here
    of query rows                  . . F F F F p .

    transposed: each key tile      . . F F F p . .        a run of rows in each column: rows of both
    (a column) visits its rows     . . F F F F p .        tiles, full, in the three columns of two F

A run of rows is *full* if all of them see all keys of the tile. In all others the predicate decides
pair by pair, as in partial blocks of a schedule. This is exact because what a schedule does not
visit is invisible, and no key tile has keys of two conversations.

Key tiles that are seen by many more rows than others, such as those of text in sparse heads, are
split into several entries, whose results are added up.

Everything here is NumPy on the host, and takes memory linear in the number of rows and keys.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int

from bsjax.masks.schedule import KeyRange, Schedule, Tile, bucket

BLOCK = 64
"""Keys of a tile, and query rows of a block."""

LONGEST = 128
"""A key tile that visits more blocks than this may be split."""

_PARTIAL, _FULL = 1, 2


class KeyTile(NamedTuple):
    """Keys that are processed together, and the ranges of query rows that they visit.

    The fields are the columns of an int32 array, like those of `bsjax.masks.schedule.Tile`.

    Attributes:
      first_key: first key row.
      keys: number of keys; 0 for an entry after the last tile.
      first_range: index of the tile's first range.
      full_blocks: blocks of query rows in its full ranges.
      partial_blocks: blocks of query rows in its partial ranges, which follow the full ones.
    """

    first_key: Any
    keys: Any
    first_range: Any
    full_blocks: Any
    partial_blocks: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class TransposedSchedule:
    """The tiles of all key rows, and the ranges of query rows that they visit, as a pytree.

    Attributes:
      tile_columns: int32 [tables, entries, fields of `KeyTile`], the longest first. An entry is of
        the same keys in all tables. Every key that is not padding is in one tile, and a tile is one
        entry or, if it is split, several.
      range_columns: int32 [ranges, fields of `KeyRange`], ranges of query rows, of all tables. From
        its `first_range` on, an entry has first its full ranges (whole multiples of `block_q`),
        then its partial ones, and one extra range follows the last, as in `Schedule`.
      block_q: query rows of a block.
      block_kv: keys of a tile, at most.
    """

    tile_columns: Any
    range_columns: Any
    block_q: int = field(metadata={"static": True})
    block_kv: int = field(metadata={"static": True})

    @property
    def tiles(self) -> KeyTile:
        """All entries: every field is an int32 array [tables, entries]."""
        return KeyTile(*(self.tile_columns[..., index] for index in range(len(KeyTile._fields))))


def with_transposed(schedule: Schedule, block: int = BLOCK) -> Schedule:
    """The schedule, with its transposed schedule for gradients.

    Args:
      schedule: with NumPy arrays, and without split tiles.
      block: keys of a key tile, and query rows of a block.
    """
    return replace(schedule, transposed=transposed_schedule(schedule, block))


def transposed_schedule(schedule: Schedule, block: int = BLOCK) -> TransposedSchedule:
    """The transposed schedule; arguments as for `with_transposed`."""
    first_key, last_key = _key_tiles(schedule, block)
    tables = range(len(schedule.groups))
    if schedule.stacked_heads:
        # In every head, text rows are those of the last table.
        *of_images, of_text = tables
        sources = [(table, of_text) for table in of_images]
    else:
        sources = [(table,) for table in tables]
    ranges = [_row_ranges(schedule, source, first_key, last_key, block) for source in sources]
    return _assembled(ranges, first_key, last_key, block)


class _RowRanges(NamedTuple):
    """The ranges of query rows that one key tile visits in one table: (start, end) of each."""

    full: list[tuple[int, int]]
    partial: list[tuple[int, int]]

    def blocks(self, block: int) -> tuple[int, int]:
        """How many blocks of rows are full, and how many are partial."""
        full, partial = (
            sum(-(-(end - start) // block) for start, end in ranges) for ranges in self
        )
        return full, partial

    def cut(self, first: int, last: int, block: int) -> "_RowRanges":
        """Blocks [first, last) of them, the full ones being the first."""
        full, _ = self.blocks(block)
        return _RowRanges(
            _cut(self.full, first, last, block),
            _cut(self.partial, first - full, last - full, block),
        )


def _cut(ranges: list[tuple[int, int]], first: int, last: int, block: int) -> list[tuple[int, int]]:
    kept = []
    for start, end in ranges:
        blocks = -(-(end - start) // block)
        low, high = max(first, 0), min(last, blocks)
        if low < high:
            kept.append((start + low * block, min(start + high * block, end)))
        first, last = first - blocks, last - blocks
    return kept


def _key_tiles(
    schedule: Schedule, block: int
) -> tuple[Int[np.ndarray, "key_tiles"], Int[np.ndarray, "key_tiles"]]:
    """Start and end of each key tile: none has keys of two conversations, or padding."""
    conversation = np.asarray(schedule.keys.conversation)
    borders = np.flatnonzero(np.diff(conversation)) + 1
    starts, ends = np.append(0, borders), np.append(borders, conversation.size)
    tiles = [
        (first, min(first + block, end))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        if start < end and conversation[start] >= 0
        for first in range(start, end, block)
    ]
    columns = np.asarray(tiles, np.int64).reshape(-1, 2)
    return columns[:, 0], columns[:, 1]


def _row_ranges(
    schedule: Schedule,
    tables: tuple[int, ...],
    first_key: Int[np.ndarray, "key_tiles"],
    last_key: Int[np.ndarray, "key_tiles"],
    block: int,
) -> list[_RowRanges]:
    """What each key tile visits in a head that uses `tables`.

    Goes through the tiles of query rows in order, and keeps for each key tile whether the current
    rows see all of it, or some, and since which row that is so.
    """
    kind = np.zeros(first_key.size, np.int8)
    since = np.zeros(first_key.size, np.int64)
    runs: list[_RowRanges] = [_RowRanges([], []) for _ in first_key]

    def end_runs(changed: Int[np.ndarray, "changed"], row: int) -> None:
        for tile in changed[kind[changed] > 0].tolist():
            start = int(since[tile])
            whole = start
            if kind[tile] == _FULL:
                whole += (row - start) // block * block
                if whole > start:
                    runs[tile].full.append((start, whole))
            if whole < row:
                partial = runs[tile].partial
                if partial and partial[-1][1] == whole:
                    partial[-1] = (partial[-1][0], row)
                else:
                    partial.append((whole, row))
        since[changed] = row

    last_row = 0
    for tile, ranges in _tiles_in_row_order(schedule, tables):
        if tile.first_row != last_row:
            end_runs(np.arange(kind.size), last_row)
            kind[:] = 0
        now = np.zeros_like(kind)
        for start, end, full in ranges:
            some = slice(np.searchsorted(last_key, start, "right"), np.searchsorted(first_key, end))
            now[some] = np.maximum(now[some], _PARTIAL)
            if full:
                first, last = (
                    np.searchsorted(first_key, start),
                    np.searchsorted(last_key, end, "right"),
                )
                now[first:last] = _FULL
        end_runs(np.flatnonzero(now != kind), tile.first_row)
        since[now != kind] = tile.first_row
        kind, last_row = now, tile.first_row + tile.rows
    end_runs(np.arange(kind.size), last_row)
    return runs


def _tiles_in_row_order(
    schedule: Schedule, tables: tuple[int, ...]
) -> Iterator[tuple[Tile, list[tuple[int, int, bool]]]]:
    """The tiles of some tables, and start, end and whether it is full of each of their ranges."""
    columns = np.concatenate([np.asarray(schedule.tile_columns[table]) for table in tables])
    table = np.repeat(tables, schedule.tile_columns.shape[1])
    tiles = Tile.read(lambda column: columns[:, column])
    order = np.argsort(tiles.first_row, kind="stable")
    for index in order[tiles.rows[order] > 0].tolist():
        tile = Tile(*columns[index].tolist())
        ranges = []
        blocks, next_range = 0, tile.first_range
        while blocks < tile.blocks:
            start, end = schedule.range_columns[table[index], next_range].tolist()
            ranges.append((start, end, blocks < tile.full_blocks))
            blocks += -(-(end - start) // schedule.block_kv)
            next_range += 1
        yield tile, ranges


def _assembled(
    tables: list[list[_RowRanges]],
    first_key: Int[np.ndarray, "key_tiles"],
    last_key: Int[np.ndarray, "key_tiles"],
    block: int,
) -> TransposedSchedule:
    """The arrays, with long tiles split and padded to buckets."""
    blocks = np.zeros(first_key.size, np.int64)
    for table in tables:
        of_tiles = [sum(ranges.blocks(block)) for ranges in table]
        blocks = np.maximum(blocks, np.asarray(of_tiles, np.int64))
    # All quotients blocks / most_blocks add up to at most half the number of tiles.
    most_blocks = max(LONGEST, -(-2 * int(blocks.sum()) // max(1, blocks.size)))
    entries = [
        (tile, part, parts)
        for tile, parts in enumerate(np.maximum(1, -(-blocks // most_blocks)).tolist())
        for part in range(parts)
    ]
    entries.sort(key=lambda entry: -blocks[entry[0]] / entry[2])

    # Room for as many parts as there can be.
    room = bucket(3 * -(-int(last_key.max(initial=0)) // block) // 2 + 4, smallest=16)
    most_entries = max(room, bucket(len(entries), smallest=16))
    tiles = np.zeros((len(tables), most_entries, len(KeyTile._fields)), np.int32)
    row_ranges: list[tuple[int, int]] = []
    for columns, table in zip(tiles, tables, strict=True):
        for index, (tile, part, parts) in enumerate(entries):
            of_tile = sum(table[tile].blocks(block))
            own = table[tile].cut(of_tile * part // parts, of_tile * (part + 1) // parts, block)
            first, last = first_key[tile], last_key[tile]
            columns[index] = KeyTile(first, last - first, len(row_ranges), *own.blocks(block))
            row_ranges += [*own.full, *own.partial]
    ranges = bucket(len(row_ranges) + 1, smallest=4 * room * len(tables), steps=1)
    range_columns = np.zeros((ranges, len(KeyRange._fields)), np.int32)
    range_columns[: len(row_ranges)] = np.reshape(row_ranges, (-1, 2))
    return TransposedSchedule(tiles, range_columns, block_q=block, block_kv=block)
