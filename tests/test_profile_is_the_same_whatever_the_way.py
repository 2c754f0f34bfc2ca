"""A profile depends on the model, the samples and the settings: not on order, backend or pauses."""

import sqlite3
from contextlib import closing
from functools import partial

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax import ProfileError, Sinks
from bsjax.profiling import measure, refinement
from bsjax.programs import programs_of

TARGET = {"target_reduction": 0.1, "answer_tokens": 2, "progress": False}


def conversation(seed, images):
    generator = np.random.default_rng(seed)
    parts = []
    for _ in range(images):
        pixels = generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        parts.append({"type": "image", "image": Image.fromarray(pixels)})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Which one?"}]}]


SAMPLES = [conversation(seed, images) for seed, images in enumerate((4, 5, 4))]


@pytest.fixture(scope="module")
def profile(tiny_model):
    return bsjax.profile(tiny_model, SAMPLES, source="noise", **TARGET)


def test_what_was_measured_is_in_the_profile(tiny_model, profile, tmp_path):
    assert profile.from_data and profile.criterion == "output_error"
    assert profile.fingerprint == tiny_model.fingerprint
    assert (profile.sample_count, profile.held_out_count) == (2, 1)
    assert profile.sample_source == "noise"
    assert profile.attention_flops["reduction"] >= 0.1
    assert np.unique(profile.categories).size > 1
    assert set(profile.end_to_end) == {
        "kl_divergence",
        "top_1_agreement",
        "answer_agreement",
        "attention_flops_reduction",
    }
    assert profile.end_to_end["kl_divergence"] > 0
    curve = profile.sink_discovery["mass_by_offset"]
    assert len(curve) == 6 and all(0 < value < 1 for value in curve)
    profile.save(tmp_path / "profile.json")
    loaded = bsjax.Profile.load(tmp_path / "profile.json")
    assert loaded.to_json() == profile.to_json()
    assert bsjax.generate(tiny_model, SAMPLES[0], profile=loaded, max_new_tokens=2).token_ids


def test_order_and_repetition_change_nothing(tiny_model, profile):
    compilations = programs_of(tiny_model).compilations
    again = bsjax.profile(tiny_model, SAMPLES[::-1], source="noise", **TARGET)
    assert again.to_json() == profile.to_json()
    assert programs_of(tiny_model).compilations == compilations


def test_an_interrupted_run_goes_on(tiny_model, tmp_path, monkeypatch):
    # All of its stages, in few evaluations.
    few = partial(refinement.refine, max_evaluations=16, margin=3, rounds=2)
    monkeypatch.setattr(refinement, "refine", few)
    settings = TARGET | {"refine": True}
    expected = bsjax.profile(tiny_model, SAMPLES, **settings)
    assert expected.refinement["kl"] <= expected.refinement["kl_one_shot"]

    path = tmp_path / "state"
    records = [0]
    for stop_at in (
        "looking for sinks",
        "measuring heads",
        "reading samples",
        "measuring damage",
        "correcting, round 1",
        "reading held-out samples",
    ):

        def interrupt(stage, done, total, stop_at=stop_at):
            if stage == stop_at and done == 1:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            bsjax.profile(tiny_model, SAMPLES, **settings | {"progress": interrupt}, resume=path)
        with closing(sqlite3.connect(path)) as connection:
            records += connection.execute("SELECT count(*) FROM records").fetchone()
        assert records[-1] > records[-2], stop_at

    resumed = bsjax.profile(tiny_model, SAMPLES[::-1], **settings, resume=path)
    assert resumed.to_json() == expected.to_json()


