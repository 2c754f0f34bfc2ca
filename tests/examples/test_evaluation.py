"""The evaluation measures what generation does, and says how sure it is."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bsjax
import convert.__main__
from bsjax.masks.categories import HeadCategory
from bsjax.models import FAMILIES
from bsjax.profiles.profile import Profile
from bsjax.profiling.state import State
from examples.evaluate import (
    Condition,
    Hybrid,
    accuracies,
    answered,
    control_conditions,
    evaluate,
)
from examples.evaluation_report import plot, report
from examples.train_small_vlm.batches import QUESTION_ROWS
from examples.train_small_vlm.conversations import draw_conversations, messages, write_samples
from examples.train_small_vlm.export import export
from examples.train_small_vlm.files import PATCH_SIZE, make_config, make_tokenizer
from examples.train_small_vlm.forward import groups_of_layers
from examples.train_small_vlm.held_out import HeldOut
from examples.train_small_vlm.questions import TASKS, Question
from examples.train_small_vlm.scenes import CONTENTS, Picture, Scene
from examples.train_small_vlm.training import Settings, check_settings

LAYERS, HEADS = 5, 6


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    """An untrained model, exported and converted like a trained one."""
    folder = tmp_path_factory.mktemp("small")
    config = make_config(make_tokenizer())
    module = FAMILIES[config.model_type].build(config, jnp.float32)
    export(nnx.state(module), config, folder / "source")
    arguments = [str(folder / "source"), str(folder / "converted"), "--quiet"]
    assert convert.__main__.main(arguments) == 0
    return bsjax.load(folder / "converted")


@pytest.fixture(scope="module")
def prompts(small_model):
    sinks = bsjax.Sinks(first=1, offsets=(2,))
    return HeldOut(small_model, scenes=3, images=(3, 5), sinks=sinks, seed=5)


def with_generated_answers(model, prompts, categories):
    """Declares the answer of `bsjax.generate` to be the right answer of every other prompt.

    Prompts are read back from the batches. Returns which prompts it then answers right, and the
    share of FLOPs that it saves.
    """
    profile = Profile(
        family="qwen2_5_vl", categories=categories, sinks=bsjax.Sinks(first=1, offsets=(2,))
    )
    mean, std = (np.asarray(getattr(model.image_processor, f"image_{n}")) for n in ("mean", "std"))
    right, saved = [], []
    for group in prompts.encoded:
        batch = group.batch
        shared = batch.order.shape[1] - len(TASKS) * QUESTION_ROWS
        for scene in range(len(batch.tasks)):
            pictures = []
            for values, size in zip(
                batch.pixel_values[scene], batch.size_class[scene], strict=True
            ):
                height, width = prompts.encoder.sizes[size]
                blocks = values[: height * width // PATCH_SIZE**2].reshape(
                    height // PATCH_SIZE, width // PATCH_SIZE, 3, 2, PATCH_SIZE, PATCH_SIZE
                )[..., 0, :, :]
                pixels = blocks.transpose(0, 3, 1, 4, 2).reshape(height, width, 3)
                pixels = np.round((pixels * std + mean) * 255).astype(np.uint8)
                pictures.append(Picture(CONTENTS[0], "red", pixels))
            for question in range(len(TASKS)):
                start = shared + question * QUESTION_ROWS
                end = batch.answer_rows[scene, question, 0] - 4
                text = model.tokenizer.decode(batch.token_ids[scene, start:end])
                wanted = batch.answers[scene, question]
                rows = batch.answer_rows[scene, question]
                result = bsjax.generate(
                    model,
                    messages(Scene(tuple(pictures)), Question("", "", text, "", ())),
                    profile=profile,
                    max_new_tokens=3,
                )
                if (scene + question) % 2:
                    wanted[:] = [result.token_ids[0], -1, -1]
                    batch.token_ids[scene, rows[0] + 1] = wanted[0]
                length = int((wanted >= 0).sum())
                right.append(list(result.token_ids[:length]) == wanted[:length].tolist())
                stats = result.stats
                saved.append((stats.attention_flops_dense, stats.attention_flops_sparse))
    dense, sparse = np.sum(saved, axis=0)
    return np.reshape(right, (-1, len(TASKS))), 1 - sparse / dense


@pytest.mark.slow
def test_prompts_are_answered_as_generate_answers_them(small_model, prompts):
    categories = np.random.default_rng(0).integers(0, 4, (LAYERS, HEADS)).astype(np.int8)
    expected, saved = with_generated_answers(small_model, prompts, categories)
    np.testing.assert_array_equal(prompts.right(categories), expected)
    assert prompts.reduction(categories) == pytest.approx(saved, abs=1e-9)
    assert 0 < expected.mean() < 1
    # Other categories give other answers, some of which are then wrong.
    assert prompts.right(np.zeros_like(categories)).sum() < expected.sum()


def test_controls_save_what_the_profile_saves():
    random = np.random.default_rng(1)
    categories = random.integers(0, 4, (LAYERS, HEADS)).astype(np.int8)
    controls = list(control_conditions(categories, seed=0))
    dealt = [control for control in controls if control.kind == "dealt at random"]
    assert len({control.categories.tobytes() for control in dealt}) == len(dealt) > 1
    for control in dealt:
        np.testing.assert_array_equal(
            np.bincount(control.categories[:-1].ravel()), np.bincount(categories[:-1].ravel())
        )
        np.testing.assert_array_equal(control.categories[-1], categories[-1])
    of_layers = [control for control in controls if control.kind == "dealt within layers"]
    assert len({control.categories.tobytes() for control in of_layers}) == len(of_layers) > 1
    for control in of_layers:
        np.testing.assert_array_equal(np.sort(control.categories), np.sort(categories))
    uniform = {int(c.categories.max()) for c in controls if c.kind == "one for all heads"}
    assert uniform == {HeadCategory.SINK, HeadCategory.INTRA_IMAGE, HeadCategory.INTRA_IMAGE_SINK}


@pytest.mark.slow
def test_what_was_measured_is_recalled(prompts, tmp_path, monkeypatch):
    state = State(tmp_path / "state")
    categories = np.ones((LAYERS, HEADS), np.int8)
    found = answered(prompts, categories, state)
    monkeypatch.setattr(prompts, "right", lambda categories: np.zeros((1, 1), bool))
    np.testing.assert_array_equal(answered(prompts, categories, state), found)
    assert answered(prompts, categories * 2, state).shape == (1, 1), "other categories"
    monkeypatch.setattr(prompts, "name", "other prompts")
    assert answered(prompts, categories, state).shape == (1, 1)


@pytest.mark.slow
def test_a_hybrid_is_evaluated_with_the_layers_it_was_trained_with(small_model, tmp_path):
    check_settings(tmp_path / "run" / "settings.json", Settings(sparse_layers=(1, 3)))
    config = make_config(make_tokenizer())
    export(nnx.state(small_model.module), config, tmp_path / "run" / "checkpoint")
    hybrid = Hybrid.of(tmp_path / "run")
    assert hybrid.name == "layers 1, 3" and hybrid.model.fingerprint == small_model.fingerprint
    expected = np.zeros((LAYERS, HEADS), np.int8)
    expected[[1, 3]] = HeadCategory.INTRA_IMAGE_SINK
    np.testing.assert_array_equal(hybrid.categories, expected)
    # Training uses the key groups of these categories.
    of_layers = groups_of_layers(config, hybrid.sparse_layers)
    of_categories = [HeadCategory(category).groups for category in expected[:, 0]]
    assert of_layers[[1, 3], 0].tolist() == [of_categories[1], of_categories[3]]
    prompts = HeldOut(hybrid.model, scenes=1, images=(2,), sinks=hybrid.sinks, seed=0)
    sparse = evaluate(prompts, [Condition("hybrid", hybrid.name, hybrid.categories)], 0)
    assert 0 < sparse[0]["reduction"] < prompts.reduction(np.full_like(expected, 3))
    # With so few images no question is about repeats, so the task is missing from the tables.
    asked = {list(TASKS)[index] for index in prompts.tasks.ravel()}
    assert len(asked) < len(TASKS)
    assert set(prompts.commonest()) == set(sparse[0]["change_by_task"]) == asked


@pytest.mark.parametrize(
    ("settings", "message"),
    [(None, "not have the settings.json"), (Settings(), "without sparse layers")],
)
def test_a_run_without_sparse_layers_is_refused_as_a_hybrid(settings, message, tmp_path):
    if settings is not None:
        check_settings(tmp_path / "settings.json", settings)
    with pytest.raises(SystemExit, match=message):
        Hybrid.of(tmp_path)


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(2)
    tasks = np.tile(np.arange(len(TASKS)), (150, 1))
    held = changed = 0
    for trial in range(60):
        # Questions about one scene share its difficulty.
        easy = random.uniform(0.6, 1.0, (150, 1))
        baseline = random.random(tasks.shape) < easy
        right = baseline ^ (random.random(tasks.shape) < 0.05)
        found = accuracies(right, baseline, tasks, trial)
        low, high = found["accuracy"]["all"][1:]
        truth = 0.8 - 0.05 * 0.8 + 0.05 * 0.2
        held += low <= truth <= high
        low, high = found["change"][1:]
        changed += low <= truth - 0.8 <= high
    # If all agree, resampling would leave no doubt, but 150 scenes leave a doubt of 2.4 %.
    certain = accuracies(np.ones(tasks.shape, bool), np.ones(tasks.shape, bool), tasks, 0)
    assert certain["accuracy"]["all"] == [1.0, pytest.approx(0.9757, abs=1e-4), 1.0]
    assert certain["change"] == [0.0, *(pytest.approx(end, abs=1e-4) for end in (-0.0243, 0.0243))]
    # 95 % of 60 are 57; fewer than 51 happen once in 500.
    assert held > 50 and changed > 50


@pytest.mark.slow
def test_page_and_picture_hold_every_condition(small_model, prompts, tmp_path):
    conditions = [
        Condition("dense", "", np.zeros((LAYERS, HEADS), np.int8)),
        Condition("refined", "at least 40%", np.full((LAYERS, HEADS), 2, np.int8)),
        *control_conditions(np.eye(LAYERS, HEADS, dtype=np.int8), 0),
    ]
    rows = evaluate(prompts, conditions, 0)
    assert rows[0]["reduction"] == 0 and rows[0]["change"][0] == 0
    assert rows[1]["reduction"] > 0.3
    one_set = {
        "images": [3, 5],
        "prompts": 18,
        "tasks": prompts.tasks.tolist(),
        "commonest": prompts.commonest(),
        "rows": rows,
    }
    assert one_set["commonest"].keys() == TASKS.keys()
    assert all(1 / 3 <= share <= 1 for share in one_set["commonest"].values()), "of 3 answers"
    results = {
        "date": "2026-01-01",
        "device": "cpu",
        "machine": "x",
        "versions": {"jax": "0"},
        "calibration_prompts": 4,
        "profile": {"name": "some-profile", "samples": 96, "source": "somewhere"},
        "hybrid": None,
        "sets": {"as profiled": one_set, "more images": one_set},
    }
    page = report(results, "picture.png")
    for row in rows:
        # For both sets: one table over all tasks, one for each task, and one of changes.
        tables = 2 if row["kind"] == "dense" else 3
        assert page.count(f"| {row['kind']} | {row['name']} |") == 2 * tables
    assert "`some-profile`, chosen on 96 other prompts (somewhere)" in page
    controls = [row for row in rows if row["kind"] not in ("dense", "refined")]
    lose = sum(row["change"][2] < 0 for row in controls)
    assert page.count(f"below zero: {lose} of {len(controls)}.") == 2
    assert "hybrid" not in page
    page = report(results | {"hybrid": {"sparse_layers": [1, 3]}}, "picture.png")
    assert "its layers 1, 3 (counted from" in page and "--hybrid RUN" in page
    plot(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_samples_are_files_that_profiling_reads(tmp_path):
    from bsjax.samples import read_samples

    drawn = draw_conversations(5, seed=3)
    path = write_samples(tmp_path / "samples", drawn)
    samples, _ = read_samples(path)
    assert len(samples) == 5
    for (scene, question), sample in zip(drawn, samples, strict=True):
        content = sample[0]["content"]
        assert content[-1]["text"] == question.text
        assert len(content) == len(scene.pictures) + 1
