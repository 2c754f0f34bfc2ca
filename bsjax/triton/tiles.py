"""What kernels that walk a schedule share: a program's tile, its rows, and the next block."""

from typing import no_type_check

import triton
import triton.language as tl

from bsjax.masks.launch_order import LaunchItem
from bsjax.masks.schedule import KeyRange, Tile

TILE_COLUMNS = tl.constexpr(len(Tile._fields))
FIRST_ROW = tl.constexpr(Tile._fields.index("first_row"))
ROWS = tl.constexpr(Tile._fields.index("rows"))
FIRST_RANGE = tl.constexpr(Tile._fields.index("first_range"))
FULL_BLOCKS = tl.constexpr(Tile._fields.index("full_blocks"))
PARTIAL_BLOCKS = tl.constexpr(Tile._fields.index("partial_blocks"))
PART = tl.constexpr(Tile._fields.index("part"))
ITEM_COLUMNS = tl.constexpr(len(LaunchItem._fields))
ITEM_TILE = tl.constexpr(LaunchItem._fields.index("tile"))
ITEM_HEAD = tl.constexpr(LaunchItem._fields.index("head"))
ITEM_HEADS = tl.constexpr(LaunchItem._fields.index("heads"))
RANGE_COLUMNS = tl.constexpr(len(KeyRange._fields))
START = tl.constexpr(KeyRange._fields.index("start"))
END = tl.constexpr(KeyRange._fields.index("end"))


@triton.jit
@no_type_check
def tile_of_program(
    head_category,
    launch,
    tiles,
    tile_count,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STACKED: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    PROGRAMS_PER_TILE: tl.constexpr,
):
    """The tile of a program of the grid (query heads, tiles).

    With stacked heads, the grid is (key heads, items of the launch list).

    Returns its table, a pointer to it, its key head, its first query head, the number of query
    heads that it stacks, and how many of its rows belong to earlier programs.
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    head = tl.program_id(0)
    tile_index = tl.program_id(1) // PROGRAMS_PER_TILE
    earlier = (tl.program_id(1) % PROGRAMS_PER_TILE) * BLOCK_Q
    if STACKED:
        item = launch + tile_index * ITEM_COLUMNS
        tile_index = tl.load(item + ITEM_TILE)
        head_of_group = tl.load(item + ITEM_HEAD)
        heads = tl.load(item + ITEM_HEADS)
        kv_head = head
        first_head = kv_head * GROUP + tl.maximum(head_of_group, 0)
        of_head = tl.load(head_category + first_head)
        table = tl.where(head_of_group < 0, TABLES - 1, of_head)
    else:
        kv_head = head // GROUP
        first_head = head
        heads = 1
        table = tl.load(head_category + head)
    tile = tiles + (table * tile_count + tile_index) * TILE_COLUMNS
    return table, tile, kv_head, first_head, heads, earlier


@triton.jit
@no_type_check
def load_heads(
    rows, offsets, mask, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr
):
    """Both blocks of channels of the heads at some offsets; the second is the first if it is alone.

    `mask` says which of them to read; None reads all.
    """
    first = _load(rows, offsets, mask, HEAD_DIM, 0, FIRST)
    second = first
    if SECOND > 0:
        second = _load(rows, offsets, mask, HEAD_DIM, FIRST, SECOND)
    return first, second


@triton.jit
@no_type_check
def _load(
    rows, offsets, mask, HEAD_DIM: tl.constexpr, START_OF_BLOCK: tl.constexpr, SIZE: tl.constexpr
):
    """Channels from START_OF_BLOCK on; those beyond the head are 0."""
    columns = tl.arange(0, SIZE)
    pointers = rows + (offsets[:, None] + (START_OF_BLOCK + columns)[None, :])
    if START_OF_BLOCK + SIZE > HEAD_DIM:
        inside = (START_OF_BLOCK + columns < HEAD_DIM)[None, :]
        if mask is not None:
            inside = inside & mask[:, None]
        return tl.load(pointers, mask=inside, other=0.0)
    elif mask is not None:
        return tl.load(pointers, mask=mask[:, None], other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
@no_type_check
def store_heads(
    rows,
    offsets,
    mask,
    first,
    second,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """Writes both blocks of channels of the heads at some offsets: the inverse of `load_heads`."""
    _store(rows, offsets, mask, first, HEAD_DIM, 0, FIRST)
    if SECOND > 0:
        _store(rows, offsets, mask, second, HEAD_DIM, FIRST, SECOND)


@triton.jit
@no_type_check
def _store(
    rows,
    offsets,
    mask,
    values,
    HEAD_DIM: tl.constexpr,
    START_OF_BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Writes channels from START_OF_BLOCK on, except those beyond the head."""
    columns = tl.arange(0, SIZE)
    pointers = rows + (offsets[:, None] + (START_OF_BLOCK + columns)[None, :])
    values = values.to(rows.dtype.element_ty)
    if START_OF_BLOCK + SIZE > HEAD_DIM:
        inside = (START_OF_BLOCK + columns < HEAD_DIM)[None, :]
        if mask is not None:
            inside = inside & mask[:, None]
        tl.store(pointers, values, mask=inside)
    elif mask is not None:
        tl.store(pointers, values, mask=mask[:, None])
    else:
        tl.store(pointers, values)


@triton.jit
@no_type_check
def advance(
    step, start, end, range_index, ranges, BLOCK_KV: tl.constexpr, STEPS_PER_BLOCK: tl.constexpr
):
    """The start of the next block, the end of its range and the index of its range.

    `BLOCK_KV` keys are one of `STEPS_PER_BLOCK` steps of a block of the schedule.
    """
    next_start = start + BLOCK_KV
    done = next_start >= end
    if STEPS_PER_BLOCK > 1:
        # The schedule's last block of a range may reach beyond the range. All of its steps are run,
        # with the keys beyond the range masked.
        done = done & ((step + 1) % STEPS_PER_BLOCK == 0)
    range_index = tl.where(done, range_index + 1, range_index)
    entry = ranges + range_index * RANGE_COLUMNS
    next_start = tl.where(done, tl.load(entry + START), next_start)
    return next_start, tl.load(entry + END), range_index
