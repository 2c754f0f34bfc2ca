"""The decode kernels: attention to one split of the cache, and the combination of all splits.

`bsjax.pallas.decode` explains the splits, the transposed products and what is masked.
"""

from typing import no_type_check

import triton
import triton.language as tl

from bsjax.triton.product import product

_LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Below every score, and finite."""


@triton.jit
@no_type_check
def attend_split(
    layer,
    lengths,
    q,
    k_cache,
    v_cache,
    batch,
    rows,
    out,
    lse,
    scratch: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    TO_LOG2: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program: all queries of one key head against one split of the keys."""
    STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    sequence = tl.program_id(2)
    length = tl.load(lengths + sequence)
    blocks = tl.cdiv(length, BLOCK_KV)
    first = split * blocks // SPLITS
    last = (split + 1) * blocks // SPLITS
    of_group = tl.arange(0, PADDED_GROUP)
    head = (sequence * KV_HEADS + kv_head) * GROUP + of_group
    in_group = of_group < GROUP
    if first >= last:
        nothing = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
        tl.store(lse + head * SPLITS + split, nothing, mask=in_group)
        return

    columns = tl.arange(0, WIDTH)
    in_head = columns < HEAD_DIM
    queries = tl.load(
        q + head[None, :] * HEAD_DIM + columns[:, None],
        mask=in_group[None, :] & in_head[:, None],
        other=0.0,
    )
    of_block = tl.arange(0, BLOCK_KV)
    offsets = of_block[:, None] * STRIDE + columns[None, :]
    place = (tl.load(layer).to(tl.int64) * batch + sequence) * rows * STRIDE + kv_head * HEAD_DIM
    maximum = tl.full([PADDED_GROUP], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK_KV, PADDED_GROUP], tl.float32)
    weighted = tl.zeros([WIDTH, PADDED_GROUP], tl.float32)
    for block in tl.range(first, last, num_stages=STAGES):
        start = block * BLOCK_KV
        block_place = place + start.to(tl.int64) * STRIDE
        valid = (start + of_block < length)[:, None]
        inside = valid & in_head[None, :]
        keys = tl.load(k_cache + block_place + offsets, mask=inside, other=0.0)
        values = tl.load(v_cache + block_place + offsets, mask=inside, other=0.0)
        scores = product(keys, queries, None, PRECISION) * TO_LOG2
        scores = tl.where(valid, scores, float("-inf"))
        greatest = tl.maximum(maximum, tl.max(scores, 0))
        weights = tl.exp2(scores - greatest[None, :])
        rescale = tl.exp2(maximum - greatest)
        # Totals are summed over keys only at the end, which saves a sum across warps per block.
        total = total * rescale[None, :] + weights
        weighted = product(
            values.T, weights.to(values.dtype), weighted * rescale[None, :], PRECISION
        )
        maximum = greatest
    # A split with a block has a valid key, so no total is 0.
    totals = tl.sum(total, 0)
    tl.store(
        out + (head[None, :] * SPLITS + split) * HEAD_DIM + columns[:, None],
        weighted / totals[None, :],
        mask=in_group[None, :] & in_head[:, None],
    )
    tl.store(lse + head * SPLITS + split, maximum + tl.log2(totals), mask=in_group)


@triton.jit
@no_type_check
def combine_splits(
    partial,
    partial_lse,
    q,
    own_k,
    own_v,
    out,
    lse,
    scratch: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    Q_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    PADDED_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    OWN: tl.constexpr,
    TO_LOG2: tl.constexpr,
):
    """One program: the output of one query head, from its splits and the token's own key."""
    head = tl.program_id(1) * Q_HEADS + tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    in_head = columns < HEAD_DIM
    # In powers of two; -inf where a split had no keys and its output is undefined.
    partial_lse += head * SPLITS
    split = tl.arange(0, PADDED_SPLITS)
    every_lse = tl.load(partial_lse + split, mask=split < SPLITS, other=float("-inf"))
    maximum = tl.maximum(tl.max(every_lse, 0), _LOWEST)
    own_value = tl.zeros([WIDTH], tl.float32)
    own_total = 0.0
    if OWN:
        kv_place = (head // GROUP) * HEAD_DIM + columns
        query = tl.load(q + head * HEAD_DIM + columns, mask=in_head, other=0.0).to(tl.float32)
        own_key = tl.load(own_k + kv_place, mask=in_head, other=0.0).to(tl.float32)
        own_value = tl.load(own_v + kv_place, mask=in_head, other=0.0).to(tl.float32)
        own_score = tl.sum(query * own_key, 0) * TO_LOG2
        maximum = tl.maximum(maximum, own_score)
        own_total = tl.exp2(own_score - maximum)
    total = tl.sum(tl.exp2(every_lse - maximum), 0) + own_total
    partial += head.to(tl.int64) * SPLITS * HEAD_DIM
    weighted = tl.zeros([BLOCK, WIDTH], tl.float32)
    for start in tl.range(0, SPLITS, BLOCK):
        of_block = start + tl.arange(0, BLOCK)
        block_lse = tl.load(partial_lse + of_block, mask=of_block < SPLITS, other=float("-inf"))
        outputs = tl.load(
            partial + of_block[:, None] * HEAD_DIM + columns[None, :],
            mask=(block_lse > float("-inf"))[:, None] & in_head[None, :],
            other=0.0,
        )
        weighted += tl.exp2(block_lse - maximum)[:, None] * outputs
    seen = total > 0
    divisor = tl.where(seen, total, 1.0)
    result = (tl.sum(weighted, 0) + own_total * own_value) / divisor
    tl.store(out + head * HEAD_DIM + columns, result.to(out.dtype.element_ty), mask=in_head)
    LN_2: tl.constexpr = 0.6931471805599453
    tl.store(lse + head, tl.where(seen, (maximum + tl.log2(divisor)) * LN_2, float("-inf")))
