"""A profile depends only on model, samples and settings, not on order, backend or interruptions."""

import copy
import dataclasses
import json
import sqlite3
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import jaxtyping
import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax import MessageError, ProfileError, Sinks
from bsjax.profiling import Evaluator, OrderedSamples, measure, measurements
from bsjax.profiling.driver import profile_with
from bsjax.profiling.settings import Reduction, Settings
from bsjax.profiling.state import State, conditions_of
from bsjax.runtime.programs import programs_of
from tests.support.pallas import HAS_PALLAS

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


@pytest.mark.slow
def test_what_was_measured_is_in_the_profile(tiny_model, profile, tmp_path):
    evidence = profile.evidence
    assert profile.from_data and evidence.criterion == "output_error"
    assert profile.fingerprint == tiny_model.fingerprint
    assert (evidence.sample_count, evidence.held_out_count) == (2, 1)
    assert profile.source == "noise"
    assert evidence.attention_flops.reduction >= 0.1
    assert np.unique(profile.categories).size > 1
    assert set(evidence.end_to_end) == {
        "kl_divergence",
        "top_1_agreement",
        "answer_agreement",
        "attention_flops_reduction",
        "answer_tokens",
        "split_seed",
    }
    assert evidence.end_to_end["answer_tokens"] == 2
    assert profile.versions.keys() >= {"bsjax", "jax", "dtype", "backend"}
    assert evidence.end_to_end["kl_divergence"] > 0
    curve = evidence.sink_discovery.mass_by_offset
    assert len(curve) == 6 and all(0 < value < 1 for value in curve)
    profile.save(tmp_path / "profile.json")
    loaded = bsjax.Profile.load(tmp_path / "profile.json")
    assert loaded.to_json() == profile.to_json()
    assert bsjax.generate(tiny_model, SAMPLES[0], profile=loaded, max_new_tokens=2).token_ids


@pytest.mark.slow
def test_order_and_repetition_change_nothing(tiny_model, profile):
    compilations = programs_of(tiny_model).compilations
    again = bsjax.profile(tiny_model, SAMPLES[::-1], source="noise", **TARGET)
    assert again.to_json() == profile.to_json()
    assert programs_of(tiny_model).compilations == compilations


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_profile(tiny_model, tmp_path):
    # All stages of a run, in few evaluations.
    settings = Settings(
        Reduction(0.1), refine=True, max_evaluations=24, rounds=2, margin=3, answer_tokens=2
    )
    run = partial(profile_with, settings, tiny_model)
    expected = run(SAMPLES, progress=False)
    refinement = expected.evidence.refinement
    assert refinement["kl"] <= refinement["kl_one_shot"]

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
            run(SAMPLES, progress=interrupt, resume=path)
        with closing(sqlite3.connect(path)) as connection:
            records += connection.execute("SELECT count(*) FROM records").fetchone()
        assert records[-1] > records[-2], stop_at

    resumed = run(SAMPLES[::-1], progress=False, resume=path)
    assert resumed.to_json() == expected.to_json()


@pytest.fixture
def state(tiny_model, tmp_path):
    """The state file of a complete run with everything in it."""
    path = tmp_path / "state"
    bsjax.profile(
        tiny_model, SAMPLES, **TARGET, refine=True, max_evaluations=6, sinks=Sinks(), resume=path
    )
    return path


@pytest.mark.slow
def test_what_is_in_a_state_file_is_not_measured_again(tiny_model, state, monkeypatch):
    """Other thresholds and budgets reuse the measurements; other samples add to them."""

    def refuse(*_, **__):
        raise AssertionError("measured again")

    settings = TARGET | {"sinks": Sinks(), "resume": state}
    expected = bsjax.profile(
        tiny_model, SAMPLES, **settings | {"resume": None}, refine=True, max_evaluations=6
    )
    with monkeypatch.context() as nothing:
        for place in (
            "measurements.MeasuringPass.run",
            "evaluation.generate",
            "evaluation.Evaluator.divergences",
            "end_to_end.generate",
        ):
            nothing.setattr(f"bsjax.profiling.{place}", refuse)
        again = bsjax.profile(tiny_model, SAMPLES, **settings, refine=True, max_evaluations=6)
        assert again.to_json() == expected.to_json()
        # Without the check on held-out samples, any threshold needs only the measured passes.
        chosen_with, _ = OrderedSamples.of(SAMPLES).split(0.25, 0)
        bsjax.profile(
            tiny_model,
            chosen_with.messages,
            **settings | {"target_reduction": None, "threshold": 2.5, "held_out": 0.0},
        )

    measured = []
    run = measurements.MeasuringPass.run

    def counted(self):
        measured.append(self)
        return run(self)

    monkeypatch.setattr(measurements.MeasuringPass, "run", counted)
    bsjax.profile(tiny_model, [*SAMPLES, conversation(9, 3)], **settings | {"held_out": 0.0})
    assert len(measured) == 2, "the new sample, and the one that was held out"


