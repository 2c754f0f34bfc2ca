"""The kernels of the gradients: of queries, and of keys and values.

Both compute the weights again from the scores and the log-sum-exp of each row:

    weights          P = exp(S - lse)              S = scale * Q K^T
    score gradients  dS = P * (dO V^T + offset)    offset = dlse - rowsum(dO * O)
    results          dQ = scale * dS K     dK = scale * dS^T Q     dV = P^T dO

`query_gradients` walks the schedule like the prefill kernel: a program has a tile of query rows and
visits blocks of keys. `key_gradients` walks the transposed schedule: a program has a tile of keys
and visits blocks of query rows, for each query head that reads its key head, and computes all
matrices transposed. No two programs write to the same place, so there are no atomics.

Rows that see nothing have a log-sum-exp of +inf here, so that all of their weights are 0.
"""

from typing import no_type_check

import triton
import triton.language as tl

from bsjax.masks.transposed import KeyTile
from bsjax.triton.predicate import sees
from bsjax.triton.product import product, product_of_heads
from bsjax.triton.tiles import (
    END,
    FIRST_RANGE,
    FIRST_ROW,
    FULL_BLOCKS,
    PARTIAL_BLOCKS,
    RANGE_COLUMNS,
    ROWS,
    START,
    advance,
    load_heads,
    store_heads,
    tile_of_program,
)

_KEY_TILE_COLUMNS = tl.constexpr(len(KeyTile._fields))
_FIRST_KEY = tl.constexpr(KeyTile._fields.index("first_key"))
_KEYS = tl.constexpr(KeyTile._fields.index("keys"))
_ROW_RANGE = tl.constexpr(KeyTile._fields.index("first_range"))
_FULL_ROWS = tl.constexpr(KeyTile._fields.index("full_blocks"))
_PARTIAL_ROWS = tl.constexpr(KeyTile._fields.index("partial_blocks"))


