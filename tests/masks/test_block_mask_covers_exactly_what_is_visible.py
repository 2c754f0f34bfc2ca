"""The invariants of a schedule, on random templates, against the predicate."""

from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import BlockMask, HeadCategory, Image, MaskError, Sinks, Template, Text
from bsjax.masks.categories import KeyGroup
from bsjax.masks.query_rows import QueryRows, visible_pairs
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import (
    Tile,
    build_schedule,
    build_span_schedule,
    segment_schedule,
    uses_packed_order,
)
from bsjax.masks.visibility import Visibility
from tests.support.schedules import check_invariants, check_launch_list, row_matrix, walk
from tests.support.templates import categories, spans, templates, visibilities, visible_matrix

group_sets = st.integers(0, 31).map(KeyGroup)


tables_of_key_groups = st.lists(
    st.sampled_from(HeadCategory).map(lambda c: c.groups) | group_sets, min_size=1, max_size=4
)


@settings(max_examples=200)
@given(
    template=templates,
    tables=tables_of_key_groups,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 12),
    padding=st.integers(0, 20),
    visibility=visibilities,
)
def test_every_visible_pair_is_covered_once(
    template, tables, block_q, block_kv, padding, visibility
):
    schedule = build_schedule(
        template,
        tables,
        block_q=block_q,
        block_kv=block_kv,
        tokens=template.tokens + padding,
        visibility=visibility,
    )
    check_invariants(schedule, len(tables), block_q)
    for table, groups in enumerate(tables):
        pairs = visible_pairs(template, groups, visibility)
        assert pairs == row_matrix(schedule, table).sum()


@settings(max_examples=200)
@given(
    placed=spans,
    tables=tables_of_key_groups,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 12),
    padding=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    stacked_heads=st.integers(0, 4),
    visibility=visibilities,
    sinks_apart=st.booleans(),
)
def test_chunks_turns_and_batches_are_covered_once(
    placed, tables, block_q, block_kv, padding, stacked_heads, visibility, sinks_apart
):
    """Queries of some tokens, keys in rows of several turns, conversations in any order."""
    packed = uses_packed_order(tables)
    queries = Rows(placed.templates, placed.queries, packed=packed, sinks_apart=sinks_apart)
    keys = Rows(placed.templates, placed.keys, packed=packed, first_row=placed.first_key_rows)
    schedule = build_span_schedule(
        queries,
        keys,
        tables,
        block_q=block_q,
        block_kv=block_kv,
        query_rows=queries.tokens + padding[0],
        key_rows=keys.tokens + padding[1],
        visibility=visibility,
        stacked_heads=stacked_heads,
    )
    check_invariants(schedule, schedule.tile_columns.shape[0], block_q, packed)
    assert schedule.query_rows == queries.tokens + padding[0]
    assert schedule.key_rows == keys.tokens + padding[1]


