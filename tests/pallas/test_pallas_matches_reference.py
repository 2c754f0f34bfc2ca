"""The GPU kernel, interpreted, is the dense softmax under the predicate for every schedule."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax import BackendError, HeadCategory, Image, Template, Text
from bsjax.masks.schedule import build_schedule, category_tables, segment_schedule
from bsjax.masks.visibility import Visibility
from bsjax.pallas.configurations import default_blocks
from bsjax.pallas.prefill import prefill_attention
from tests.support.prefill_cases import (
    EVERY_CATEGORY,
    RAGGED,
    check_prefill,
    dense_softmax,
    mixed_schedule,
    on_random_templates,
    random_arrays,
)

interpreted = jax.jit(
    partial(prefill_attention, interpret=True, return_lse=True), static_argnames="scale"
)
check = partial(check_prefill, interpreted)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_head_dim_is_right_in_every_dtype(head_dim, dtype):
    tolerance = 3e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    check(
        mixed_schedule(),
        RAGGED.tokens,
        EVERY_CATEGORY,
        kv_heads=2,
        head_dim=head_dim,
        dtype=dtype,
        tolerance=tolerance,
    )


@pytest.mark.slow
@pytest.mark.parametrize("group", range(1, 9))
def test_grouped_queries_may_have_different_categories(group):
    head_category = [(3 * head + head // 4) % 4 for head in range(2 * group)]
    check(mixed_schedule(), RAGGED.tokens, head_category, kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [(16, 16), (128, 64), (16, 128), (64, 32), (64, 64)])
def test_every_block_size_gives_the_same_result(blocks):
    schedule = mixed_schedule(block_q=blocks[0], block_kv=blocks[1])
    check(schedule, RAGGED.tokens, EVERY_CATEGORY)


@pytest.mark.slow
def test_the_default_blocks_give_the_same_result():
    block_q, block_kv = default_blocks(128, "bfloat16", sparse=True)
    template = Template.from_segments([Text(150), Image(300), Text(5), Image(200), Text(9)])
    schedule = mixed_schedule(template, block_q, block_kv, tokens=768)
    assert schedule.tiles.full_blocks.any(axis=1).all(), "every category should have some"
    check(
        schedule,
        template.tokens,
        EVERY_CATEGORY,
        head_dim=128,
        dtype="bfloat16",
        tolerance=2 * float(jnp.finfo("bfloat16").eps),
    )


@pytest.mark.slow
@on_random_templates(20)
def test_random_templates_with_windows_and_bidirectional_images_agree(
    template, head_category, visibility, seed
):
    # One shape for all examples, so that they share their programs.
    schedule = build_schedule(
        template,
        category_tables(head_category),
        block_q=16,
        block_kv=16,
        tokens=288,
        visibility=visibility,
    )
    head_category = (head_category * 4)[:4]
    check(schedule, template.tokens, head_category, kv_heads=2, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("lengths", [[1], [64, 64], [1, 100, 37, 2, 5], [16] * 9])
def test_segments_of_a_vision_tower_see_only_themselves(lengths):
    schedule = segment_schedule(lengths, block_q=32, block_kv=32, tokens=sum(lengths) + 7)
    head_category = [HeadCategory.INTRA_IMAGE] * 2
    check(schedule, sum(lengths), head_category, kv_heads=2, head_dim=80)


def test_fewer_tokens_than_one_block_are_enough():
    template = Template.from_segments([Text(2), Image(3)])
    schedule = mixed_schedule(template, 128, 64)
    assert schedule.query_rows == 5
    check(schedule, 5, EVERY_CATEGORY)


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
    out, lse = prefill_attention(
        q, k, v, schedule, jnp.array([1]), scale=0.125, return_lse=True, interpret=True
    )
    empty = np.isneginf(np.asarray(lse)[:, 0])
    assert empty[template.tokens :].all() and 50 < empty[: template.tokens].sum() < 63
    assert (np.asarray(out)[empty] == 0).all() and np.isfinite(out).all()


def test_large_scores_do_not_overflow():
    schedule = mixed_schedule()
    q, k, v = random_arrays(schedule.query_rows, 4, 1, 64, "float32")
    head_category = jnp.arange(4)
    out = prefill_attention(1e3 * q, k, v, schedule, head_category, scale=10.0, interpret=True)
    wanted, _ = dense_softmax(1e3 * q, k, v, schedule, range(4), 10.0, RAGGED.tokens)
    # Scores of 1e5 are rounded to 1e-2: where two compete closely, weights follow that.
    assert np.isfinite(out).all()
    assert np.median(np.abs(np.asarray(out) - wanted)) < 1e-6


def test_another_template_of_the_same_shape_compiles_nothing():
    attend = jax.jit(partial(prefill_attention, scale=0.125, interpret=True))
    other = Template.from_segments([Text(20), Image(70), Text(11)])
    q, k, v = random_arrays(128, 4, 2, 64, "float32")
    for template in (RAGGED, other):
        attend(q, k, v, mixed_schedule(template, tokens=128), jnp.arange(4))
    attend(q, k, v, mixed_schedule(tokens=128), jnp.array([3, 3, 0, 0]))
    assert attend._cache_size() == 1


def test_what_the_kernel_cannot_do_is_refused():
    schedule = mixed_schedule()
    tokens = schedule.query_rows
    q, k, v = random_arrays(tokens, 4, 2, 64, "float32")
    every = jnp.arange(4)
    with pytest.raises(BackendError, match="power of two of at least 16, got 24"):
        prefill_attention(q, k, v, mixed_schedule(block_kv=24), every, scale=1.0)
    with pytest.raises(BackendError, match="up to 256, got 512"):
        wide = random_arrays(tokens, 4, 2, 512, "float32")
        prefill_attention(*wide, schedule, every, scale=1.0)
    with pytest.raises(BackendError, match="not in float64"):
        default_blocks(64, "float64", sparse=True)
