"""Float32 logits are as close to exact ones as those of transformers, at thousands of tokens.

Weights are such that the residual stream has massive activations, as that of trained models has.
"""

import copy

import numpy as np
import pytest

from bsjax.models.layers import frequencies
from tests.models.test_model_parity import Port, RandomPrompt, reference_logits
from tests.support.parity import torch
from tests.support.small_models import TEXT_TOKENS, Shape, random_reference, small_config

pytestmark = pytest.mark.parity

TOKENS = 1200
MASSIVE = 300.0
"""How many times as large a few channels of the residual stream become."""


def with_massive_activations(reference):
    """Scales what some MLPs write to two channels, as in trained models."""
    layers = reference.model.language_model.layers
    with torch.no_grad():
        for layer in layers[:2]:
            layer.mlp.down_proj.weight[[3, 17]] *= MASSIVE
    return reference


@pytest.mark.parametrize("theta", [1e4, 1e6])
@pytest.mark.parametrize("count", [16, 32, 64, 128])
def test_frequencies_are_those_of_torch(theta, count):
    exponent = torch.arange(0, 2 * count, 2, dtype=torch.int64).to(dtype=torch.float) / (2 * count)
    expected = (1.0 / theta**exponent).numpy()
    differ = frequencies(theta, count) != expected
    # torch's own power is not always the nearest number.
    assert differ.sum() <= count // 64 and not differ[: count // 2].any()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_errors_are_at_most_twice_those_of_transformers(family):
    shape = Shape(family, layers=4, q_heads=4, kv_heads=2, head_dim=64, window=512)
    reference = with_massive_activations(random_reference(small_config(shape)))
    random = np.random.default_rng(0)
    token_ids = random.integers(1, TEXT_TOKENS, TOKENS).astype(np.int32)
    prompt = RandomPrompt(token_ids, np.zeros((0, 3), np.int64), None, ())
    exact = reference_logits(copy.deepcopy(reference).double(), prompt)
    theirs = reference_logits(reference, prompt)
    ours, _, _ = Port(reference).prefill(prompt)

    def errors(logits):
        """The largest error of each row, relative to the scale of all logits."""
        return np.abs(logits - exact).max(axis=1) / np.abs(exact).max()

    of_ours, of_theirs = errors(ours), errors(theirs)
    assert of_ours.mean() <= 2 * of_theirs.mean()
    assert of_ours.max() <= 2 * of_theirs.max()
