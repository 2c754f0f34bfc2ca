"""The demo times what it says it times."""

import numpy as np
import pytest

import bsjax
from examples.long_prompts import long_prompt, plot_timings, table_of_timings, time_prompts
from examples.shipped import CHECKPOINT, PROFILE, converted

LENGTHS = (100,)


@pytest.fixture(scope="module")
def model() -> bsjax.LoadedModel:
    return converted(CHECKPOINT)


@pytest.fixture(scope="module")
def profile(model) -> bsjax.Profile:
    profile = bsjax.Profile.resolve(PROFILE, model)
    assert profile is not None
    return profile


@pytest.mark.slow
def test_timings_are_of_the_prompts_that_generate_runs(model, profile, tmp_path):
    timings = list(time_prompts(model, profile, LENGTHS))
    random = np.random.default_rng(0)
    for length, timing in zip(LENGTHS, timings, strict=True):
        messages = long_prompt(random, length)
        stats = bsjax.generate(model, messages, profile=profile, max_new_tokens=1).stats
        assert length <= timing.tokens == stats.prompt_tokens < length + 300
        assert stats.image_tokens == (256,) * timing.images
        dense, sparse = timing.flops
        assert sparse / dense == pytest.approx(
            stats.attention_flops_sparse / stats.attention_flops_dense
        )
        assert min(*timing.attention, *timing.prefill) > 0
    assert table_of_timings(timings).row_count == len(LENGTHS)
    assert plot_timings(timings, tmp_path / "time.png").stat().st_size > 1000
