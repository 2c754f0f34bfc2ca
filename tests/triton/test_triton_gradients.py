"""The Triton kernels of the gradients, interpreted, compute what the XLA backend computes.

The cases are those of the forward kernels.
"""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bsjax import HeadCategory, Image, Template, Text
from bsjax.attention.xla import attention_gradients, xla_attention
from bsjax.gpu.configurations import KernelConfiguration
from bsjax.masks.rows import Rows
from bsjax.masks.schedule import build_schedule, build_span_schedule, category_tables
from bsjax.masks.transposed import with_transposed
from bsjax.masks.visibility import CAUSAL, Visibility
from tests.support.parity import torch
from tests.support.prefill_cases import (
    EVERY_CATEGORY,
    SHORT,
    mixed_schedule,
    on_random_templates,
    random_arrays,
)
from tests.support.triton_interpreter import interpreted, require_triton
from tests.triton.test_triton_matches_reference import TWO_CONVERSATIONS

require_triton()
pytestmark = pytest.mark.skipif(torch is None, reason="Triton's interpreter needs torch")
wanted_gradients = jax.jit(attention_gradients, static_argnums=0)
forward = jax.jit(xla_attention, static_argnums=6)


def check(
    schedule,
    head_category,
    *,
    kv_heads=1,
    head_dim=16,
    dtype="float32",
    block=32,
    layer=None,
    seed=0,
    **options,
):
    q, _, _ = random_arrays(schedule.query_rows, len(head_category), 1, head_dim, dtype, seed)
    _, k, v = random_arrays(schedule.key_rows, 1, kv_heads, head_dim, dtype, seed + 1)
    out_gradient, *_ = random_arrays(*q.shape[:2], 1, head_dim, dtype, seed + 2)
    k, v = (jnp.stack([array, -array]) if layer is not None else array[None] for array in (k, v))
    head_category = jnp.asarray(head_category, jnp.int32)
    scale = head_dim**-0.5
    arguments = q, k, v, schedule, head_category, jnp.int32(layer or 0)
    out, lse = forward(*arguments, scale)
    gradients = out_gradient, out_gradient[..., 0].astype(jnp.float32)
    wanted = wanted_gradients(scale, (*arguments, out, lse), gradients)[:3]
    found = interpreted(
        "bsjax.triton.backward:attention_gradients",
        q,
        k,
        v,
        with_transposed(schedule, block),
        *arguments[4:],
        out,
        lse,
        *gradients,
        scale=scale,
        **options,
    )
    tolerance = 1e-5 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        one, other = (np.asarray(each, np.float32) for each in (one, other))
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head_dim", "dtype"),
    [(72, "bfloat16"), (128, "float16"), (64, "float32")],
)
def test_every_head_dim_is_right_in_every_dtype(head_dim, dtype):
    check(
        mixed_schedule(SHORT, block_q=32, block_kv=32),
        [HeadCategory.INTRA_IMAGE_SINK],
        head_dim=head_dim,
        dtype=dtype,
    )


@pytest.mark.slow
def test_grouped_queries_may_have_different_categories():
    head_category = [(3 * head + head // 4) % 4 for head in range(6)]
    check(mixed_schedule(SHORT, block_q=64, block_kv=32), head_category, kv_heads=2)


def test_several_programs_may_share_a_tile_and_take_several_steps_per_block():
    small = KernelConfiguration(16, 16, 4, 2)
    schedule = mixed_schedule(SHORT, block_q=32, block_kv=32)
    check(schedule, [HeadCategory.INTRA_IMAGE_SINK], of_queries=small, of_keys=small)


@pytest.mark.slow
@on_random_templates(2)
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
    check(schedule, head_category, seed=seed)


def test_gradients_of_keys_that_many_rows_see_are_summed_over_parts():
    """As in a long prompt: the first keys are seen by all rows after them, in several entries."""
    template = Template.from_segments([Text(3), *[Image(20), Text(1)] * 8])
    tables = category_tables([HeadCategory.SINK])
    schedule = build_schedule(template, tables, block_q=32, block_kv=32)
    with mock.patch("bsjax.masks.transposed.LONGEST", 1):
        tiles = with_transposed(schedule, 16).transposed.tiles
        first_keys = tiles.first_key[0][tiles.keys[0] > 0]
        assert np.unique(first_keys).size < first_keys.size, "no tile is split"
        check(schedule, [HeadCategory.SINK], block=16)


def test_fewer_tokens_than_one_block_are_enough():
    template = Template.from_segments([Text(2), Image(3)])
    check(mixed_schedule(template, 128, 64), [HeadCategory.SINK], block=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stacked_heads", "visibility"), [(2, CAUSAL), (0, Visibility(True, window=11))], ids=str
)
def test_turns_of_several_conversations_read_one_layer_of_a_cache(stacked_heads, visibility):
    placed = TWO_CONVERSATIONS
    queries = Rows(placed.templates, placed.queries, packed=True)
    keys = Rows(placed.templates, placed.keys, packed=True, first_row=placed.first_key_rows)
    schedule = build_span_schedule(
        queries,
        keys,
        [category.groups for category in HeadCategory],
        block_q=32,
        block_kv=32,
        visibility=visibility,
        query_rows=queries.tokens + 5,
        key_rows=keys.tokens + 7,
        stacked_heads=stacked_heads,
    )
    check(schedule, EVERY_CATEGORY, kv_heads=2, layer=1)
