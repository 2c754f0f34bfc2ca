"""The prefill kernel: one program for each tile of query rows and each head.

`bsjax.pallas.prefill` explains the two loops over key blocks, the grid, stacked tiles and split
tiles. Here, too, keys and values are never masked by row.

Both loops are pipelined as deeply as the launch says. `tl.range(..., num_stages=...)` would make
copies to shared memory of the reads of ranges, too. The next block's address depends on them, so
every block's copies would be waited for as soon as they have started.

Offsets: those of a layer and of a tile are computed in 64 bits, once, and those inside of them in
32 bits, unless a layer has 2**31 elements or more. Arrays may therefore be of any size.
"""

from typing import no_type_check

import triton
import triton.language as tl

from bsjax.triton.predicate import sees
from bsjax.triton.product import product, product_of_heads
from bsjax.triton.tiles import (
    END,
    FIRST_RANGE,
    FIRST_ROW,
    FULL_BLOCKS,
    PART,
    PARTIAL_BLOCKS,
    RANGE_COLUMNS,
    ROWS,
    START,
    advance,
    load_heads,
    store_heads,
    tile_of_program,
)

_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Below every score, and finite, so that a row that has seen nothing subtracts no infinities."""


@triton.jit
@no_type_check
def attend(
    scores,
    values,
    second_values,
    maximum,
    total,
    weighted,
    second_weighted,
    TO_LOG2: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The softmax after one more block of keys."""
    greatest = tl.maximum(maximum, tl.max(scores, 1) * TO_LOG2)
    weights = tl.exp2(scores * TO_LOG2 - greatest[:, None])
    rescale = tl.exp2(maximum - greatest)
    total = total * rescale + tl.sum(weights, 1)
    weights = weights.to(values.dtype)
    weighted = product(weights, values, weighted * rescale[:, None], PRECISION)
    if SECOND > 0:
        second_weighted = product(
            weights, second_values, second_weighted * rescale[:, None], PRECISION
        )
    return greatest, total, weighted, second_weighted


