"""In which order a launch starts the tiles of a schedule whose text rows have a table of their own.

A GPU should start the longest tiles first, or it waits for them at the end. Which table a head uses
differs from layer to layer, and a schedule is for all layers. What it can say is therefore: start
the tiles in entry 3 of the tables for image rows, in every head, and then tile 5 of the text rows.
That is the *launch list*. Each of its items is launched for every key head: an entry of the tables
for image rows is an item for each of the query heads that share a key head, a tile of text rows is
a single one, which stacks these heads. No program is launched for entries that no table has.

Items go by the longest tile that they may be. If each table began with its longest tile, the short
tiles of sparse heads would start between the long ones of dense heads. So tables for image rows
wait for each other, with entries without rows, whose programs end at once: until the others are
down to tiles of their own length. Where there is no room for that, the shortest tiles of all tables
start together; they matter least. If two query heads share a key head,

    entry      0   1   2   3   4   5      text rows: tiles of 40, 40 and 9 blocks
    DENSE     90  89  88   .   .   .      blocks of each tile
    SINK       .   .   .   9   9   8

become this launch list:

    tile       0   0   1   1   2   2   0   1   2   3   3   4   4   5   5
    head       0   1   0   1   0   1  -1  -1  -1   0   1   0   1   0   1
    heads      1   1   1   1   1   1   2   2   2   1   1   1   1   1   1
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

# How much longer than the shortest of them tiles may be that start together, where there is room.
_RATIO = 1.05


class LaunchItem(NamedTuple):
    """What is launched for every key head. Kept in one array, like `bsjax.masks.schedule.Tile`.

    Attributes:
      tile: index of the tile in its table.
      head: which of the query heads that share the key head; its category gives the table. It is -1
        for the table of text rows, whose tiles stack all of them.
      heads: how many query heads the tile stacks: 1 if it is of one head. It is 0 for items after
        the last: an item of zeros has nothing to do.
    """

    tile: Any
    head: Any
    heads: Any

    @classmethod
    def read(cls, column: Callable[[int], Any]) -> "LaunchItem":
        """The item whose fields are `column(0)`, `column(1)` and `column(2)`."""
        return cls(*map(column, range(len(cls._fields))))


def launch_entries(blocks: Sequence[Int[np.ndarray, "_"]], room: int) -> list[Int[np.ndarray, "_"]]:
    """The entry in which each tile of each table for image rows stands.

    Args:
      blocks: the blocks of each table's tiles, most blocks first.
      room: how many entries a table has, enough for all tiles of any of them.

    Returns:
      The entries of each table's tiles, ascending.
    """
    most = max((int(each[0]) for each in blocks if each.size), default=0) or 1
    # Tiles without blocks come after all others.
    classes = [
        (np.log(most / np.maximum(each, 0.5)) / np.log(_RATIO)).astype(np.int64) for each in blocks
    ]
    count = 1 + max((int(each[-1]) for each in classes if each.size), default=0)
    of_class = np.array([np.bincount(each, minlength=count) for each in classes])
    of_class = of_class.reshape(len(blocks), count)
    # The entries before each class, and those of all classes from it on, if in these every table
    # begins with its longest tile.
    before = np.cumsum(np.append(0, of_class.max(axis=0, initial=0)))[:-1]
    rest = np.cumsum(of_class[:, ::-1], axis=1)[:, ::-1].max(axis=0, initial=0)
    last = int(np.flatnonzero(before + rest <= room)[-1])
    entries = []
    for own, each in zip(of_class, classes, strict=True):
        joined = np.minimum(each, last)
        index = np.arange(each.size) - (np.cumsum(own) - own)[joined]
        entries.append(before[joined] + index)
    return entries


def launch_list(
    blocks: Sequence[Int[np.ndarray, "_"]],
    entries: Sequence[Int[np.ndarray, "_"]],
    text_blocks: Int[np.ndarray, "text_tiles"],
    heads: int,
    room: int,
) -> Int[np.ndarray, "items fields"]:
    """The launch list, those items first that may have the most blocks.

    Args:
      blocks: the blocks of each tile, for each table for image rows.
      entries: the entry in which it stands.
      text_blocks: the blocks of each tile of text rows, most blocks first.
      heads: how many query heads share a key head.
      room: how many items there is room for, enough for all.

    Returns:
      int32, the fields of `LaunchItem` as columns, padded with items of zeros.
    """
    longest = np.full(1 + max((int(each[-1]) for each in entries if each.size), default=-1), -1)
    for own, places in zip(blocks, entries, strict=True):
        np.maximum.at(longest, places, own)
    used = np.flatnonzero(longest >= 0)
    text_tiles = np.arange(text_blocks.size)
    # The heads of an entry stay next to each other: they read the same keys at about the same time.
    items = LaunchItem(
        np.append(text_tiles, np.repeat(used, heads)),
        np.append(np.full(text_tiles.size, -1), np.tile(np.arange(heads), used.size)),
        np.append(np.full(text_tiles.size, heads), np.ones(used.size * heads, np.int64)),
    )
    order = np.argsort(-np.append(text_blocks, np.repeat(longest[used], heads)), kind="stable")
    columns = np.zeros((room, len(LaunchItem._fields)), np.int32)
    columns[: order.size] = np.stack(items, axis=1)[order]
    return columns