@triton.jit
@no_type_check
def weights_and_gradients(
    left,
    second_left,
    left_gradients,
    second_left_gradients,
    right,
    second_right,
    right_gradients,
    second_right_gradients,
    lse,
    offset,
    seen,
    TO_LOG2: tl.constexpr,
    SECOND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The weights of a block of pairs, and the gradients of their scores but for `scale`.

    Scores are products of `left` and `right`, one of which are queries and the other keys; products
    of `left_gradients` and `right_gradients`, output gradients and values, are the gradients of
    weights. `lse` and `offset` broadcast to pairs. `seen` says which pairs are visible; None if all
    are.
    """
    scores = product_of_heads(left, second_left, right, second_right, SECOND, PRECISION)
    weights = tl.exp2(scores * TO_LOG2 - lse)
    if seen is not None:
        weights = tl.where(seen, weights, 0.0)
    gradients = product_of_heads(
        left_gradients,
        second_left_gradients,
        right_gradients,
        second_right_gradients,
        SECOND,
        PRECISION,
    )
    return weights, weights * (gradients + offset)


@triton.jit
@no_type_check
def query_gradients(
    q,
    k,
    v,
    out_gradient,
    lse,
    offset,
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
    query_rows,
    key_rows,
    tile_count,
    range_count,
    q_gradient,
    scratch: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    STACKED: tl.constexpr,
    TABLES: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PROGRAMS_PER_TILE: tl.constexpr,
    STEPS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    TO_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program: the gradients of a tile's queries, or of some of them."""
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
    gradients, second_gradients = load_heads(
        out_gradient + place, offsets, inside, HEAD_DIM, FIRST, SECOND
    )
    position = tl.load(query_position + first_row + row, mask=inside, other=0)[:, None]
    image = tl.load(query_image + first_row + row, mask=inside, other=0)[:, None]
    head_rows = (first_head + index % heads).to(tl.int64) * query_rows + first_row + row
    row_lse = tl.load(lse + head_rows, mask=inside, other=float("inf"))[:, None]
    row_offset = tl.load(offset + head_rows, mask=inside, other=0.0)[:, None]
    result = tl.zeros([BLOCK_Q, FIRST], tl.float32)
    second_result = row_lse
    if SECOND > 0:
        second_result = tl.zeros([BLOCK_Q, SECOND], tl.float32)

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
        _, score_gradients = weights_and_gradients(
            queries,
            second_queries,
            gradients,
            second_gradients,
            keys,
            second_keys,
            values,
            second_values,
            row_lse,
            row_offset,
            None,
            TO_LOG2,
            SECOND,
            PRECISION,
        )
        score_gradients = score_gradients.to(keys.dtype)
        result = product(score_gradients, keys, result, PRECISION)
        if SECOND > 0:
            second_result = product(score_gradients, second_keys, second_result, PRECISION)
        start, end, range_index = advance(
            step, start, end, range_index, ranges, BLOCK_KV, STEPS_PER_BLOCK
        )

    key_position += kv_rows
    key_image += kv_rows
    own_from += table * key_rows + kv_rows
    other_from += table * key_rows + kv_rows
    for step in tl.range(0, partial_blocks * STEPS_PER_BLOCK):
        # As in the prefill kernel, a block that would reach beyond the last key is read from
        # further up.
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
        seen = sees(
            position,
            image,
            tl.load(key_position + first_key)[None, :],
            tl.load(key_image + first_key)[None, :],
            tl.load(own_from + first_key)[None, :],
            tl.load(other_from + first_key)[None, :],
            WINDOW,
        )
        _, score_gradients = weights_and_gradients(
            queries,
            second_queries,
            gradients,
            second_gradients,
            keys,
            second_keys,
            values,
            second_values,
            row_lse,
            row_offset,
            seen & in_block[None, :],
            TO_LOG2,
            SECOND,
            PRECISION,
        )
        score_gradients = score_gradients.to(keys.dtype)
        result = product(score_gradients, keys, result, PRECISION)
        if SECOND > 0:
            second_result = product(score_gradients, second_keys, second_result, PRECISION)
        start, end, range_index = advance(
            step, start, end, range_index, ranges, BLOCK_KV, STEPS_PER_BLOCK
        )

    results = q_gradient + place
    store_heads(
        results, offsets, inside, result * SCALE, second_result * SCALE, HEAD_DIM, FIRST, SECOND
    )


@triton.jit
@no_type_check
def key_gradients(
    q,
    k,
    v,
    out_gradient,
    lse,
    offset,
    query_position,
    query_image,
    key_position,
    key_image,
    own_from,
    other_from,
    layer,
    head_category,
    tiles,
    ranges,
    query_rows,
    key_rows,
    tile_count,
    k_gradient,
    v_gradient,
    scratch: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    PROGRAMS_PER_TILE: tl.constexpr,
    STEPS_PER_BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALE: tl.constexpr,
    TO_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    KV_WIDE: tl.constexpr,
):
    """One program: the gradients of a tile's keys and values, or of some of them.

    Results are float32 [entries of the transposed schedule, keys of a tile, KV_HEADS, HEAD_DIM].
    """
    GROUP: tl.constexpr = Q_HEADS // KV_HEADS
    Q_STRIDE: tl.constexpr = Q_HEADS * HEAD_DIM
    KV_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    kv_head = tl.program_id(0)
    entry = tl.program_id(1) // PROGRAMS_PER_TILE
    earlier = (tl.program_id(1) % PROGRAMS_PER_TILE) * BLOCK_KV
    # The keys of an entry are the same in all tables.
    count = tl.load(tiles + entry * _KEY_TILE_COLUMNS + _KEYS)
    if earlier >= count:
        return
    first_key = tl.load(tiles + entry * _KEY_TILE_COLUMNS + _FIRST_KEY)
    index = earlier + tl.arange(0, BLOCK_KV)
    # What follows the tile's last key is computed like it, and its results are never read.
    key_row = tl.minimum(first_key + index, key_rows - 1)
    kv_place = (tl.load(layer).to(tl.int64) * key_rows) * KV_STRIDE + kv_head * HEAD_DIM
    kv_offsets = (key_row.to(tl.int64) if KV_WIDE else key_row) * KV_STRIDE
    keys, second_keys = load_heads(k + kv_place, kv_offsets, None, HEAD_DIM, FIRST, SECOND)
    values, second_values = load_heads(v + kv_place, kv_offsets, None, HEAD_DIM, FIRST, SECOND)
    of_keys = tl.zeros([BLOCK_KV, FIRST], tl.float32)
    of_values = tl.zeros([BLOCK_KV, FIRST], tl.float32)
    second_of_keys = of_keys
    second_of_values = of_keys
    if SECOND > 0:
        second_of_keys = tl.zeros([BLOCK_KV, SECOND], tl.float32)
        second_of_values = tl.zeros([BLOCK_KV, SECOND], tl.float32)
    of_block = tl.arange(0, BLOCK_Q)
    offsets = of_block * Q_STRIDE

    # Constant bounds take no registers.
    for of_group in tl.range(0, GROUP, num_stages=1):
        head = kv_head * GROUP + of_group
        table = tl.load(head_category + head)
        tile = tiles + (table * tile_count + entry) * _KEY_TILE_COLUMNS
        range_index = tl.load(tile + _ROW_RANGE)
        full_blocks = tl.load(tile + _FULL_ROWS)
        partial_blocks = tl.load(tile + _PARTIAL_ROWS)
        start = tl.load(ranges + range_index * RANGE_COLUMNS + START)
        end = tl.load(ranges + range_index * RANGE_COLUMNS + END)
        queries_of_head = q + head * HEAD_DIM
        gradients_of_head = out_gradient + head * HEAD_DIM
        lse_of_head = lse + head * query_rows
        offset_of_head = offset + head * query_rows

        for step in tl.range(0, full_blocks * STEPS_PER_BLOCK):
            block = (start.to(tl.int64) if WIDE else start) * Q_STRIDE
            queries, second_queries = load_heads(
                queries_of_head + block, offsets, None, HEAD_DIM, FIRST, SECOND
            )
            gradients, second_gradients = load_heads(
                gradients_of_head + block, offsets, None, HEAD_DIM, FIRST, SECOND
            )
            weights, score_gradients = weights_and_gradients(
                keys,
                second_keys,
                values,
                second_values,
                queries,
                second_queries,
                gradients,
                second_gradients,
                tl.load(lse_of_head + (start + of_block))[None, :],
                tl.load(offset_of_head + (start + of_block))[None, :],
                None,
                TO_LOG2,
                SECOND,
                PRECISION,
            )
            weights = weights.to(queries.dtype)
            score_gradients = score_gradients.to(queries.dtype)
            of_values = product(weights, gradients, of_values, PRECISION)
            of_keys = product(score_gradients, queries, of_keys, PRECISION)
            if SECOND > 0:
                second_of_values = product(weights, second_gradients, second_of_values, PRECISION)
                second_of_keys = product(score_gradients, second_queries, second_of_keys, PRECISION)
            start, end, range_index = advance(
                step, start, end, range_index, ranges, BLOCK_Q, STEPS_PER_BLOCK
            )

        # From what has been read for this head: nothing else is kept over the loop above, which
        # needs all registers.
        key_row = tl.load(tile + _FIRST_KEY) + index
        exists = key_row < key_rows
        key_row += table * key_rows
        position = tl.load(key_position + key_row, mask=exists, other=0)[:, None]
        image = tl.load(key_image + key_row, mask=exists, other=0)[:, None]
        own = tl.load(own_from + key_row, mask=exists, other=0)[:, None]
        other = tl.load(other_from + key_row, mask=exists, other=0)[:, None]
        for step in tl.range(0, partial_blocks * STEPS_PER_BLOCK):
            # A block that would reach beyond the last row is read from further up.
            first_row = tl.minimum(start, query_rows - BLOCK_Q)
            row = first_row + of_block
            in_block = (row >= start) & (row < end)
            block = (first_row.to(tl.int64) if WIDE else first_row) * Q_STRIDE
            queries, second_queries = load_heads(
                queries_of_head + block, offsets, None, HEAD_DIM, FIRST, SECOND
            )
            gradients, second_gradients = load_heads(
                gradients_of_head + block, offsets, None, HEAD_DIM, FIRST, SECOND
            )
            seen = sees(
                tl.load(query_position + row)[None, :],
                tl.load(query_image + row)[None, :],
                position,
                image,
                own,
                other,
                WINDOW,
            )
            weights, score_gradients = weights_and_gradients(
                keys,
                second_keys,
                values,
                second_values,
                queries,
                second_queries,
                gradients,
                second_gradients,
                tl.load(lse_of_head + row)[None, :],
                tl.load(offset_of_head + row)[None, :],
                seen & in_block[None, :],
                TO_LOG2,
                SECOND,
                PRECISION,
            )
            weights = weights.to(queries.dtype)
            score_gradients = score_gradients.to(queries.dtype)
            of_values = product(weights, gradients, of_values, PRECISION)
            of_keys = product(score_gradients, queries, of_keys, PRECISION)
            if SECOND > 0:
                second_of_values = product(weights, second_gradients, second_of_values, PRECISION)
                second_of_keys = product(score_gradients, second_queries, second_of_keys, PRECISION)
            start, end, range_index = advance(
                step, start, end, range_index, ranges, BLOCK_Q, STEPS_PER_BLOCK
            )

    results = index * KV_STRIDE
    place = entry.to(tl.int64) * (BLOCK_KV * PROGRAMS_PER_TILE) * KV_STRIDE + kv_head * HEAD_DIM
    store_heads(
        k_gradient + place,
        results,
        None,
        of_keys * SCALE,
        second_of_keys * SCALE,
        HEAD_DIM,
        FIRST,
        SECOND,
    )
    store_heads(
        v_gradient + place, results, None, of_values, second_of_values, HEAD_DIM, FIRST, SECOND
    )
