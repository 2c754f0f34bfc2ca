"""Sink discovery measures what other images look at, and finds the offsets that draw them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params

from bsjax import Image, Sinks, Template, Text
from bsjax.attention.reference import reference_attention
from bsjax.masks.categories import ALL_KEY_GROUPS
from bsjax.masks.visibility import Visibility
from bsjax.profiling.offsets import by_offset, discover, other_image_mass, pairs_by_offset
from bsjax.profiling.prompt_inputs import category_schedule
from tests.support.templates import templates, visible_matrix

KINDS = [Visibility(), Visibility(True, None), Visibility(True, 9)]
ROWS = 224


def other_images(template, visibility):
    seen = visible_matrix(template, ALL_KEY_GROUPS, visibility)
    image = template.image
    return seen & (image[:, None] >= 0) & (image >= 0) & (image[:, None] != image)


def offsets(template):
    positions = np.flatnonzero(template.image >= 0)
    return positions, positions - template.image_first[template.image[positions]]


@given(templates, st.sampled_from(KINDS))
def test_pairs_are_counted_by_offset(template, visibility):
    pairs = pairs_by_offset(template, visibility)
    columns = other_images(template, visibility).sum(axis=0)
    positions, offset = offsets(template)
    expected = np.bincount(offset, weights=columns[positions], minlength=len(pairs))
    np.testing.assert_array_equal(pairs, expected)


@jax.jit
def measured(q, k, schedule):
    dense = jnp.zeros(q.shape[1], jnp.int32)
    _, lse = reference_attention(q, k, k, schedule, dense, 0.4)
    return other_image_mass(q, k, lse, schedule, scale=0.4)


@settings(max_examples=15)
@given(templates, st.sampled_from(KINDS), st.integers(0, 9))
def test_mass_is_the_column_sums_of_the_weights(template, visibility, seed):
    generator = np.random.default_rng(seed)
    q, k = (generator.normal(size=(ROWS, heads, 8)).astype(np.float32) for heads in (4, 2))
    schedule = category_schedule(template, visibility, block_q=16, block_kv=16, tokens=ROWS)
    mass = np.asarray(measured(q, k, schedule))
    assert not mass[template.tokens :].any()

    tokens, order = template.tokens, template.packed_order
    q_tokens, k_tokens = (np.empty((tokens, *array.shape[1:])) for array in (q, k))
    q_tokens[order], k_tokens[order] = q[:tokens], k[:tokens]
    scores = np.einsum("qhd,khd->hqk", q_tokens, k_tokens.repeat(2, axis=1)) * 0.4
    seen = visible_matrix(template, ALL_KEY_GROUPS, visibility)
    weights = np.where(seen, np.exp(scores), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    expected = np.where(other_images(template, visibility), weights, 0).sum(axis=(0, 1))
    np.testing.assert_allclose(mass[:tokens], expected[order], atol=1e-5)


@pytest.mark.parametrize(("window", "keys"), [(None, 32768), (1024, 1023 + 64)])
def test_no_array_has_tokens_times_tokens_elements(window, keys):
    """At 32K tokens, by the shapes of everything that the traced function makes: the keys that a
    chunk of 64 rows is multiplied with are those that its window may reach.
    """
    tokens = 32768
    images = [Text(30), *[Image(1000)] * 32, Text(8)]
    template = Template.from_segments(images)
    schedule = category_schedule(
        template, Visibility(window=window), block_q=128, block_kv=64, tokens=tokens
    )
    lse = jax.ShapeDtypeStruct((tokens, 28), jnp.float32)
    q, k = (jax.ShapeDtypeStruct((tokens, heads, 128), jnp.bfloat16) for heads in (28, 4))
    traced = jax.make_jaxpr(lambda *arrays: other_image_mass(*arrays, schedule, scale=1.0))(
        q, k, lse
    )

    def made(jaxpr):
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            yield from ((name, variable.aval.size) for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from made(inner)

    assert max(size for _, size in made(traced.jaxpr)) < tokens**2 / 8
    (products,) = (size for name, size in made(traced.jaxpr) if name == "dot_general")
    assert products == 64 * 28 * keys


def test_mass_is_gathered_by_offset():
    template = Template.from_segments([Text(2), Image(3), Text(1), Image(2)])
    mass = np.asarray([9.0, 9.0, 1.0, 2.0, 3.0, 9.0, 10.0, 20.0])
    np.testing.assert_array_equal(by_offset(template, mass), [11.0, 22.0, 3.0])


def test_offsets_that_stand_out_become_sinks():
    pairs = np.full(50, 1000.0)
    mass = np.full(50, 1.0)
    mass[0] = 100.0
    sinks, found = discover([mass], [pairs])
    assert sinks == Sinks(1, ())
    assert found.mass_by_offset[:2] == (0.1, 0.001)

    mass[[7, 3]] = 40.0
    sinks, found = discover([mass, mass / 2], [pairs, pairs])
    assert sinks == Sinks(1, (3, 7))
    assert found.mass_by_offset[7] == 0.03
    assert "4 times the average" in found.rule

    # At most four, the strongest; and none that most images lack.
    mass[[10, 20, 30, 40, 45]] = [60.0, 61.0, 62.0, 63.0, 64.0]
    assert discover([mass], [pairs])[0] == Sinks(1, (20, 30, 40, 45))
    few = np.where(np.arange(50) < 41, 1000.0, 400.0)
    assert discover([mass], [few])[0] == Sinks(1, (10, 20, 30, 40))
    # Samples of shorter images count for the offsets they have.
    _, short = discover([mass, mass[:5]], [pairs, pairs[:5]])
    assert len(short.mass_by_offset) == 50


@pytest.mark.parametrize("offsets", [0, 1])
def test_single_images_have_no_sinks_to_find(offsets):
    empty = np.zeros(offsets)
    assert discover([empty], [empty])[0] == Sinks()
