"""With `jax_enable_x64`, results have the same bits and the same 32-bit dtypes as without it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bsjax
from bsjax import BlockMask, Image, Template, Text
from bsjax.attention import decode_attention
from bsjax.masks.categories import HeadCategory
from convert.conversion import convert_checkpoint

TEMPLATE = Template.from_segments([Text(3), Image(17), Text(2), Image(9), Text(4)])


def same_with_64_bits(function, *models):
    """Calls `function` without 64 bits, then with 64 bits for each model; results must be equal."""
    wanted = jax.tree.leaves(function(*models[:1]))
    with jax.enable_x64(True):
        assert jnp.arange(1).dtype == jnp.int64
        for arguments in [(model,) for model in models] or [()]:
            check_same(jax.tree.leaves(function(*arguments)), wanted)


def check_same(got, wanted):
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def heads(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conversation(seed, images=2):
    pixels = np.random.default_rng(seed).integers(0, 256, (images, 28, 56, 3), dtype=np.uint8)
    parts = [{"type": "image", "image": image} for image in pixels]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Which one?"}]}]


@pytest.fixture
def models(tiny_model):
    """A model whose programs are compiled without 64 bits, and one that has none yet."""
    return tiny_model, dataclasses.replace(tiny_model)


@pytest.mark.parametrize("window", [None, 7])
def test_masks(window):
    def dense():
        mask = BlockMask(TEMPLATE, list(HeadCategory), 16, 16, window is not None, window)
        return [mask.to_dense(head) for head in range(4)], np.int32(mask.flops)

    same_with_64_bits(dense)


@pytest.mark.parametrize("backend", ["reference", "xla", "pallas"])
def test_attention(backend):
    q, k = heads(TEMPLATE.tokens, 4, 16), heads(TEMPLATE.tokens, 2, 16, seed=1)
    mask = BlockMask(TEMPLATE, list(HeadCategory), 16, 16, True, 7)
    same_with_64_bits(
        lambda: bsjax.sparse_attention(q, k, k + 1, mask, backend=backend, return_lse=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "xla"])
def test_gradients(backend):
    q, k = heads(TEMPLATE.tokens, 4, 16), heads(TEMPLATE.tokens, 2, 16, seed=1)
    mask = BlockMask(TEMPLATE, list(HeadCategory), 16, 16)

    def loss(q, k):
        return jnp.sum(bsjax.sparse_attention(q, k, k + 1, mask, backend=backend) ** 2)

    same_with_64_bits(lambda: jax.grad(loss, (0, 1))(q, k))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xla", "pallas"])
def test_decoding(backend):
    cache = heads(2, 2, 20, 2, 16)
    q, layer, lengths = heads(2, 4, 16, seed=1), jnp.int32(1), jnp.asarray([20, 3])
    own = cache[0, :, 5]
    same_with_64_bits(
        lambda: decode_attention(
            q, cache, cache, layer, lengths, own, own, scale=0.3, backend=backend, return_lse=True
        )
    )


@pytest.mark.slow
def test_generation_and_scoring(models):
    def run(model):
        greedy = bsjax.generate(model, conversation(0), max_new_tokens=3)
        drawn = bsjax.generate(
            model, conversation(0), max_new_tokens=3, temperature=0.9, top_k=40, top_p=0.9
        )
        tokens = np.asarray([greedy.token_ids, drawn.token_ids], np.int32)
        answered = [*conversation(0), {"role": "assistant", "content": "The first one."}]
        scores = np.asarray(bsjax.score(model, answered).log_probabilities, np.float32)
        return tokens, scores, bsjax.forward(model, conversation(0))

    same_with_64_bits(run, *models)


@pytest.mark.slow
def test_profiling(models):
    samples = [conversation(seed, images=2) for seed in range(2)]

    def run(model):
        profile = bsjax.profile(model, samples, threshold=0.05)
        return profile.categories, profile.evidence.statistics

    same_with_64_bits(run, *models)


def test_converting_and_loading(tiny_source, tiny_model, tmp_path):
    with jax.enable_x64(True):
        convert_checkpoint(tiny_source, tmp_path / "converted")
        loaded = bsjax.load(tmp_path / "converted")
    wanted = jax.tree.leaves(tiny_model.module)
    for one, other in zip(jax.tree.leaves(loaded.module), wanted, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
