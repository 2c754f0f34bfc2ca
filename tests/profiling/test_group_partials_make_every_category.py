"""Partials of the five key groups combine to what every category, and dense, computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax.attention import ragged_attention
from bsjax.attention.reference import reference_attention
from bsjax.errors import MaskError
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory
from bsjax.masks.schedule import build_schedule, without_text_queries
from bsjax.masks.template import Image, Sinks, Template, Text
from bsjax.masks.visibility import Visibility
from bsjax.profiling.groups import (
    GROUPS,
    SPARSE_CATEGORIES,
    dense_output,
    group_partials,
    group_schedule,
    head_statistics,
)
from tests.support import templates

ROWS = 224
Q_HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = HEAD_DIM**-0.5


def arrays(seed=0):
    generator = np.random.default_rng(seed)
    shapes = [(ROWS, heads, HEAD_DIM) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]
    return [jnp.asarray(2 * generator.normal(size=shape), jnp.float32) for shape in shapes]


@partial(jax.jit, static_argnames="backend")
def partials_of(q, k, v, schedule, backend):
    partials = group_partials(q, k, v, schedule, scale=SCALE, backend=backend)
    dense, lse = dense_output(partials)
    combined = [partials.combined(category.groups) for category in HeadCategory]
    is_image = jnp.asarray(schedule.queries.image) >= 0
    return partials, combined, head_statistics(partials, dense, lse, is_image)


@jax.jit
def expected_of(q, k, v, schedule):
    return [
        reference_attention(q, k, v, schedule, jnp.full(Q_HEADS, category), SCALE)
        for category in HeadCategory
    ]


def schedules(template, visibility):
    groups = group_schedule(template, visibility, block_q=16, block_kv=16, tokens=ROWS)
    categories = build_schedule(
        template,
        [category.groups for category in HeadCategory],
        block_q=16,
        block_kv=16,
        tokens=ROWS,
        visibility=visibility,
    )
    return groups, categories


@pytest.mark.slow
@settings(max_examples=25)
@given(
    templates.templates,
    st.sampled_from([Visibility(), Visibility(True, None), Visibility(True, 9)]),
    st.integers(0, 9),
)
def test_every_category_comes_out_of_one_pass(template, visibility, seed):
    q, k, v = arrays(seed)
    groups, categories = schedules(template, visibility)
    np.testing.assert_array_equal(groups.queries.position, categories.queries.position)
    _, combined, _ = partials_of(q, k, v, groups, "xla")
    for (out, lse), (wanted, wanted_lse) in zip(
        combined, expected_of(q, k, v, categories), strict=True
    ):
        # Two float32 computations with sums in different orders: 40 units of rounding at 1.
        np.testing.assert_allclose(out, wanted, atol=5e-6, rtol=1e-5)
        np.testing.assert_allclose(lse, wanted_lse, atol=5e-6, rtol=1e-5)


PROMPT = Template.from_segments(
    [Text(5), Image(20), Text(3), Image(33), Image(9), Text(2), Image(40), Text(7)],
    Sinks(1, (4, 11)),
)


@pytest.mark.parametrize(
    "backend", ["xla", "reference", pytest.param("pallas", marks=pytest.mark.slow)]
)
def test_statistics_are_those_of_the_attention_matrix(backend):
    q, k, v = arrays()
    visibility = Visibility()
    groups, categories = schedules(PROMPT, visibility)
    _, _, statistics = partials_of(q, k, v, groups, backend)

    order = PROMPT.packed_order
    info = PROMPT.info
    position, image = info.position[order], info.image[order]
    keys = np.repeat(np.asarray(k), Q_HEADS // KV_HEADS, axis=1)[: PROMPT.tokens]
    scores = np.einsum("qhd,khd->hqk", np.asarray(q)[: PROMPT.tokens], keys) * SCALE
    scores = np.where(position[None, :] <= position[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    for index, group in enumerate(GROUPS):
        seen = templates.visible_matrix(PROMPT, group)
        seen = seen[order][:, order] & (image >= 0)[:, None]
        mass = np.where(seen, weights, 0).sum(axis=(1, 2)) / (image >= 0).sum()
        np.testing.assert_allclose(statistics.mass[:, index], mass, atol=5e-6)
    np.testing.assert_allclose(statistics.mass.sum(axis=1), 1, atol=1e-5)

    expected = expected_of(q, k, v, categories)
    rows = np.flatnonzero(image >= 0)
    dense = np.asarray(expected[0][0])[rows]
    for index, category in enumerate(SPARSE_CATEGORIES):
        difference = np.asarray(expected[category][0])[rows] - dense
        error = np.sqrt((difference**2).sum(axis=(0, 2)) / (dense**2).sum(axis=(0, 2)))
        np.testing.assert_allclose(statistics.error[:, index], error, rtol=1e-4)
        assert np.all(error > 0.01)


def test_text_rows_are_visited_once():
    groups, _ = schedules(PROMPT, Visibility())
    text_rows = np.flatnonzero(PROMPT.image < 0).size
    with_blocks = groups.tiles.blocks > 0
    of_text = groups.tiles.first_row < text_rows
    assert np.any(with_blocks[0] & of_text)
    assert not np.any(with_blocks[1:] & of_text[1:])
    # Rows stay where they were, and the longest tiles first.
    assert np.all(groups.tiles.rows.sum(axis=1) == ROWS)
    assert np.all(np.diff(groups.tiles.blocks, axis=1) <= 0)
    assert np.all(np.diff((groups.tiles.rows > 0).astype(int), axis=1) <= 0)

    partials, _, _ = partials_of(*arrays(), groups, "xla")
    assert np.all(np.isneginf(partials.lse[1:, :text_rows]))
    assert np.all(np.isfinite(partials.lse[0, :text_rows]))


def test_all_groups_together_cost_one_dense_attention():
    """Visited blocks, against those of image-aligned dense tiles."""
    template = Template.from_segments([Text(8), *([Text(4), Image(400)] * 12), Text(20)])
    groups = group_schedule(template, Visibility(), block_q=64, block_kv=32)
    dense = build_schedule(
        template, [ALL_KEY_GROUPS, HeadCategory.SINK.groups], block_q=64, block_kv=32
    )
    visited = groups.tiles.blocks.sum()
    assert visited < 1.25 * dense.tiles.blocks[0].sum()


def test_prompt_order_is_refused():
    schedule = build_schedule(PROMPT, [ALL_KEY_GROUPS], block_q=16, block_kv=16)
    with pytest.raises(MaskError, match="packed order"):
        without_text_queries(schedule, [0])


def test_dense_rows_of_text_are_dense():
    q, k, v = arrays()
    groups, categories = schedules(PROMPT, Visibility())
    partials, _, _ = partials_of(q, k, v, groups, "reference")
    dense = ragged_attention(
        q, k, v, categories, jnp.zeros(Q_HEADS, jnp.int32), scale=SCALE, backend="xla"
    )
    text_rows = np.flatnonzero(PROMPT.image < 0).size
    np.testing.assert_allclose(partials.out[0][:text_rows], dense[:text_rows], atol=3e-6)
