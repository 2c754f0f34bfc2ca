"""The Triton kernels, interpreted, are the dense softmax under the predicate.

The cases are those of the Pallas kernels.
"""

import itertools
import os
from functools import partial
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bsjax import HeadCategory, Image, Template, Text
from bsjax.gpu.configurations import KernelConfiguration
from bsjax.masks.categories import KeyGroup
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import (
    Capacity,
    build_schedule,
    build_span_schedule,
    category_tables,
    segment_schedule,
)
from bsjax.masks.visibility import (
    CAUSAL,
    KeyVisibility,
    TokenInfo,
    Visibility,
    key_visibility,
    visible,
)
from bsjax.masks.visibility import sees as numpy_sees
from tests.support.decode_cases import EDGES, check_decode
from tests.support.parity import torch
from tests.support.prefill_cases import (
    EVERY_CATEGORY,
    RAGGED,
    SHORT,
    check_prefill,
    dense_softmax,
    mixed_schedule,
    on_random_templates,
    random_arrays,
)
from tests.support.templates import Spans, spans
from tests.support.triton_interpreter import interpreted, require_triton

require_triton()
if torch is None:
    pytest.skip("Triton's interpreter needs torch", allow_module_level=True)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "2"))
prefill = partial(interpreted, "bsjax.triton.prefill:prefill_attention")
decode = partial(interpreted, "bsjax.triton.decode:decode_attention")
check = partial(check_prefill, prefill)


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_predicate_is_that_of_the_masks(bidirectional, window):
    """For every query and every key of a few positions and images, in every set of key groups."""
    position, image, sink = map(
        np.asarray, zip(*itertools.product(range(6), (-1, 0, 1), (False, True)), strict=True)
    )
    info = TokenInfo(position, image, sink, np.zeros_like(position))
    query = TokenInfo(*(part.astype(np.int32)[::2] for part in info))
    visibility = Visibility(bidirectional, window or None)
    groups = np.arange(2 ** len(KeyGroup), dtype=np.int32)[:, None]
    key = key_visibility(TokenInfo(*(part[None, :] for part in info)), groups, visibility)
    keys = [np.broadcast_to(part, key.own_from.shape).ravel() for part in key]
    wanted = numpy_sees(
        query.position[:, None],
        query.image[:, None],
        KeyVisibility(*(part[None, :] for part in keys)),
        visibility,
    )
    # Both sides are powers of two.
    queries = [np.resize(part, 32).astype(np.int32) for part in query[:2]]
    padded = [np.resize(part, 2048).astype(np.int32) for part in keys]
    seen = interpreted("tests.support.triton_functions:seen_pairs", queries, padded, window)
    assert wanted.shape == (18, 1152)
    np.testing.assert_array_equal(seen[:18, :1152], wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(72, "bfloat16"), (80, "float16"), (112, "float32"), (128, "bfloat16"), (256, "float32")],
)
def test_every_head_dim_is_right_in_every_dtype(head_dim, dtype):
    tolerance = 3e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    check(
        mixed_schedule(SHORT, block_q=64),
        SHORT.tokens,
        [HeadCategory.INTRA_IMAGE_SINK, HeadCategory.DENSE],
        head_dim=head_dim,
        dtype=dtype,
        tolerance=tolerance,
    )


@pytest.mark.slow
def test_grouped_queries_may_have_different_categories():
    head_category = [(3 * head + head // 4) % 4 for head in range(6)]
    check(mixed_schedule(SHORT, block_q=64), SHORT.tokens, head_category, kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(16, 32), (128, 64)])
def test_every_block_size_gives_the_same_result(blocks):
    schedule = mixed_schedule(SHORT, block_q=blocks[0], block_kv=blocks[1])
    check(schedule, SHORT.tokens, EVERY_CATEGORY)


@pytest.mark.slow
def test_several_programs_may_share_a_tile_and_take_several_steps_per_block():
    schedule = mixed_schedule(SHORT, block_q=64, block_kv=64)
    small = KernelConfiguration(32, 32, 4, 2)
    check(schedule, SHORT.tokens, EVERY_CATEGORY, configuration=small)


@pytest.mark.slow
@on_random_templates(EXAMPLES)
def test_random_templates_with_windows_and_bidirectional_images_agree(
    template, head_category, visibility, seed
):
    schedule = build_schedule(
        template,
        category_tables(head_category),
        block_q=32,
        block_kv=16,
        visibility=visibility,
        tokens=template.tokens + 5,
    )
    check(schedule, template.tokens, head_category, head_dim=16, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1, 100, 37, 2, 5]])
def test_segments_of_a_vision_tower_see_only_themselves(lengths):
    schedule = segment_schedule(lengths, block_q=32, block_kv=32, tokens=sum(lengths) + 7)
    head_category = [HeadCategory.INTRA_IMAGE] * 2
    check(schedule, sum(lengths), head_category, kv_heads=2, head_dim=80)


def test_fewer_tokens_than_one_block_are_enough():
    template = Template.from_segments([Text(2), Image(3)])
    check(mixed_schedule(template, 128, 64), 5, EVERY_CATEGORY)