@triton.jit
@no_type_check
def attend_tile(
    q,
    k,
    v,
    query_position,
    query_image,
    key_position,
    key_image,
    own_from,
    other_from,
    layer,
    head_category,
    launch,
    tiles,
    ranges,
    key_rows,
    tile_count,
    range_count,
    out,
    lse,
    part_out,
    part_lse,
    scratch: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STACKED: tl.constexpr,
    TABLES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PROGRAMS_PER_TILE: tl.constexpr,
    STEPS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    TO_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the attention of a tile's rows, or of some of them."""
    Q_STRIDE: tl.constexpr = Q_HEADS * HEAD_DIM
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    table, tile, kv_head, first_head, heads, earlier = tile_of_program(
        head_category,
        launch,
        tiles,
        tile_count,
        Q_HEADS,
        KV_HEADS,
        STACKED,
        TABLES,
        BLOCK_Q,
        PROGRAMS_PER_TILE,
    )
    rows = tl.load(tile + ROWS)
    if earlier >= rows * heads:
        return
    first_row = tl.load(tile + FIRST_ROW)
    range_index = tl.load(tile + FIRST_RANGE)
    full_blocks = tl.load(tile + FULL_BLOCKS)
    partial_blocks = tl.load(tile + PARTIAL_BLOCKS)

    index = earlier + tl.arange(0, BLOCK_Q)
    inside = index < rows * heads
    row = index // heads
    offsets = row * Q_STRIDE + (index % heads) * HEAD_DIM
    place = first_row.to(tl.int64) * Q_STRIDE + first_head * HEAD_DIM
    queries, second_queries = load_heads(q + place, offsets, inside, HEAD_DIM, FIRST, SECOND)
    position = tl.load(query_position + first_row + row, mask=inside, other=0)[:, None]
    image = tl.load(query_image + first_row + row, mask=inside, other=0)[:, None]
    maximum = tl.full([BLOCK_Q], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    weighted = tl.zeros([BLOCK_Q, FIRST], tl.float32)
    if SECOND > 0:
        second_weighted = tl.zeros([BLOCK_Q, SECOND], tl.float32)
    else:
        second_weighted = total

    kv_place = tl.load(layer).to(tl.int64) * key_rows * KV_STRIDE + kv_head * HEAD_DIM
    keys_of_head = k + kv_place
    values_of_head = v + kv_place
    kv_rows = tl.arange(0, BLOCK_KV)
    kv_offsets = kv_rows * KV_STRIDE
    ranges += table * range_count * RANGE_COLUMNS
    start = tl.load(ranges + range_index * RANGE_COLUMNS + START)
    end = tl.load(ranges + range_index * RANGE_COLUMNS + END)

    for step in tl.range(0, full_blocks * STEPS_PER_BLOCK):
        block = (start.to(tl.int64) if WIDE else start) * KV_STRIDE
        keys, second_keys = load_heads(
            keys_of_head + block, kv_offsets, None, HEAD_DIM, FIRST, SECOND
        )
        values, second_values = load_heads(
            values_of_head + block, kv_offsets, None, HEAD_DIM, FIRST, SECOND
        )
        scores = product_of_heads(queries, second_queries, keys, second_keys, SECOND, PRECISION)
        maximum, total, weighted, second_weighted = attend(
            scores,
            values,
            second_values,
            maximum,
            total,
            weighted,
            second_weighted,
            TO_LOG2,
            SECOND,
            PRECISION,
        )
        start, end, range_index = advance(
            step, start, end, range_index, ranges, BLOCK_KV, STEPS_PER_BLOCK
        )

    key_position += kv_rows
    key_image += kv_rows
    own_from += table * key_rows + kv_rows
    other_from += table * key_rows + kv_rows
    for step in tl.range(0, partial_blocks * STEPS_PER_BLOCK):
        # A block that would reach beyond the last key is read from further up, and the keys before
        # its start are masked.
        first_key = tl.minimum(start, key_rows - BLOCK_KV)
        key_row = first_key + kv_rows
        in_block = (key_row >= start) & (key_row < end)
        block = (first_key.to(tl.int64) if WIDE else first_key) * KV_STRIDE
        keys, second_keys = load_heads(
            keys_of_head + block, kv_offsets, None, HEAD_DIM, FIRST, SECOND
        )
        values, second_values = load_heads(
            values_of_head + block, kv_offsets, None, HEAD_DIM, FIRST, SECOND
        )
        scores = product_of_heads(queries, second_queries, keys, second_keys, SECOND, PRECISION)
        seen = sees(
            position,
            image,
            tl.load(key_position + first_key)[None, :],
            tl.load(key_image + first_key)[None, :],
            tl.load(own_from + first_key)[None, :],
            tl.load(other_from + first_key)[None, :],
            WINDOW,
        )
        scores = tl.where(seen & in_block[None, :], scores, float("-inf"))
        maximum, total, weighted, second_weighted = attend(
            scores,
            values,
            second_values,
            maximum,
            total,
            weighted,
            second_weighted,
            TO_LOG2,
            SECOND,
            PRECISION,
        )
        start, end, range_index = advance(
            step, start, end, range_index, ranges, BLOCK_KV, STEPS_PER_BLOCK
        )

    saw = total > 0
    total = tl.where(saw, total, 1.0)
    LN_2: tl.constexpr = 0.6931471805599453
    row_lse = tl.where(saw, (maximum + tl.log2(total)) * LN_2, float("-inf"))
    weighted = weighted / total[:, None]
    if SECOND > 0:
        second_weighted = second_weighted / total[:, None]
    if PARTS:
        part = tl.load(tile + PART)
        if part >= 0:
            place = (part.to(tl.int64) * KV_HEADS + kv_head) * (BLOCK_Q * PROGRAMS_PER_TILE)
            part_rows = part_out + place * HEAD_DIM
            part_offsets = index * HEAD_DIM
            store_heads(
                part_rows, part_offsets, inside, weighted, second_weighted, HEAD_DIM, FIRST, SECOND
            )
            tl.store(part_lse + place + index, row_lse, mask=inside)
            return
    store_heads(out + place, offsets, inside, weighted, second_weighted, HEAD_DIM, FIRST, SECOND)
    lse_place = first_row.to(tl.int64) * Q_HEADS + first_head
    tl.store(lse + lse_place + row * Q_HEADS + index % heads, row_lse, mask=inside)
