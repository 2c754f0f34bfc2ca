"""All backends of `sparse_attention` compute the same result: dense softmax under the predicate."""

import os
from functools import partial
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bsjax
from bsjax import BackendError, BlockMask, HeadCategory, Image, MaskError, Sinks, Template, Text
from bsjax.attention import ragged_attention
from bsjax.masks.rows import Rows
from bsjax.masks.schedule import Capacity, build_span_schedule
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility, visible
from tests.support.pallas import HAS_PALLAS
from tests.support.templates import categories, spans, templates, visibilities, visible_matrix

RAGGED = Template.from_segments(
    [Text(5), Image(37), Text(3), Image(1), Image(20), Text(9), Image(50), Text(1)],
    Sinks(first=1, offsets=(4,)),
)
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "7"))
MIXED = [
    HeadCategory.DENSE,
    HeadCategory.SINK,
    HeadCategory.INTRA_IMAGE,
    HeadCategory.INTRA_IMAGE_SINK,
]


def arrays(tokens, q_heads, kv_heads, head_dim, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    shapes = (
        (tokens, q_heads, head_dim),
        (tokens, kv_heads, head_dim),
        (tokens, kv_heads, head_dim),
    )
    return tuple(jnp.asarray(generator.normal(size=shape), dtype) for shape in shapes)


def dense_softmax(q, k, v, seen, scale):
    """The result in float64 NumPy, head by head; uses nothing of bsjax except its predicate."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for head in range(q.shape[1]):
        kv_head = head // (q.shape[1] // k.shape[1])
        scores = np.where(seen[head], q[:, head] @ k[:, kv_head].T * scale, -np.inf)
        some = seen[head].any(axis=1)
        largest = scores[some].max(axis=1)
        weights = np.exp(scores[some] - largest[:, None])
        lse[some, head] = largest + np.log(weights.sum(axis=1))
        out[some, head] = np.exp(scores[some] - lse[some, head, None]) @ v[:, kv_head]
    return out, lse


def check(template, categories, q, k, v, backend, tolerance, visibility, blocks=(16, 16)):
    mask = BlockMask(
        template, categories, *blocks, visibility.bidirectional_images, visibility.window
    )
    scale = q.shape[-1] ** -0.5
    seen = [visible_matrix(template, category.groups, visibility) for category in categories]
    out, lse = bsjax.sparse_attention(q, k, v, mask, backend=backend, return_lse=True)
    wanted_out, wanted_lse = dense_softmax(q, k, v, seen, scale)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted_out, atol=tolerance, rtol=tolerance
    )
    np.testing.assert_allclose(lse, wanted_lse, atol=tolerance, rtol=tolerance)


VISIBILITIES = [CAUSAL, Visibility(bidirectional_images=True), Visibility(True, window=11)]


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=["causal", "bidirectional", "windowed"])
def test_every_backend_computes_mixed_heads_on_a_ragged_template(backend, visibility):
    q, k, v = arrays(RAGGED.tokens, 4, 2, 64)
    check(RAGGED, MIXED, q, k, v, backend, 3e-6, visibility)


# tests/pallas has the same cases of the kernel.
@pytest.mark.slow
@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 8])
def test_query_heads_share_their_key_heads(group_size):
    q, k, v = arrays(
        RAGGED.tokens, 8 if group_size != 3 else 6, (8 if group_size != 3 else 6) // group_size, 64
    )
    check(RAGGED, (MIXED * 2)[: q.shape[1]], q, k, v, "xla", 3e-6, CAUSAL)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128, 256])
def test_every_head_dimension_of_published_models_is_computed(head_dim):
    q, k, v = arrays(RAGGED.tokens, 4, 2, head_dim)
    check(RAGGED, MIXED, q, k, v, "xla", 3e-6, CAUSAL)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_within_its_rounding(backend, dtype):
    q, k, v = arrays(RAGGED.tokens, 4, 2, 64, dtype)
    check(RAGGED, MIXED, q, k, v, backend, 4 * float(jnp.finfo(dtype).eps), CAUSAL)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    template=templates,
    categories=categories,
    visibility=visibilities,
    blocks=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_xla_is_right_on_random_templates(template, categories, visibility, blocks, seed):
    if not template.tokens:
        return
    q, k, v = arrays(template.tokens, len(categories), 1, 8, seed=seed)
    check(template, categories, q, k, v, "xla", 5e-6, visibility, blocks)


QUERY_ROWS, KEY_ROWS = 256, 704


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "pallas"])
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=["causal", "bidirectional", "windowed"])
def test_chunks_turns_and_batches_read_one_layer_of_a_cache(backend, visibility):
    """Some queries of several conversations against the rows of one layer, heads stacked or not."""
    q, k, v = arrays(KEY_ROWS, 4, 2, 16)
    q, k, v = q[:QUERY_ROWS], jnp.stack([k, -k]), jnp.stack([v, 2 * v])
    attend = jax.jit(partial(ragged_attention, scale=0.25, backend=backend, return_lse=True))

    @settings(max_examples=EXAMPLES)
    @given(
        placed=spans,
        stacked_heads=st.sampled_from([0, 2]),
        categories=st.lists(st.sampled_from(HeadCategory), min_size=4, max_size=4),
        layer=st.integers(0, 1),
        sinks_apart=st.booleans(),
    )
    def run(placed, stacked_heads, categories, layer, sinks_apart):
        queries = Rows(placed.templates, placed.queries, packed=True, sinks_apart=sinks_apart)
        keys = Rows(placed.templates, placed.keys, packed=True, first_row=placed.first_key_rows)
        schedule = build_span_schedule(
            queries,
            keys,
            [category.groups for category in HeadCategory],
            block_q=16,
            block_kv=16,
            visibility=visibility,
            query_rows=QUERY_ROWS,
            key_rows=KEY_ROWS,
            stacked_heads=stacked_heads,
            capacity=Capacity(256, 4096, 512),
            most_parts=12 if backend == "pallas" else 0,
        )
        real = queries.tokens
        out, lse = attend(q, k, v, schedule, jnp.asarray(categories, jnp.int32), jnp.int32(layer))
        query, key = schedule.queries, schedule.keys
        seen = [
            visible(
                TokenInfo(*(part[:real, None] for part in query)),
                TokenInfo(*(part[None, :] for part in key)),
                category.groups,
                visibility,
            )
            for category in categories
        ]
        wanted_out, wanted_lse = dense_softmax(q[:real], k[layer], v[layer], seen, 0.25)
        np.testing.assert_allclose(out[:real], wanted_out, atol=5e-6, rtol=5e-6)
        np.testing.assert_allclose(lse[:real], wanted_lse, atol=5e-6, rtol=5e-6)
        assert (out[real:] == 0).all() and np.isneginf(lse[real:]).all(), "padding rows"

    # Tiles of three blocks and more are split.
    with mock.patch("bsjax.masks.schedule.LONGEST_TILE", 2):
        run()


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
def test_queries_of_a_chunk_equal_those_of_the_whole_prompt(backend):
    q, k, v = arrays(RAGGED.tokens, 4, 2, 64)
    whole = bsjax.sparse_attention(q, k, v, BlockMask(RAGGED, MIXED, 16, 16), backend="reference")
    for chunk in (range(0, 40), range(40, 41), range(41, RAGGED.tokens)):
        mask = BlockMask(RAGGED, MIXED, 16, 16, queries=chunk)
        out = bsjax.sparse_attention(q[chunk.start : chunk.stop], k, v, mask, backend=backend)
        np.testing.assert_allclose(out, whole[chunk.start : chunk.stop], atol=3e-6)


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
def test_prompts_of_a_batch_do_not_see_each_other(backend):
    other = Template.from_segments([Image(30), Text(17)])
    alone = [
        arrays(template.tokens, 4, 2, 64, seed=i) for i, template in enumerate((RAGGED, other))
    ]
    q, k, v = map(jnp.concatenate, zip(*alone, strict=True))
    mask = BlockMask([RAGGED, other], MIXED, 16, 16, queries=[range(3, 126), range(20, 47)])
    out = bsjax.sparse_attention(jnp.concatenate([q[3:126], q[146:]]), k, v, mask, backend=backend)
    expected = [
        bsjax.sparse_attention(*arrays, BlockMask(template, MIXED, 16, 16), backend="reference")
        for template, arrays in zip((RAGGED, other), alone, strict=True)
    ]
    np.testing.assert_allclose(out, jnp.concatenate([expected[0][3:], expected[1][20:]]), atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [None, range(30, 90)], ids=["whole", "chunk"])
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=["causal", "bidirectional", "windowed"])
def test_xla_gradients_are_those_of_the_reference(visibility, queries):
    q, k, v = arrays(RAGGED.tokens, 4, 2, 16)
    q = q if queries is None else q[queries.start : queries.stop]
    mask = BlockMask(
        RAGGED, MIXED, 16, 8, visibility.bidirectional_images, visibility.window, queries
    )
    weights = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(q, k, v, backend):
        out, lse = bsjax.sparse_attention(q, k, v, mask, backend=backend, return_lse=True)
        lse = jnp.where(jnp.isneginf(lse), 0.0, lse)
        return (out * weights).sum() + 0.3 * jnp.sin(lse).sum()

    ours = jax.grad(loss, (0, 1, 2))(q, k, v, "xla")
    wanted = jax.grad(loss, (0, 1, 2))(q, k, v, "reference")
    for gradient, reference in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_gradients_survive_rows_that_see_nothing(backend):
    template = Template.from_segments([Text(2), Image(40), Text(1)])
    mask = BlockMask(template, [HeadCategory.SINK], 16, 16, window=3)
    q, k, v = arrays(template.tokens, 1, 1, 16)

    def loss(q, k, v, backend):
        out, lse = bsjax.sparse_attention(q, k, v, mask, backend=backend, return_lse=True)
        # The gradient of the log-sum-exp of an empty row is 0 * cos(-inf), which is NaN.
        return jnp.sin(out).sum() + jnp.where(jnp.isneginf(lse), 0.0, jnp.sin(lse)).sum()

    ours = jax.grad(loss, (0, 1, 2))(q, k, v, backend)
    wanted = jax.grad(loss, (0, 1, 2))(q, k, v, "reference")
    for gradient, reference in zip(ours, wanted, strict=True):
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient, reference, atol=2e-5, rtol=2e-5)


def test_rows_that_see_nothing_are_zero_in_every_backend():
    # With SINK, a window of 3 and an image of 40 tokens, most image tokens see no sink and no text.
    template = Template.from_segments([Text(2), Image(40), Text(1)])
    mask = BlockMask(template, [HeadCategory.SINK], 16, 16, window=3)
    q, k, v = arrays(template.tokens, 1, 1, 64)
    empty = ~visible_matrix(template, HeadCategory.SINK.groups, Visibility(window=3)).any(axis=1)
    assert empty.sum() > 30
    for backend in ("reference", "xla", *["pallas"] * HAS_PALLAS):
        out, lse = bsjax.sparse_attention(q, k, v, mask, backend=backend, return_lse=True)
        assert (out[empty] == 0).all() and np.isneginf(lse[empty]).all()
        assert np.isfinite(lse[~empty]).all()


def test_masks_of_one_shape_share_a_program():
    def attend(q, k, v, mask):
        nonlocal traces
        traces += 1
        return bsjax.sparse_attention(q, k, v, mask)

    traces = 0
    jitted = jax.jit(attend)
    q, k, v = arrays(60, 2, 1, 16)
    for segments in ([Text(10), Image(40), Text(10)], [Text(4), Image(25), Text(1), Image(30)]):
        mask = BlockMask(Template.from_segments(segments), [1, 2])
        np.testing.assert_allclose(
            jitted(q, k, v, mask),
            bsjax.sparse_attention(q, k, v, mask, backend="reference"),
            atol=3e-6,
        )
    assert traces == 1


def test_the_caller_can_set_the_scale():
    q, k, v = arrays(RAGGED.tokens, 2, 1, 16)
    mask = BlockMask(RAGGED, [0, 3])
    for backend in ("xla", "reference"):
        scaled = bsjax.sparse_attention(q, k, v, mask, scale=0.7, backend=backend)
        expected = bsjax.sparse_attention(q * 0.7 * 4, k, v, mask, backend=backend)
        np.testing.assert_allclose(scaled, expected, atol=3e-6)


def test_bad_input_is_refused_with_a_reason():
    mask = BlockMask(RAGGED, [0, 3])
    q, k, v = arrays(RAGGED.tokens, 2, 1, 16)
    with pytest.raises(BackendError, match="cuda.*auto, pallas, triton, xla, reference"):
        bsjax.sparse_attention(q, k, v, mask, backend="cuda")
    with pytest.raises(MaskError, match="mask is for 126 queries and 126 keys"):
        bsjax.sparse_attention(q[:5], k[:5], v[:5], mask)
    with pytest.raises(MaskError, match="mask is for 2 query heads"):
        bsjax.sparse_attention(q[:, :1], k, v, mask)
    with pytest.raises(MaskError, match="scale .* above 0"):
        bsjax.sparse_attention(q, k, v, mask, scale=0.0)
    with pytest.raises(MaskError, match="at least one head"):
        bsjax.sparse_attention(q, k[:, :0], v[:, :0], mask)
    with pytest.raises(MaskError, match="one dtype"):
        bsjax.sparse_attention(q, k.astype(jnp.bfloat16), v, mask)
    with pytest.raises(MaskError, match="multiple of the key-value heads"):
        bsjax.sparse_attention(q, *arrays(RAGGED.tokens, 3, 3, 16)[1:], mask)


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
def test_ragged_attention_refuses_bad_input_too(backend):
    mask = BlockMask(RAGGED, [0, 3], 16, 16)
    attend = partial(
        ragged_attention,
        schedule=mask.schedule,
        head_category=jnp.asarray(mask.head_category),
        backend=backend,
    )
    q, k, v = arrays(RAGGED.tokens, 2, 1, 16)
    with pytest.raises(MaskError, match="above 0, got -1"):
        attend(q, k, v, scale=-1.0)
    with pytest.raises(MaskError, match="one dtype"):
        attend(q, k.astype(jnp.bfloat16), v, scale=1.0)
    with pytest.raises(MaskError, match="mask is for 126 queries and 126 keys"):
        attend(q[:5], k[:5], v[:5], scale=1.0)


def test_categories_can_be_given_by_name():
    names = ["dense", "Intra-Image", " INTRA_IMAGE_SINK", HeadCategory.SINK, 2]
    assert BlockMask(RAGGED, names).categories == (0, 2, 3, 1, 2)
    with pytest.raises(MaskError, match="'own' is not a valid head category; .*INTRA_IMAGE_SINK"):
        BlockMask(RAGGED, ["own"])


@pytest.mark.parametrize("backend", ["xla", "reference", "pallas"])
def test_an_empty_prompt_gives_an_empty_output(backend):
    mask = BlockMask(Template.from_segments([]), [0, 1], 16, 16)
    q, k, v = arrays(0, 2, 1, 16)
    assert bsjax.sparse_attention(q, k, v, mask, backend=backend).shape == (0, 2, 16)