def test_rows_that_see_nothing_and_padding_are_zero():
    template = Template.from_segments([Text(2), Image(60), Text(1)])
    schedule = build_schedule(
        template,
        category_tables([1]),
        block_q=32,
        block_kv=16,
        visibility=Visibility(window=3),
        tokens=96,
    )
    q, k, v = random_arrays(96, 1, 1, 64, "float32")
    out, lse = prefill(q, k, v, schedule, np.array([1]), scale=0.125)
    empty = np.isneginf(lse[:, 0])
    assert empty[template.tokens :].all() and 50 < empty[: template.tokens].sum() < 63
    assert (out[empty] == 0).all() and np.isfinite(out).all()


@pytest.mark.slow
def test_large_scores_do_not_overflow():
    schedule = mixed_schedule()
    q, k, v = random_arrays(schedule.query_rows, 4, 1, 64, "float32")
    out, _ = prefill(1e3 * q, k, v, schedule, np.arange(4), scale=10.0)
    wanted, _ = dense_softmax(1e3 * q, k, v, schedule, range(4), 10.0, RAGGED.tokens)
    # Scores of 1e5 are rounded to 1e-2: where two compete closely, weights follow that.
    assert np.isfinite(out).all()
    assert np.median(np.abs(out - wanted)) < 1e-6


KEY_ROWS = 704
ANOTHER = Template.from_segments([Text(3), Image(20), Text(4)])
TWO_CONVERSATIONS = Spans(
    (RAGGED, ANOTHER),
    (Span(30, RAGGED.tokens, 0), Span(0, ANOTHER.tokens, 1)),
    (Span(0, ANOTHER.tokens, 1), Span(0, 70, 0), Span(70, RAGGED.tokens, 0)),
    (0, 30, 101),
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "visibility", [CAUSAL, Visibility(True, window=11)], ids=["causal", "windowed"]
)
def test_chunks_turns_and_batches_read_one_layer_of_a_cache(visibility):
    """Some queries of several conversations; heads of text rows are stacked, long tiles split."""
    all_q, k, v = random_arrays(KEY_ROWS, 4, 2, 16, "float32")
    k, v = jnp.stack([k, -k]), jnp.stack([v, 2 * v])

    @settings(max_examples=EXAMPLES)
    @given(
        placed=spans,
        stacked_heads=st.sampled_from([0, 2]),
        categories=st.lists(st.sampled_from(HeadCategory), min_size=4, max_size=4),
        layer=st.integers(0, 1),
    )
    @example(TWO_CONVERSATIONS, 2, EVERY_CATEGORY, 1)
    def run(placed, stacked_heads, categories, layer):
        queries = Rows(placed.templates, placed.queries, packed=True)
        keys = Rows(placed.templates, placed.keys, packed=True, first_row=placed.first_key_rows)
        schedule = build_span_schedule(
            queries,
            keys,
            [category.groups for category in HeadCategory],
            block_q=16,
            block_kv=16,
            visibility=visibility,
            query_rows=queries.tokens + 5,
            key_rows=KEY_ROWS,
            stacked_heads=stacked_heads,
            capacity=Capacity(4, 16, 8),
            most_parts=12,
        )
        if placed is TWO_CONVERSATIONS:
            assert schedule.parts.tile[0] < schedule.parts.count, "no tile is split"
        real = queries.tokens
        q = all_q[: real + 5]
        out, lse = prefill(
            q, k, v, schedule, np.asarray(categories, np.int32), np.int32(layer), scale=0.25
        )
        query, key = schedule.queries, schedule.keys
        for head, category in enumerate(categories):
            seen = visible(
                TokenInfo(*(part[:real, None] for part in query)),
                TokenInfo(*(part[None, :] for part in key)),
                category.groups,
                visibility,
            )
            keys_of_head = np.asarray(k[layer, :, head // 2], np.float64)
            values = np.asarray(v[layer, :, head // 2], np.float64)
            scores = 0.25 * np.asarray(q[:real, head], np.float64) @ keys_of_head.T
            scores = np.where(seen, scores, -np.inf)
            wanted_lse = np.logaddexp.reduce(scores, axis=1)
            weights = np.exp(scores - np.where(seen.any(axis=1), wanted_lse, 0)[:, None])
            np.testing.assert_allclose(lse[:real, head], wanted_lse, atol=5e-6, rtol=5e-6)
            np.testing.assert_allclose(out[:real, head], weights @ values, atol=5e-6, rtol=5e-6)
        assert (out[real:] == 0).all() and np.isneginf(lse[real:]).all(), "padding rows"

    # Tiles of three blocks and more are split.
    with mock.patch("bsjax.masks.schedule.LONGEST_TILE", 2):
        run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype", "group"),
    [
        (64, "bfloat16", 20),
        (80, "float16", 3),
        (256, "float32", 5),
    ],
)
def test_decoding_agrees_with_softmax(head_dim, dtype, group):
    block = {64: 128, 80: 64, 256: 16}[head_dim]
    rows = 2 * block + 5
    lengths = [rows, rows - 6]
    check_decode(decode, lengths, rows, head_dim=head_dim, dtype=dtype, group=group, own=True)


@pytest.mark.parametrize("own", [False, True])
def test_lengths_at_every_edge_of_a_block_share_one_batch(own):
    check_decode(decode, EDGES, 100, own=own, kv_heads=1, group=3, layer=2)


@pytest.mark.slow
def test_more_splits_than_fit_into_one_block_are_combined():
    check_decode(decode, [400], 400, kv_heads=1, group=1, splits=90)
