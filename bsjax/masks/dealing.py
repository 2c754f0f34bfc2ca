"""Deals query rows to devices: each has as many, and about as much attention to compute.

Rows are dealt in *pieces*: consecutive rows of one image or of the text, as many as a tile has. The
pieces that visit the most blocks are dealt first, each to the device that has the fewest blocks so
far and room for it. Dense prompts, in which all pieces are alike, have larger pieces.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.query_rows import QueryRows
from bsjax.masks.rows import Rows
from bsjax.masks.visibility import Visibility


class Attending(NamedTuple):
    """What the layers of one kind see of the queries that are dealt.

    Attributes:
      keys: the key rows.
      visibility: what the model itself lets a query see.
      heads: how many heads of these layers have each `HeadCategory`.
    """

    keys: Rows
    visibility: Visibility
    heads: Int[np.ndarray, "categories"]


class Dealt(NamedTuple):
    """The rows of each device.

    Attributes:
      rows: the query rows of each device, ascending.
      blocks: the blocks that each device visits, in all layers and heads.
    """

    rows: list[Int[np.ndarray, "_"]]
    blocks: Int[np.ndarray, "devices"]


def deal(
    queries: Rows,
    attending: Sequence[Attending],
    devices: int,
    most_rows: int,
    *,
    block_q: int,
    block_kv: int,
    stacked_heads: int,
) -> Dealt:
    """Deals all query rows.

    Args:
      queries: the rows, of all spans.
      attending: what they see, for each kind of layers.
      devices: how many devices there are.
      most_rows: the most rows of a device. All of them together have room for all rows.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      stacked_heads: how many query heads the tiles of text rows stack.
    """
    pieces = partial(_pieces, queries, attending, block_q, block_kv, stacked_heads)
    nothing = (np.arange(0),) * 3
    spans = [
        index
        for index in range(len(queries.spans))
        if queries.position[queries.rows_of(index)].size
    ]
    first, length, blocks = (
        np.concatenate(column) for column in zip(nothing, *map(pieces, spans), strict=True)
    )
    of_device: list[list[tuple[int, int]]] = [[] for _ in range(devices)]
    room, visited = np.full(devices, most_rows), np.zeros(devices)
    for piece in np.argsort(-blocks, kind="stable").tolist():
        begin, left = int(first[piece]), int(length[piece])
        while left:
            # If no device has room for all of the piece, it is cut.
            fits = room >= min(left, int(room.max()))
            device = int(np.argmin(np.where(fits, visited, np.inf)))
            taken = min(left, int(room[device]))
            of_device[device].append((begin, begin + taken))
            room[device] -= taken
            visited[device] += blocks[piece]
            begin, left = begin + taken, left - taken
    rows = [
        np.concatenate([np.arange(0), *(np.arange(*piece) for piece in sorted(pieces))])
        for pieces in of_device
    ]
    return Dealt(rows, visited.astype(np.int64))


def _pieces(
    queries: Rows,
    attending: Sequence[Attending],
    block_q: int,
    block_kv: int,
    stacked_heads: int,
    index: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First row, rows and blocks of the pieces of one span."""
    before = queries.rows_of(index).start
    image = queries.info.image[queries.rows_of(index)]
    text_rows = max(1, block_q // stacked_heads)
    if queries.packed:
        borders = np.flatnonzero(np.append(-2, image[:-1]) != image).tolist()
        steps = np.where(image[borders] < 0, text_rows, block_q).tolist()
    else:
        borders, steps = [0], [text_rows * stacked_heads]
    first = [np.arange(0)]
    for start, end, step in zip(borders, [*borders[1:], image.size], steps, strict=True):
        if queries.packed:  # As many as there are tiles, and equally long, so that they fit.
            step = -(-(end - start) // -(-(end - start) // step))
        first.append(np.arange(start, end, step))
    first = np.concatenate(first)
    length = np.diff(first, append=image.size)
    full = np.asarray(steps)[np.searchsorted(borders, first, side="right") - 1]
    blocks = np.zeros(first.size)
    for keys, visibility, heads in attending:
        rows = QueryRows(queries, index, keys, visibility)
        is_text = (rows.image[first] < 0) & queries.packed
        for category, count in zip(HeadCategory, heads.tolist(), strict=True):
            if count:
                seen = _blocks(rows, category.groups, first, length, block_kv)
                if category.groups == ALL_KEY_GROUPS:
                    # Tiles of dense heads are full: short pieces share one.
                    seen = seen * length / full
                blocks += count * np.where(is_text, 0, seen)
        seen = _blocks(rows, ALL_KEY_GROUPS, first, length, block_kv)
        blocks += int(heads.sum()) // stacked_heads * np.where(is_text, seen, 0)
    return first + before, length, blocks


def _blocks(
    rows: QueryRows,
    groups: KeyGroup,
    first: Int[np.ndarray, "pieces"],
    length: Int[np.ndarray, "pieces"],
    block_kv: int,
) -> Int[np.ndarray, "pieces"]:
    """The blocks from the first key that a piece's first row sees to the last row's last key."""
    blocks = np.zeros(first.size, np.int64)
    for segment in rows.segments:
        begins = rows.ranges(segment, groups, first)
        ends = rows.ranges(segment, groups, first + length - 1)
        keys = np.maximum(ends.high - begins.low, 0)
        blocks += np.where(
            (ends.high > ends.low) | (begins.high > begins.low), -(-keys // block_kv), 0
        )
    return blocks
