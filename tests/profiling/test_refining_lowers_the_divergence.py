"""Refined categories keep to their budget, and are closer to dense than the one-shot rule's."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bsjax
from bsjax import HeadCategory, Profile, ProfileError, Sinks
from bsjax.profiling import Evaluator, Measurements, refine
from bsjax.profiling.evaluation import Comparison
from bsjax.profiling.prompt_inputs import append_tokens
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.programs import programs_of
from tests.support.chunks import logits_of

LAYERS, HEADS = 3, 4


class KnownDamage(Evaluator):
    """An evaluator with a known KL: the sum of damages by heads and by pairs of heads."""

    def __init__(self, damage, together):
        self.damage, self.together = damage, together
        self.fingerprints, self.sinks = ("a",), Sinks()
        self.answer_tokens = 4
        self.compared = {}

    @property
    def evaluations(self):
        return len(self.compared)

    def compare(self, categories):
        size = np.zeros(categories.shape)
        for (layer, head), category in np.ndenumerate(categories):
            if category:
                size[layer, head] = self.damage[layer, head, category - 1]
        root = np.sqrt(size).ravel()
        kl = float(size.sum() + root @ self.together @ root)
        self.compared[categories.tobytes()] = kl
        return Comparison(kl, 1.0, np.asarray([kl]), np.asarray([1.0]))


def case(seed, interaction=0.0):
    """Measurements whose one-shot errors say little about the damage."""
    generator = np.random.default_rng(seed)
    error = 3 * np.sort(generator.random((1, LAYERS, HEADS, 3)), axis=-1)[..., ::-1]
    gain = 10.0 ** generator.uniform(-3, 1, (LAYERS, HEADS, 1))
    flops = np.tile(np.asarray([[1000, 50, 200, 260]]), (LAYERS, 1))
    mass = np.full((1, LAYERS, HEADS, 5), 0.2, np.float32)
    found = Measurements(Sinks(), mass, error.astype(np.float32), flops, ("a",), np.asarray([2]))
    together = generator.random((LAYERS * HEADS,) * 2) * interaction
    return found, KnownDamage(gain * error[0] ** 2, together)


seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=25)
@given(seeds, st.floats(0.05, 0.9), st.floats(0, 3))
def test_the_budget_is_kept_and_one_shot_is_never_better(seed, target, interaction):
    found, evaluator = case(seed, interaction)
    refined = refine(None, found, evaluator, target_reduction=target)
    one_shot = found.one_shot(target_reduction=target)
    assert found.reduction(refined.categories) == refined.reduction >= target
    assert refined.kl == evaluator.compare(refined.categories).kl
    assert refined.kl <= evaluator.compare(one_shot).kl
    assert refined.kl <= evaluator.compare(refined.at(target)).kl
    assert refined.numbers["kl"] == refined.kl


def test_refining_halves_the_divergence_when_heads_differ_in_importance():
    gains = []
    for seed in range(20):
        found, evaluator = case(seed)
        refined = refine(None, found, evaluator, target_reduction=0.5)
        one_shot = evaluator.compare(found.one_shot(target_reduction=0.5)).kl
        gains.append(one_shot / refined.kl)
    assert np.median(gains) > 2


@settings(max_examples=25)
@given(seeds, st.floats(0.001, 2), st.floats(0, 3))
def test_a_divergence_budget_is_kept(seed, max_kl, interaction):
    found, evaluator = case(seed, interaction)
    refined = refine(None, found, evaluator, max_kl=max_kl)
    assert refined.kl <= max_kl
    assert refined.reduction >= refined.numbers["reduction_path"]
    dense = np.zeros((LAYERS, HEADS), np.int8)
    if not refined.categories.any():
        # Even the least damage per FLOP is too much.
        first = dense.copy()
        first[refined.path[0].layer, refined.path[0].head] = refined.path[0].after
        assert evaluator.compare(first).kl > max_kl


def test_correction_in_context_lowers_the_divergence():
    better = 0
    for seed in range(10):
        found, evaluator = case(seed, interaction=3.0)
        plain = refine(None, found, evaluator, target_reduction=0.5, rounds=0)
        assert plain.numbers["correction_rounds"] == 0
        corrected = refine(None, found, evaluator, target_reduction=0.5)
        assert corrected.kl <= plain.kl
        better += corrected.kl < plain.kl
    assert better >= 5


def test_evaluations_are_bounded_and_the_rest_estimated():
    found, evaluator = case(0)
    refined = refine(None, found, evaluator, target_reduction=0.5, max_evaluations=12, rounds=0)
    assert refined.numbers["damages_measured"] == 9
    assert refined.numbers["damages_estimated"] == 27
    assert evaluator.evaluations <= 12
    assert np.all(refined.damage.kl > 0)
    # What is measured lies nearest to the one-shot threshold.
    distance = np.abs(np.log(found.damage() / found.threshold_for(0.5)))
    assert distance[refined.damage.measured].max() <= distance[~refined.damage.measured].min()


@pytest.mark.parametrize("budget", [{"target_reduction": 0.5}, {"max_kl": 0.3}])
@pytest.mark.parametrize("most", [2, 3, 9, 25, 50, 70])
def test_the_limit_on_evaluations_is_kept(budget, most):
    """It covers damages, bisection, rounds of correction and exchanges."""
    found, evaluator = case(1, interaction=3.0)
    refined = refine(None, found, evaluator, **budget, max_evaluations=most, margin=5)
    assert evaluator.evaluations == refined.numbers["evaluations"] <= most
    if "max_kl" in budget:
        assert refined.kl <= 0.3
    else:
        assert refined.reduction >= 0.5
        assert refined.kl <= evaluator.compare(found.one_shot(target_reduction=0.5)).kl
    # Evaluations that the evaluator remembers count as well, so the choice is the same.
    again = refine(None, found, evaluator, **budget, max_evaluations=most, margin=5)
    np.testing.assert_array_equal(again.categories, refined.categories)
    assert again.numbers == refined.numbers


def test_moves_that_save_flops_and_lower_the_divergence_are_taken():
    """A head's sparser category may undo the damage of another head; no head has to move back."""
    found, evaluator = case(0)
    flops = np.tile(np.asarray([[1000, 999, 999, 500]]), (LAYERS, 1))
    error = np.ones_like(found.error)
    error[:, 0, 0] = 2
    found = dataclasses.replace(found, flops=flops, error=error)
    together = np.zeros((LAYERS * HEADS,) * 2)
    together[0, 1:] = -1.0
    evaluator = KnownDamage(np.full((LAYERS, HEADS, 3), 0.01), together)
    evaluator.damage[0, 0] = 0.02
    target = (HEADS * LAYERS - 1) * 500 / (HEADS * LAYERS * 1000)
    refined = refine(None, found, evaluator, target_reduction=target)
    assert refined.categories.all()
    assert refined.reduction > target
    assert refined.kl < refined.numbers["kl_path"]


