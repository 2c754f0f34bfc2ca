"""A transposed schedule visits every visible pair exactly once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import BlockMask, HeadCategory, Image, MaskError, Template, Text, stack_masks
from bsjax.masks.rows import Rows
from bsjax.masks.schedule import (
    KeyRange,
    build_schedule,
    build_span_schedule,
    category_tables,
    uses_packed_order,
)
from bsjax.masks.transposed import BLOCK, LONGEST, KeyTile, transposed_schedule
from tests.support.schedules import row_matrix
from tests.support.templates import spans, visibilities


def walk(transposed, table):
    """Yields (keys of an entry, [(rows, is full)]) in the order in which the kernel visits them."""
    ranges = [KeyRange(*columns) for columns in transposed.range_columns.tolist()]
    for tile in map(KeyTile._make, transposed.tile_columns[table].tolist()):
        blocks, index = [], tile.first_range
        start = ranges[index].start
        for block in range(tile.full_blocks + tile.partial_blocks):
            end = ranges[index].end
            rows = range(start, min(start + transposed.block_q, end))
            blocks.append((rows, block < tile.full_blocks))
            start += transposed.block_q
            if start >= end:
                index += 1
                start = ranges[index].start
        if tile.keys:
            yield range(tile.first_key, tile.first_key + tile.keys), blocks


def check(schedule, block, tables):
    transposed = transposed_schedule(schedule, block)
    conversation = schedule.keys.conversation
    for table in range(tables):
        seen = row_matrix(schedule, table)
        covered = np.zeros(seen.shape, int)
        tiles = set()
        for keys, blocks in walk(transposed, table):
            assert len(keys) <= block and len(set(conversation[keys])) == 1
            tiles.add(keys)
            for rows, full in blocks:
                pairs = np.ix_(rows, keys)
                covered[pairs] += 1
                assert not full or (len(rows) == block and seen[pairs].all())
                # What the kernel evaluates does not look at conversations.
                assert (schedule.queries.conversation[rows] == conversation[keys[0]]).all()
        assert covered.max(initial=0) <= 1, "no pair is visited twice"
        if schedule.stacked_heads or schedule.tiles.rows[table].any():
            assert (covered[seen] == 1).all(), "every visible pair is visited"
        tiled = np.zeros(schedule.key_rows, int)
        for keys in tiles:
            tiled[keys] += 1
        np.testing.assert_array_equal(tiled, conversation >= 0, "every key is in exactly one tile")


@settings(max_examples=100)
@given(
    placed=spans,
    categories=st.lists(st.sampled_from(HeadCategory), min_size=1, max_size=3),
    blocks=st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)),
    padding=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    stacked_heads=st.integers(0, 4),
    visibility=visibilities,
)
def test_every_visible_pair_is_visited_once(
    placed, categories, blocks, padding, stacked_heads, visibility
):
    """Queries of some tokens, keys in rows of several turns, conversations in any order."""
    tables = [category.groups for category in categories]
    packed = uses_packed_order(tables)
    queries = Rows(placed.templates, placed.queries, packed=packed)
    keys = Rows(placed.templates, placed.keys, packed=packed, first_row=placed.first_key_rows)
    schedule = build_span_schedule(
        queries,
        keys,
        tables,
        block_q=blocks[0],
        block_kv=blocks[1],
        visibility=visibility,
        query_rows=queries.tokens + padding[0],
        key_rows=keys.tokens + padding[1],
        stacked_heads=stacked_heads,
    )
    check(schedule, blocks[2], len(tables))


def many_images(images=36, tokens=1000, text=8):
    return Template.from_segments([Text(text), Image(tokens)] * images)


def test_at_36k_tokens_long_tiles_are_split_and_arrays_have_few_sizes():
    shapes = set()
    sparse = HeadCategory.INTRA_IMAGE_SINK
    for template in (many_images(), many_images(90, 392), many_images(140, 250)):
        schedule = build_schedule(
            template, category_tables([sparse]), block_q=64, block_kv=64, tokens=36_864
        )
        transposed = transposed_schedule(schedule)
        shapes.add((transposed.tile_columns.shape, transposed.range_columns.shape))
        tiles = transposed.tiles
        blocks = (tiles.full_blocks + tiles.partial_blocks)[sparse]
        assert blocks.sum() < 1.2 * schedule.tiles.blocks[sparse].sum()
        key_tiles = -(-template.tokens // 64)
        assert key_tiles < (tiles.keys[sparse] > 0).sum() < 1.5 * key_tiles
        assert blocks.max() <= LONGEST, "each of the longest is split into five"
        assert (np.diff(blocks) <= 1).all(), "longest first"
    assert len(shapes) == 1


def test_masks_have_it_on_request_padded_and_stacked():
    masks = [
        BlockMask(Template.from_segments([Text(3), Image(tokens)]), ["SINK", 0], gradients=True)
        for tokens in (200, 900)
    ]
    stacked = stack_masks(masks)
    assert stacked.keys == 903
    for number, mask in enumerate(masks):
        first = masks[0].padded(903, 903) if number == 0 else mask
        found, wanted = stacked[number].schedule.transposed, first.schedule.transposed
        assert (found.block_q, found.block_kv) == (BLOCK, BLOCK)
        entries = wanted.tile_columns.shape[1]
        np.testing.assert_array_equal(found.tile_columns[:, :entries], wanted.tile_columns)
    plain = BlockMask(masks[0].template, ["SINK", 0])
    assert plain.schedule.transposed is None
    with pytest.raises(MaskError, match="same gradients, but masks.1. has False"):
        stack_masks([masks[0], plain])