@pytest.mark.slow
def test_a_state_file_of_another_run_is_refused(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "state"
    wanted = {"checkpoint": "a", "dtype": "float32", "backend": "xla", "versions": "jax 1"}
    State(path, wanted).recall("one", lambda: {"value": np.arange(2)})
    assert State(path, wanted).recall("one", dict)["value"].tolist() == [0, 1]
    for name in wanted:
        with pytest.raises(ProfileError, match=f"made with {name} = "):
            State(path, wanted | {name: "other"})
    with pytest.raises(ProfileError, match="made with checkpoint = a"):
        bsjax.profile(tiny_model, SAMPLES, **TARGET, resume=path)


def test_files_that_are_not_state_files_are_left_alone(tmp_path):
    notes = tmp_path / "notes.txt"
    notes.write_text("these are notes, and long enough to be no database of any kind" * 20)
    others = tmp_path / "others.db"
    with closing(sqlite3.connect(others)) as connection, connection:
        connection.execute("CREATE TABLE addresses (name TEXT)")
    before = notes.read_bytes(), others.read_bytes()
    for wrong in (notes, others, tmp_path / "missing" / "state"):
        with pytest.raises(ProfileError, match="cannot be used"):
            State(wrong, {"checkpoint": "a"})
    assert (notes.read_bytes(), others.read_bytes()) == before


def test_a_damaged_record_is_named(tmp_path):
    path = tmp_path / "state"
    state = State(path, {})
    state.recall("one", lambda: {"value": np.arange(2)})
    with closing(sqlite3.connect(path)) as connection:
        (whole,) = connection.execute("SELECT value FROM records").fetchone()
        for damaged in (b"", b"PK", whole[:40], whole[: len(whole) // 2], b"zip", "text"):
            with connection:
                connection.execute("UPDATE records SET value = ?", (damaged,))
            with pytest.raises(ProfileError, match="holds a damaged record"):
                state.recall("one", dict)


@pytest.mark.slow
def test_answers_are_compared_up_to_an_image_token(tiny_model, monkeypatch):
    """The tokens after it would belong to a prompt with another image, which does not exist."""
    image_token = tiny_model.family.image_token_id(tiny_model.config)
    categories = np.ones((tiny_model.config.text_config.num_hidden_layers, 4), np.int8)
    compared = []
    for answer in ([5, image_token, 6], [5]):
        result = SimpleNamespace(token_ids=answer, finish_reason="length")
        monkeypatch.setattr("bsjax.profiling.evaluation.generate", lambda *_, r=result, **__: r)
        evaluator = Evaluator(tiny_model, SAMPLES[:1], answer_tokens=3)
        assert evaluator.dense_answers == (tuple(answer),)
        compared.append(evaluator.compare(categories))
    assert compared[0].kl == compared[1].kl > 0


@pytest.mark.slow
def test_backends_agree(tiny_model):
    sinks = Sinks(1, (3,))
    results = {
        backend: measure(tiny_model, SAMPLES[:1], sinks=sinks, backend=backend)
        for backend in ("xla", "reference", *["pallas"] * HAS_PALLAS)
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


@pytest.mark.slow
def test_backends_agree_on_a_refined_profile(tiny_model):
    settings = TARGET | {"refine": True, "max_evaluations": 16, "held_out": 0.0}
    xla, reference = (
        bsjax.profile(tiny_model, SAMPLES[:2], sinks=Sinks(), backend=backend, **settings)
        for backend in ("xla", "reference")
    )
    np.testing.assert_array_equal(xla.categories, reference.categories)
    assert np.unique(xla.categories).size > 1
    assert xla.evidence.refinement["kl"] == pytest.approx(
        reference.evidence.refinement["kl"], rel=1e-2
    )
    assert (
        xla.evidence.refinement["answer_tokens"] == 2
        and xla.evidence.refinement["max_evaluations"] == 16
    )
    assert xla.versions["backend"] == "xla" and reference.versions["backend"] == "reference"


def test_a_state_file_knows_how_prompts_are_made(tiny_model, tmp_path):
    """Other image settings or another chat template give the same weights other inputs."""
    path = tmp_path / "state"
    State(path, conditions_of(tiny_model, "xla"))
    State(path, conditions_of(tiny_model, "xla"))
    image_processor = copy.deepcopy(tiny_model.image_processor)
    image_processor.size = image_processor.size | {"shortest_edge": 28 * 28}
    tokenizer = copy.deepcopy(tiny_model.tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    for changed in ({"image_processor": image_processor}, {"tokenizer": tokenizer}):
        other = dataclasses.replace(tiny_model, **changed)
        with pytest.raises(ProfileError, match="made with config, tokenizer and image settings"):
            State(path, conditions_of(other, "xla"))
    with pytest.raises(ProfileError, match="made with backend = xla"):
        State(path, conditions_of(tiny_model, "reference"))


def test_a_source_that_is_not_text_is_refused_before_anything_is_measured(tiny_model, monkeypatch):
    # A user's program does not check annotations, as tests do.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(measurements.MeasuringPass, "run", None)
    with pytest.raises(ProfileError, match="source must be text, got 5"):
        bsjax.profile(tiny_model, SAMPLES, source=5)


@pytest.mark.parametrize(
    ("samples", "arguments", "words"),
    [
        ([], {}, "no samples"),
        ([[{"role": "user", "content": "No image here"}]], {}, "has no image"),
        ([conversation(0, 1), conversation(1, 1)], {}, "two images or more"),
        (SAMPLES, {"threshold": 2.0, "criterion": "mass"}, "threshold"),
        (SAMPLES, {"threshold": -1.0}, "threshold must be a number of at least 0"),
        (SAMPLES, {"quantile": -1.0}, "quantile"),
        (SAMPLES, {"criterion": "guess"}, "output_error, mass"),
        (SAMPLES, {"held_out": 1.0}, "held_out"),
        (SAMPLES, {"held_out": float("nan")}, "held_out"),
        (SAMPLES, {"refine": True, "max_kl": 0.0}, "max_kl must be"),
        (SAMPLES, {"refine": True, "max_kl": float("inf")}, "max_kl must be"),
        (SAMPLES, {"max_kl": 0.1}, "turn on refine"),
        (SAMPLES, {"refine": True, "max_kl": 0.1, "target_reduction": 0.1}, "not both"),
        pytest.param(
            SAMPLES,
            {"target_reduction": 0.9},
            "cannot be reached.*fall by [0-9.]+%",
            marks=pytest.mark.slow,
        ),
        (SAMPLES, {"target_reduction": 40.0}, "a share between 0 and 1"),
        (SAMPLES, {"answer_tokens": 0}, "answer_tokens"),
    ],
)
def test_what_cannot_be_profiled_is_refused(tiny_model, samples, arguments, words):
    arguments = {"answer_tokens": 2, "progress": False} | arguments
    with pytest.raises(ProfileError, match=words):
        bsjax.profile(tiny_model, samples, **arguments)


@pytest.mark.parametrize("seed", range(4))
def test_samples_without_images_are_refused_before_anything_runs(tiny_model, monkeypatch, seed):
    """This includes held-out samples: one of the two seeds holds the sample out."""
    monkeypatch.setattr("bsjax.checkpoint.loading.LoadedModel.prompt", None)
    text = [{"role": "user", "content": "No image here"}]
    with pytest.raises(ProfileError, match="has no image.*No image here"):
        bsjax.profile(tiny_model, [*SAMPLES, text], seed=seed, progress=False)
    with pytest.raises(ProfileError, match="has no image.*No image here"):
        measure(tiny_model, [*SAMPLES, text])


def test_errors_name_the_sample(tiny_model, tmp_path):
    """Its place in the list, or its line in the file, although samples are sorted and shuffled."""
    text = [{"role": "user", "content": "No image here"}]
    with pytest.raises(ProfileError, match=r"^samples\[2\]: A sample has no image"):
        bsjax.profile(tiny_model, [*SAMPLES[:2], text], progress=False)
    with pytest.raises(MessageError, match=r"^samples\[1\]: messages\[0\] has no 'content'"):
        bsjax.profile(tiny_model, [SAMPLES[0], [{"role": "user"}]], progress=False)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("good", "torn"):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    torn = tmp_path / "torn.png"
    torn.write_bytes(torn.read_bytes()[:5000])
    file = tmp_path / "samples.jsonl"
    images = (["good.png"], ["good.png", "torn.png"])
    lines = [{"messages": [{"role": "user", "content": "?"}], "images": each} for each in images]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    samples = bsjax.read_samples(file)
    assert samples.places == (f"{file}, line 1", f"{file}, line 3")
    arguments = {"sinks": Sinks(), "held_out": 0.0, "progress": False}
    with pytest.raises(MessageError, match=r"samples\.jsonl, line 3: Image 2 of 2 .*torn\.png"):
        bsjax.profile(tiny_model, samples, **arguments)


def test_what_read_samples_returns_can_be_profiled(tiny_model):
    samples = bsjax.Samples(SAMPLES[:1], "noise in memory")
    arguments = {"threshold": 0.5, "sinks": Sinks(), "held_out": 0.0, "progress": False}
    assert bsjax.profile(tiny_model, samples, **arguments).source == "noise in memory"
    named = bsjax.profile(tiny_model, samples, **arguments, source="mine")
    assert named.source == "mine" and named.evidence.sample_count == 1


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
    evidence = profile.evidence
    assert (evidence.sample_count, evidence.held_out_count) == (3, 0)
    assert evidence.end_to_end is None and evidence.sink_discovery is None
    assert profile.sinks == Sinks(1, (2,))
    assert evidence.thresholds == {"quantile": 0.9, "threshold": 0.5}