def test_an_evaluator_with_other_sinks_is_refused():
    found, evaluator = case(0)
    evaluator.sinks = Sinks(1, (3,))
    with pytest.raises(ProfileError, match=r"offsets=\(3,\).*sinks=measurements.sinks"):
        refine(None, found, evaluator, target_reduction=0.2)


def test_categories_that_save_nothing_are_not_tried():
    found, evaluator = case(0)
    found.flops[1, :] = 1000
    refined = refine(None, found, evaluator, target_reduction=0.4)
    assert not refined.categories[1].any()
    assert not refined.damage.measured[1].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "a target_reduction or a max_kl, and not both"),
        ({"target_reduction": 0.2, "max_kl": 0.1}, "a target_reduction or a max_kl, and not both"),
        ({"target_reduction": 0.99}, "fall by 95.0%"),
        ({"target_reduction": 1.5}, "between 0 and 1"),
        ({"max_kl": 0.0}, "above 0"),
        ({"max_kl": 0.1, "rounds": -1}, "rounds"),
        ({"max_kl": float("nan")}, "above 0"),
        ({"max_kl": 0.1, "max_evaluations": 1}, "max_evaluations"),
    ],
)
def test_invalid_budgets_are_refused(arguments, words):
    found, evaluator = case(0)
    with pytest.raises(ProfileError, match=words):
        refine(None, found, evaluator, **arguments)


def conversation(seed, images):
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(images):
        pixels = generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        parts.append({"type": "image", "image": Image.fromarray(pixels)})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Which one?"}]}]


@pytest.mark.slow
def test_the_divergence_is_that_of_the_models_logits(tiny_model):
    """Compared with logits of whole prompts, answer appended, as `forward` computes them."""
    samples = [conversation(seed, 4) for seed in range(2)]
    sinks = Sinks(1, (2,))
    evaluator = Evaluator(tiny_model, samples, answer_tokens=2, sinks=sinks)
    layers, heads = tiny_model.config.text_config.num_hidden_layers, 4
    dense = np.zeros((layers, heads), np.int8)
    assert evaluator.compare(dense)[:2] == (0.0, 1.0)
    compilations = programs_of(tiny_model).compilations
    categories = np.random.default_rng(0).integers(0, 4, (layers, heads)).astype(np.int8)
    comparison = evaluator.compare(categories)
    assert programs_of(tiny_model).compilations == compilations
    assert evaluator.evaluations == 2

    def log_probabilities(messages, answer, profile):
        prompt = append_tokens(tiny_model.prompt(messages), answer)
        inputs = prepare_inputs(tiny_model.architecture, prompt, profile, backend="xla")
        logits = logits_of(programs_of(tiny_model), inputs)[-3:].astype(np.float64)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    sparse_profile = Profile(family="qwen2_5_vl", categories=categories, sinks=sinks)
    answers = {
        tuple(bsjax.generate(tiny_model, sample, max_new_tokens=2).token_ids): sample
        for sample in samples
    }
    kls = []
    for answer in evaluator.dense_answers:
        log_p = log_probabilities(answers[answer], answer, None)
        log_q = log_probabilities(answers[answer], answer, sparse_profile)
        assert log_p[:2].argmax(axis=1).tolist() == list(answer)
        kls.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())
    np.testing.assert_allclose(comparison.kl_by_sample, kls, rtol=1e-3)
    np.testing.assert_allclose(comparison.kl, np.mean(kls), rtol=1e-3)

    for wrong in (categories[:1], categories + 4):
        with pytest.raises(ProfileError, match="one HeadCategory per layer and head"):
            evaluator.compare(wrong)
    everything_sink = np.full((layers, heads), HeadCategory.SINK, np.int8)
    assert 0 < evaluator.reduction(categories) < evaluator.reduction(everything_sink)