def test_a_state_file_of_another_run_is_refused(tiny_model, tmp_path):
    path = tmp_path / "state"
    bsjax.profile(tiny_model, SAMPLES, **TARGET, resume=path)
    # Thresholds and budgets choose from what is measured; nothing is measured again.
    stages = []
    bsjax.profile(
        tiny_model,
        SAMPLES,
        threshold=0.3,
        answer_tokens=2,
        progress=lambda stage, *_: stages.append(stage),
        resume=path,
    )
    assert "measuring heads" in stages
    for samples, changed, words in (
        (SAMPLES[:2], {}, "samples = "),
        (SAMPLES, {"answer_tokens": 3}, "answer_tokens = 2, and this run has 3"),
        (SAMPLES, {"sinks": Sinks(2)}, "sinks = None"),
        (SAMPLES, {"held_out": 0.5}, "held_out"),
        (SAMPLES, {"seed": 1}, "seed"),
        (SAMPLES, {"backend": "reference"}, "backend = xla"),
    ):
        with pytest.raises(ProfileError, match=words):
            bsjax.profile(tiny_model, samples, **TARGET | changed, resume=path)
    other = tmp_path / "notes.txt"
    other.write_text("these are notes, and long enough to be no database of any kind" * 20)
    for wrong in (other, tmp_path / "missing" / "state"):
        with pytest.raises(ProfileError, match="cannot be used"):
            bsjax.profile(tiny_model, SAMPLES, **TARGET, resume=wrong)
    assert other.read_text().startswith("these are notes")


def test_backends_agree(tiny_model):
    sinks = Sinks(1, (3,))
    results = {
        backend: measure(tiny_model, SAMPLES[:1], sinks=sinks, backend=backend)
        for backend in ("xla", "reference", "pallas")
    }
    for backend, result in results.items():
        expected = results["xla"]
        np.testing.assert_allclose(result.mass, expected.mass, atol=1e-5, err_msg=backend)
        np.testing.assert_allclose(result.error, expected.error, rtol=1e-3, atol=1e-5)
        np.testing.assert_array_equal(result.flops, expected.flops)
        for reduction in (0.05, 0.08, 0.11):
            np.testing.assert_array_equal(
                result.one_shot(target_reduction=reduction),
                expected.one_shot(target_reduction=reduction),
            )


@pytest.mark.parametrize(
    ("samples", "arguments", "words"),
    [
        ([], {}, "no samples"),
        ([[{"role": "user", "content": "No image here"}]], {}, "has no image"),
        (SAMPLES, {"threshold": 2.0, "criterion": "mass"}, "threshold"),
        (SAMPLES, {"threshold": -1.0}, "threshold must be a number from 0"),
        (SAMPLES, {"quantile": -1.0}, "quantile"),
        (SAMPLES, {"criterion": "guess"}, "output_error, mass"),
        (SAMPLES, {"held_out": 1.0}, "held_out"),
        (SAMPLES, {"held_out": "x"}, "held_out"),
        (SAMPLES, {"refine": True, "max_kl": 0.0}, "max_kl must be"),
        (SAMPLES, {"refine": True, "max_kl": "0.1"}, "max_kl must be"),
        (SAMPLES, {"refine": True, "max_kl": float("inf")}, "max_kl must be"),
        (SAMPLES, {"max_kl": 0.1}, "refine=True"),
        (SAMPLES, {"refine": True, "max_kl": 0.1, "target_reduction": 0.1}, "not both"),
        (SAMPLES, {"target_reduction": 0.9}, "cannot be reached.*fall by [0-9.]+%"),
        (SAMPLES, {"target_reduction": 40.0}, "a share between 0 and 1"),
        (SAMPLES, {"answer_tokens": 0}, "answer_tokens"),
    ],
)
def test_what_cannot_be_profiled_is_refused(tiny_model, samples, arguments, words):
    arguments = {"answer_tokens": 2, "progress": False} | arguments
    with pytest.raises(ProfileError, match=words):
        bsjax.profile(tiny_model, samples, **arguments)


def test_all_samples_may_be_used_and_sinks_given(tiny_model):
    profile = bsjax.profile(
        tiny_model,
        SAMPLES,
        threshold=0.5,
        criterion="mass",
        sinks=Sinks(1, (2,)),
        held_out=0.0,
        progress=False,
    )
    assert (profile.sample_count, profile.held_out_count) == (3, 0)
    assert profile.end_to_end is None and profile.sink_discovery is None
    assert profile.sinks == Sinks(1, (2,))
    assert profile.thresholds == {"quantile": 0.9, "threshold": 0.5}
