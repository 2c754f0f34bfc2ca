"""Profiling knows both kinds of Gemma 3's layers: what it measures, and what the profile saves."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax import HeadCategory, Profile, Sinks
from bsjax.masks.visibility import visible
from bsjax.profiles.report import print_profile
from bsjax.profiling import GROUPS, SPARSE_CATEGORIES, measure
from bsjax.profiling.prompt_inputs import PackedPrompt, PromptEmbedding
from bsjax.runtime.programs import programs_of

pytestmark = [pytest.mark.parity, pytest.mark.slow]


def conversation(seed: int) -> list[dict]:
    random = np.random.default_rng(seed)
    parts = []
    for number in range(3):
        pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        parts += [
            {"type": "image", "image": Image.fromarray(pixels)},
            {"type": "text", "text": f" word{seed + 1} word{number + 9}"},
        ]
    return [{"role": "user", "content": parts}]


@pytest.fixture
def model(gemma3):
    return gemma3


def test_a_model_with_random_weights_can_be_profiled(model, tmp_path, capsys):
    samples = [conversation(seed) for seed in range(3)]
    profile = bsjax.profile(model, samples, target_reduction=0.25, answer_tokens=2, source="random")
    assert profile.categories.shape == (4, 4)
    assert profile.evidence.end_to_end is not None
    assert profile.evidence.end_to_end["attention_flops_reduction"] > 0.1
    kinds = profile.evidence.attention_flops_per_kind
    assert [(kind.visibility.window, kind.layers) for kind in kinds] == [(12, 3), (None, 1)]
    assert kinds[0].sparse / kinds[0].dense > kinds[1].sparse / kinds[1].dense, "windows hide much"
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path).evidence.attention_flops_per_kind == kinds
    print_profile(profile, "it")
    assert "attention FLOPs: reduction in 3 layers with a window of 12" in capsys.readouterr().out
    result = bsjax.generate(model, samples[0], profile=Profile.load(path), max_new_tokens=2)
    local, everywhere = result.stats.attention_flops_per_kind
    assert result.stats.attention_flops_sparse < result.stats.attention_flops_dense
    assert local.dense + everywhere.dense == result.stats.attention_flops_dense


def softmax_of(scores, seen):
    """Softmax weights of the keys that are seen; zeros if there are none."""
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total > 0, total, 1)


def test_measurements_are_those_of_dense_softmax_under_the_predicate(model):
    """In every layer: windows, images that see themselves, and key groups, in float64."""
    messages = conversation(0)
    measured = measure(model, [messages], sinks=Sinks())
    prompt = model.prompt(messages)
    packed = PackedPrompt.of(model.architecture, prompt, None, "xla")
    embeddings = PromptEmbedding(programs_of(model), packed, "xla").run()[packed.row]
    info = packed.template.info
    query = type(info)(*(field[:, None] for field in info))
    visibilities = model.family.visibilities(model.config)
    scale = model.module.language_model.scale

    def seen(kind, groups):
        return visible(query, info, groups, visibilities[kind])

    def attend_with(kind):
        mask = seen(kind, HeadCategory.DENSE.groups)

        def attend(q, k, v, _):
            k, v = (jnp.repeat(array, q.shape[1] // k.shape[1], axis=1) for array in (k, v))
            scores = scale * jnp.einsum("qhd,khd->hqk", q, k, precision="highest")
            weights = jnp.asarray(softmax_jnp(scores, mask))
            return jnp.einsum("hqk,khd->qhd", weights, v, precision="highest"), (scores, v)

        return attend

    def softmax_jnp(scores, mask):
        weights = jnp.exp(jnp.where(mask, scores, -jnp.inf))
        return weights / weights.sum(axis=-1, keepdims=True)

    _, (scores, values) = model.module.language_model.run_layers(
        embeddings,
        jnp.asarray(packed.inputs.position_ids),
        [attend_with(0), attend_with(1)],
        None,
    )
    is_image = info.image >= 0
    for layer, kind in enumerate(model.family.layer_kinds(model.config)):
        of_layer = np.asarray(scores[layer], np.float64)
        value = np.asarray(values[layer], np.float64)

        def output(groups, of_layer=of_layer, value=value, kind=kind):
            weights = softmax_of(of_layer, seen(kind, groups))
            return np.einsum("hqk,khd->hqd", weights, value)[:, is_image]

        dense = output(HeadCategory.DENSE.groups)
        for index, category in enumerate(SPARSE_CATEGORIES):
            difference = np.linalg.norm(output(category.groups) - dense, axis=(1, 2))
            expected = difference / np.linalg.norm(dense, axis=(1, 2))
            np.testing.assert_allclose(measured.error[0, layer, :, index], expected, atol=2e-5)
        weights = softmax_of(of_layer, seen(kind, HeadCategory.DENSE.groups))[:, is_image]
        for index, group in enumerate(GROUPS):
            # Image queries in rows: keys of this group alone.
            of_group = np.where(seen(kind, group)[is_image], weights, 0).sum(axis=-1).mean(axis=-1)
            np.testing.assert_allclose(measured.mass[0, layer, :, index], of_group, atol=2e-5)
