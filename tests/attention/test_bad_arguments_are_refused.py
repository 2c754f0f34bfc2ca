"""Masks and attention refuse bad arguments of any kind with a one-line error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import (
    BackendError,
    BlockMask,
    Image,
    MaskError,
    Sinks,
    Template,
    TemplateError,
    Text,
)
from bsjax.checks import shown
from tests.support.refusals import HUGE, refused

# Their sum is 2 in 64 bits.
WRAPS = np.array([2**63 - 1, 2**63 - 1, 4])
TEMPLATE = Template.from_segments([Text(3), Image(5)])
MASK = BlockMask(TEMPLATE, ["DENSE", "SINK"], 16, 16)
Q = jnp.asarray(np.random.default_rng(0).normal(size=(8, 2, 16)), jnp.float32)

pytestmark = pytest.mark.usefixtures("annotations_unchecked")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((Q, Q, Q, None), "mask must be a bsjax.BlockMask, got NoneType"),
        ((Q, Q, Q, TEMPLATE), "mask must be a bsjax.BlockMask, got Template"),
        ((Q.tolist(), Q, Q, MASK), "q must be a JAX or NumPy array, got list"),
        ((Q, None, Q, MASK), "k must be a JAX or NumPy array, got NoneType"),
        ((Q, Q, "v", MASK), "v must be a JAX or NumPy array, got str"),
        ((np.float64(Q),) * 3 + (MASK,), "must have one dtype"),
        ((np.array(Q, object), Q, Q, MASK), "must have one dtype"),
        ((Q[0], Q, Q, MASK), "Attention needs q [queries, q_heads, head_dim]"),
    ],
)
def test_arrays_and_masks(arguments, words):
    refused(lambda: bsjax.sparse_attention(*arguments), MaskError, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"template": [TEMPLATE, 3]}, "got int in it"),
        ({"template": 3}, "template must be a bsjax.Template or a list of one or more, got int"),
        ({"queries": 3}, "a range of positions for each of 1 prompts, got 3"),
        ({"queries": [3]}, "consecutive positions, got 3"),
    ],
)
def test_templates_and_queries(arguments, words):
    refused(
        lambda: BlockMask(**({"template": TEMPLATE, "categories": [0]} | arguments)),
        MaskError,
        words,
    )


@pytest.mark.parametrize("backend", ["xla", "pallas", "reference"])
@pytest.mark.parametrize(
    "scale",
    [
        "x",
        0,
        -1,
        float("inf"),
        float("nan"),
        1e-60,
        1e60,
        10**400,
        HUGE,
        True,
        [1],
        1j,
        jnp.ones(3),
    ],
    ids=shown,
)
def test_scales_that_are_not_valid(backend, scale):
    refused(
        lambda: bsjax.sparse_attention(Q, Q, Q, MASK, scale=scale, backend=backend),
        MaskError,
        "must be a number above 0 that float32 can hold",
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "pallas", "reference"])
def test_a_traced_scale_is_the_same_scale(backend):
    def attend(scale, backend=backend):
        return bsjax.sparse_attention(Q, Q, 2 * Q, MASK, scale=scale, backend=backend)

    np.testing.assert_allclose(jax.jit(attend)(0.3), attend(0.3), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.jit(attend)(2), attend(2), rtol=1e-5, atol=1e-6)
    refused(lambda: jax.jit(attend)(jnp.ones(3)), MaskError, "A traced scale must be one number")


@pytest.mark.slow
def test_a_traced_scale_has_a_gradient():
    def loss(scale):
        out = bsjax.sparse_attention(Q, Q, Q, MASK, scale=scale, backend="xla")
        return jnp.sum(out * jnp.cos(Q))

    step = 1e-2
    slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    assert abs(slope) > 0.01
    np.testing.assert_allclose(jax.grad(loss)(0.3), slope, rtol=1e-2)


@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_gradients_of_gradients(backend):
    def loss(q):
        return bsjax.sparse_attention(q, Q, Q, MASK, backend=backend).sum()

    refused(
        lambda: jax.grad(lambda q: (jax.grad(loss)(q) ** 2).sum())(Q),
        BackendError,
        "first-order gradients only",
    )


@pytest.mark.parametrize("backend", [None, 3, ["xla"], np.array(["xla"]), "cuda"])
def test_backends_that_do_not_exist(backend):
    refused(
        lambda: bsjax.sparse_attention(Q, Q, Q, MASK, backend=backend),
        BackendError,
        "Unknown attention backend",
    )


@pytest.mark.parametrize("value", [None, 3, [1], "yes"])
def test_flags_that_are_not_valid(value):
    refused(
        lambda: bsjax.sparse_attention(Q, Q, Q, MASK, return_lse=value),
        MaskError,
        "return_lse must be True or False",
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"template": None}, "template must be a bsjax.Template"),
        ({"categories": None}, "categories must be a list"),
        ({"categories": 3}, "categories must be a list"),
        ({"categories": "DENSE"}, "categories must be a list"),
        ({"categories": np.array(1)}, "categories must be a list"),
        ({"categories": [None]}, "not a valid head category"),
        ({"categories": [[1]]}, "not a valid head category"),
        ({"categories": [float("nan")]}, "not a valid head category"),
        ({"block_q": "x"}, "block_q must be a whole number"),
        ({"block_q": HUGE}, "block_q must be at most 65536"),
        ({"block_kv": 1.5}, "block_kv must be a whole number"),
        ({"block_kv": 10**30}, "block_kv must be at most 65536"),
        ({"window": "x"}, "window must be a whole number"),
        ({"window": 10**30}, "window must be at most"),
        ({"bidirectional_images": [1]}, "bidirectional_images must be True or False"),
    ],
    ids=shown,
)
def test_block_masks(arguments, words):
    valid = {"template": TEMPLATE, "categories": ["DENSE"]}
    refused(lambda: BlockMask(**(valid | arguments)), MaskError, words)


def test_a_mask_keeps_the_prompts_that_it_was_built_for():
    prompts = [TEMPLATE, TEMPLATE]
    mask = BlockMask(prompts, ["DENSE"])
    prompts.pop()
    assert mask.dense_pairs == 2 * BlockMask(TEMPLATE, ["DENSE"]).dense_pairs


def test_the_name_of_a_picture():
    refused(lambda: MASK.plot(5), MaskError, "path must be the name of a file")


@pytest.mark.parametrize("head", ["x", None, 1.5, -1, 2, HUGE], ids=shown)
def test_heads_that_a_mask_does_not_have(head):
    for use in (MASK.to_dense, lambda head: MASK.plot(head=head)):
        with pytest.raises(MaskError, match=r"^head must be|^Head .* does not exist"):
            use(head)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Template.from_segments(None), "segments must be a list"),
        (lambda: Template.from_segments([3]), "A segment must be Text(n) or Image(n)"),
        (lambda: Template.from_segments([Text("x")]), "must be a whole number"),
        (lambda: Template.from_segments([Text(10**30)]), "at most 100,000,000 tokens"),
        (lambda: Template.from_segments([Image(4)], 3), "sinks must be bsjax.Sinks"),
        (lambda: Template.from_tokens(None, 3), "token_ids must be whole numbers"),
        (lambda: Template.from_tokens("abc", 3), "token_ids must be whole numbers"),
        (lambda: Template.from_tokens([1.5], 3), "token_ids must be whole numbers"),
        (lambda: Template.from_tokens([[1], [2, 3]], 3), "token_ids must be whole numbers"),
        (lambda: Template.from_tokens([10**30], 3), "token_ids must be whole numbers"),
        (lambda: Template.from_tokens([[1]], 3), "must be one prompt"),
        (lambda: Template.from_tokens([1, 3], "x"), "image_token_id must be a whole number"),
        (lambda: Template.from_tokens([1, 3], 3, "x"), "sinks must be bsjax.Sinks"),
        (lambda: Template.from_tokens([3], 3, image_tokens="x"), "image_tokens must be whole"),
        (lambda: Template.from_tokens([3, 3], 3, image_tokens=WRAPS), "image_tokens adds up to"),
        (lambda: Template.from_tokens(np.array([2**64 - 1], np.uint64), -1), "must fit 64 bits"),
        (lambda: Template(None, [True]), "image numbers must be whole numbers"),
        (lambda: Template("ab", [True, False]), "image numbers must be whole numbers"),
        (lambda: Template([0, [1]], [True, True]), "image numbers must be whole numbers"),
        (lambda: Template([0.5], [True]), "image numbers must be whole numbers"),
        (lambda: Template([2**40], [True]), "must be numbered from 0"),
        (lambda: Template([0], ["yes"]), "sinks must be True or False"),
        (lambda: Sinks("x"), "`first` must be a whole number"),
        (lambda: Sinks(1, "ab"), "`offsets` must be a tuple of whole numbers"),
        (lambda: Sinks(1, 3), "`offsets` must be a tuple of whole numbers"),
    ],
)
def test_templates_and_sinks(build, words):
    refused(build, TemplateError, words)


def test_a_model_that_reads_text_only_has_no_placeholder():
    assert Template.from_tokens([1, 3, 5], image_token_id=-1).num_images == 0


def test_the_largest_window_is_as_none():
    none, largest = (BlockMask(TEMPLATE, ["SINK"], window=window) for window in (None, 2**31 - 1))
    np.testing.assert_array_equal(largest.schedule.tile_columns, none.schedule.tile_columns)