@settings(max_examples=100)
@given(
    placed=spans,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 5),
    stacked_heads=st.integers(1, 4),
    most_parts=st.integers(2, 20),
    visibility=visibilities,
)
def test_split_tiles_cover_what_whole_ones_do(
    placed, block_q, block_kv, stacked_heads, most_parts, visibility
):
    queries, keys = (
        Rows(placed.templates, part, packed=True) for part in (placed.queries, placed.keys)
    )
    build = partial(
        build_span_schedule,
        queries,
        keys,
        [HeadCategory.SINK.groups],
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
        stacked_heads=stacked_heads,
    )

    def blocks_of(schedule):
        """Each block of the text table, with its rows."""
        return sorted(
            (tuple(rows), tuple(keys), full)
            for rows, blocks in walk(schedule, 1)
            for keys, full in blocks
        )

    whole = build()
    with mock.patch("bsjax.masks.schedule.LONGEST_TILE", 3):
        split = build(most_parts=most_parts)
    assert blocks_of(split) == blocks_of(whole)
    check_launch_list(split)
    tiles, parts = split.tiles, split.parts
    of_parts = tiles.part[1][tiles.rows[1] > 0]
    used = np.sort(of_parts[of_parts >= 0])
    np.testing.assert_array_equal(used, np.arange(used.size))
    assert used.size <= most_parts == parts.count
    assert (parts.tile[used.size :] == most_parts).all()
    of_tiles = whole.tiles.blocks[1]
    least = int(max(3, -(-of_tiles.sum() // most_parts)))
    longest = int(max(least, tiles.blocks[1].max(initial=0)))

    def needed(most):
        return int((-(-of_tiles[of_tiles > most] // most)).sum())

    assert needed(longest) <= most_parts
    assert longest == least or needed(longest - 1) > most_parts, "parts could be shorter"
    assert (np.diff(tiles.blocks[1][tiles.rows[1] > 0]) <= 0).all(), "longest tiles first"
    for tile in map(Tile._make, split.tile_columns[1].tolist()):
        if tile.rows and tile.part >= 0:
            assert (parts.first_row[tile.part], parts.rows[tile.part]) == tile[:2]


@settings(max_examples=30)
@given(placed=spans, categories=categories, visibility=visibilities)
def test_a_mask_of_some_queries_is_that_part_of_the_whole(placed, categories, visibility):
    def mask(queries):
        return BlockMask(
            list(placed.templates),
            categories,
            8,
            4,
            visibility.bidirectional_images,
            visibility.window,
            queries=queries,
        )

    spans = [
        next((range(s.start, s.end) for s in placed.queries if s.conversation == index), range(0))
        for index in range(len(placed.templates))
    ]
    some, whole = mask(spans), mask(None)
    firsts = np.cumsum([0, *(template.tokens for template in placed.templates)]).tolist()
    rows = [first + p for first, span in zip(firsts, spans, strict=False) for p in span]
    for head, category in enumerate(categories):
        np.testing.assert_array_equal(some.to_dense(head), whole.to_dense(head)[rows])
        assert some.visible_pairs[head] == whole.to_dense(head)[rows].sum()
        for first, template in zip(firsts, placed.templates, strict=False):
            own = slice(first, first + template.tokens)
            np.testing.assert_array_equal(
                whole.to_dense(head)[own, own],
                visible_matrix(template, category.groups, visibility),
            )


@pytest.mark.slow
@given(
    template=templates,
    categories=categories,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 12),
    visibility=visibilities,
)
def test_to_dense_flops_and_density_agree_with_the_predicate(
    template, categories, block_q, block_kv, visibility
):
    mask = BlockMask(
        template, categories, block_q, block_kv, visibility.bidirectional_images, visibility.window
    )
    dense = visible_matrix(template, HeadCategory.DENSE.groups, visibility).sum()
    total = 0
    for head, category in enumerate(categories):
        seen = visible_matrix(template, category.groups, visibility)
        np.testing.assert_array_equal(mask.to_dense(head), seen)
        assert mask.flops_per_head[head] == 4 * seen.sum()
        assert mask.density_per_head[head] == pytest.approx(seen.sum() / max(dense, 1))
        total += 4 * int(seen.sum())
    assert mask.flops == total == sum(mask.flops_per_category.values())


@pytest.mark.slow
@settings(max_examples=150)
@given(
    placed=spans,
    groups=st.sampled_from(HeadCategory).map(lambda c: c.groups) | group_sets,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 12),
    visibility=visibilities,
    sinks_apart=st.booleans(),
)
def test_probes_give_the_ranges_of_all_rows(
    placed, groups, block_q, block_kv, visibility, sinks_apart
):
    def build():
        # The second table makes the order packed, whatever key groups the first one has.
        tables = [groups, HeadCategory.SINK.groups]
        queries = Rows(placed.templates, placed.queries, packed=True, sinks_apart=sinks_apart)
        keys = Rows(placed.templates, placed.keys, packed=True, first_row=placed.first_key_rows)
        return build_span_schedule(
            queries, keys, tables, block_q=block_q, block_kv=block_kv, visibility=visibility
        )

    few = build()
    with mock.patch.object(
        QueryRows, "probes", lambda placed, starts, block_q, rows: np.arange(rows.start, rows.stop)
    ):
        every = build()
    np.testing.assert_array_equal(few.tile_columns, every.tile_columns)
    np.testing.assert_array_equal(few.range_columns, every.range_columns)


def test_few_probes_suffice_with_a_window():
    template = Template.from_segments([Text(8), Image(256)] * 50)
    whole = Rows([template], [Span(0, template.tokens)], packed=True)
    rows = QueryRows(whole, 0, whole, Visibility(True, 1024))
    starts = rows.tile_starts(HeadCategory.SINK.groups, 128)
    assert rows.probes(starts, 128).size < rows.tokens / 10
    assert rows.probes(starts, 2048).size == rows.tokens, "a tile longer than the window"


def test_with_a_window_no_tile_spans_the_whole_prompt():
    """Such a tile would still run when all others are done. The number of tiles stays the same."""
    template = Template.from_segments([Text(8), Image(256)] * 400)
    blocks = {"block_q": 128, "block_kv": 64, "visibility": Visibility(True, 1024)}
    tables = [category.groups for category in HeadCategory]
    schedule = build_schedule(template, tables, **blocks)
    # Keys of the tile's span and of the window before it, and a few more because ranges are cut.
    most = (4 * 1024 + 1024 + 256) // 64 + 8
    assert schedule.tiles.blocks.max() <= most
    with mock.patch("bsjax.masks.query_rows.TILE_WINDOWS", 10**6):
        whole = build_schedule(template, tables, **blocks)
    assert (whole.tiles.blocks.max(axis=1)[[0, 2, 3]] > 5 * most).all()
    for table in range(len(tables)):
        visited, before = (s.tiles.blocks[table].sum() for s in (schedule, whole))
        assert visited < 1.1 * before
    assert schedule.tile_columns.shape == whole.tile_columns.shape


def test_the_work_of_a_sparse_tile_is_that_of_its_ranges():
    # 40 images of 100 tokens with two text tokens each: image rows of INTRA_IMAGE see only the text
    # before them and their own image.
    template = Template.from_segments([Image(100), Text(2)] * 40)
    schedule = build_schedule(template, [HeadCategory.INTRA_IMAGE.groups], block_q=128, block_kv=64)
    for rows, blocks in walk(schedule, 0):
        if 1 <= template.packed_order[rows[0]] % 102 <= 99:
            assert len(blocks) <= 2 + 1 + 2  # 78 text tokens, own sink, 99 others


def test_all_dense_keeps_prompt_order():
    template = Template.from_segments([Text(3), Image(20), Text(4)])
    mask = BlockMask(template, [HeadCategory.DENSE] * 2)
    np.testing.assert_array_equal(mask.order, np.arange(27))


def test_ragged_segments_see_themselves_only():
    schedule = segment_schedule([3, 1, 7], block_q=4, block_kv=2, tokens=16)
    seen = row_matrix(schedule, HeadCategory.INTRA_IMAGE)
    covered = np.zeros((16, 16), int)
    for rows, blocks in walk(schedule, int(HeadCategory.INTRA_IMAGE)):
        for keys, _ in blocks:
            covered[np.ix_(rows, keys)] += 1
    expected = np.zeros((16, 16), int)
    for start, end in ((0, 3), (3, 4), (4, 11)):
        expected[start:end, start:end] = 1
    np.testing.assert_array_equal(covered, expected)
    np.testing.assert_array_equal(seen[:11, :11], expected[:11, :11].astype(bool))


def test_templates_of_similar_size_share_shapes():
    def shapes(segments):
        schedule = build_schedule(
            Template.from_segments(segments, Sinks(first=2)),
            [category.groups for category in HeadCategory],
            block_q=128,
            block_kv=64,
            tokens=4096,
        )
        return [leaf.shape for leaf in jax.tree.leaves(schedule)]

    assert shapes([Text(9)] + [Image(300), Text(5)] * 12) == shapes([Image(777), Text(31)] * 5)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: BlockMask(t, []), "at least one query head"),
        (lambda t: BlockMask(t, [7]), "INTRA_IMAGE"),
        (lambda t: BlockMask(t, [0], block_q=0), "block_q must be at least 1"),
        (lambda t: BlockMask(t, [0], window=0), "window must be at least 1"),
        (lambda t: Visibility(window=-1), "window must be at least 1, got -1"),
        (lambda t: BlockMask(t, [0]).to_dense(1), "Head 1 does not exist"),
        (lambda t: BlockMask(t, [0]).plot(head=3), "Head 3 does not exist"),
        (lambda t: build_schedule(t, [None], block_q=1, block_kv=1, tokens=1), "Cannot pad"),
        (lambda t: BlockMask([], [0]), "a list of one or more"),
        (lambda t: BlockMask(t, [0], queries=range(3, 6)), "not positions of a prompt of 5 tokens"),
        (lambda t: BlockMask(t, [0], queries=range(4, 2)), "not positions of a prompt of 5 tokens"),
        (lambda t: BlockMask(t, [0], queries=range(0, 4, 2)), "consecutive positions"),
        (lambda t: BlockMask([t, t], [0], queries=range(2)), "for each of 2 prompts"),
        (lambda t: BlockMask([t, t], [0]).plot(), "several prompts has no picture"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, words):
    with pytest.raises(MaskError, match=words):
        call(Template.from_segments([Text(2), Image(3)]))


def test_inside_a_jitted_function_a_mask_says_what_it_lacks():
    mask = BlockMask(Template.from_segments([Text(2), Image(3)]), [0])
    with pytest.raises(MaskError, match="comes from a jitted function"):
        jax.jit(lambda mask: mask.flops)(mask)


@pytest.mark.slow
@pytest.mark.parametrize("category", HeadCategory)
def test_pictures_of_all_sizes_are_written(category, tmp_path):
    for segments in ([Text(2), Image(3)], [Text(0)], [Image(1)], [Image(900), Text(9)] * 60):
        path = tmp_path / "mask.png"
        BlockMask(Template.from_segments(segments), [category]).plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        path.unlink()


def test_a_picture_that_cannot_be_written_is_an_error(tmp_path):
    mask = BlockMask(Template.from_segments([Text(2), Image(3)]), [0])
    with pytest.raises(MaskError, match="cannot be written"):
        mask.plot(tmp_path / "missing" / "mask.png")
