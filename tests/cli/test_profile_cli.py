"""`bsjax profile` runs with the given options, shows what a file says, and compares two files."""

import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.checkpoint import loading
from bsjax.cli import main
from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory, KeyGroup
from bsjax.masks.template import Sinks
from bsjax.profiles.difference import compare
from bsjax.profiles.evidence import AttentionFlops, Evidence, SinkDiscovery
from bsjax.profiles.picture import plot_profile
from bsjax.profiles.profile import Profile
from bsjax.profiling.settings import Divergence, Reduction, Settings, Threshold
from tests.support.paths import ROOT

LAYERS, HEADS = 3, 10


def measured(
    layers: int = LAYERS,
    heads: int = HEADS,
    *,
    threshold: float = 0.2,
    evidence: dict[str, Any] | None = None,
    **changes,
) -> Profile:
    """A profile such as the profiler makes, with random measurements."""
    generator = np.random.default_rng(0)
    mass = generator.dirichlet([3, 1, 3, 0.5, 0.5], (layers, heads))
    statistics = {f"mass_{group.name}": mass[..., i] for i, group in enumerate(KeyGroup)}
    categories = np.zeros((layers, heads), np.int8)
    for category in (
        HeadCategory.INTRA_IMAGE_SINK,
        HeadCategory.INTRA_IMAGE,
        HeadCategory.SINK,
    ):
        error = generator.random((layers, heads)) ** 2
        statistics[f"error_{category.name}"] = error
        categories[error <= threshold] = category
    measurements = {
        "criterion": "output_error",
        "thresholds": {"threshold": threshold, "quantile": 0.9},
        "sample_count": 6,
        "held_out_count": 2,
        "sample_fingerprint": "cd" * 32,
        "statistics": statistics,
        "attention_flops": AttentionFlops(4 * 10**9, 3 * 10**9),
        "sink_discovery": SinkDiscovery(
            "four times the average", (0.5, *[0.01] * 6, 0.25, *[0.0] * 20)
        ),
        "end_to_end": {"kl_divergence": 1.5e-4, "top_1_agreement": 0.75},
    }
    return Profile(
        **{
            "family": "qwen2_5_vl",
            "categories": categories,
            "sinks": Sinks(1, (7,)),
            "fingerprint": "ab" * 32,
            "evidence": Evidence(**measurements | (evidence or {})),
            "source": "a folder of [bold]photographs[/bold]",
            "versions": {"bsjax": "0.1.0"},
        }
        | changes
    )


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    return status, output.out, output.err


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "profile.json"
    measured().save(path)
    return path


# --- show


def test_show_prints_the_map_and_the_measurements(capsys, saved):
    profile = measured()
    status, out, err = run(capsys, "profile", "show", saved, "--details")
    assert status == 0, err
    rows = json.loads(saved.read_text())["categories"]
    for layer, row in enumerate(rows):
        counts = [f"{row.count(letter) or '.':>2}" for letter in "DSIB"]
        line = f"layer {layer}       {row[:8]} {row[8:]}  {'  '.join(counts)}"
        assert line in out.splitlines()
    for category in HeadCategory:
        heads = int((profile.categories == category).sum())
        (line,) = [one for one in out.splitlines() if f"│ {category.name} " in one]
        assert f" {heads} │" in line and f"{heads / profile.categories.size:.1%}" in line
    values = profile.evidence.statistics["mass_OTHER"]
    (line,) = [one.split() for one in out.splitlines() if one.startswith(" mass_OTHER ")]
    numbers = [np.median(values), values.mean(), values.max()]
    numbers += [values[profile.categories == c].mean() for c in (0, 1, 2, 3)]
    assert line[1:] == [f"{number:.3f}" for number in numbers]
    for words in (
        "qwen2_5_vl, 3 layers of 10 heads",
        "ab" * 32,
        "output_error (threshold 0.2, quantile 0.9)",
        "6, and 2 held out: a folder of [bold]photographs[/bold]",
        "the first token of each image, and offsets 7",
        "attention FLOPs: reduction     0.25",
        "held out: top 1 agreement",
        "four times the average",
        "0 (0.5), 7 (0.25), 1 (0.01)",
    ):
        assert words in out


def test_show_without_details_prints_results_and_no_internals(capsys, tmp_path):
    path = tmp_path / "profile.json"
    figures = {"answer_tokens": 8, "split_seed": 0}
    end_to_end = measured().evidence.end_to_end | figures
    measured(evidence={"end_to_end": end_to_end}).save(path)
    status, out, _ = run(capsys, "profile", "show", path)
    assert status == 0
    for words in (
        "attention FLOPs: reduction",
        "held out: kl divergence",
        "held out: top 1 agreement",
        "6, and 2 held out",
        "INTRA_IMAGE_SINK",
    ):
        assert words in out
    for words in ("mass_", "error_", "four times the average", "answer tokens", "split seed"):
        assert words not in out


def test_show_fits_the_terminal_except_for_what_cannot_be_wrapped(capsys, tmp_path):
    path = tmp_path / "wide.json"
    measured(40, 64, source="a folder").save(path)
    status, out, _ = run(capsys, "profile", "show", path, "--details")
    assert status == 0
    lines = out.splitlines()
    assert sum(line.startswith("layer ") for line in lines) == 41
    (ruler,) = [line for line in lines if line.startswith("layer  ") and "head" in line]
    row = next(line for line in lines if line.startswith("layer  0"))
    # The ruler's numbers are above the heads that they name.
    assert ruler.index("48") == row.index(json.loads(path.read_text())["categories"][0][48:56])
    tables = [
        line for line in lines if not line.startswith(("layer", "checkpoint", "offsets", str(path)))
    ]
    assert max(map(len, tables)) <= 80


def test_show_says_that_a_profile_does_not_come_from_data(capsys, tmp_path):
    path = tmp_path / "uniform.json"
    Profile.uniform("SINK", family="qwen2_vl", layers=2, heads=3, sinks=Sinks(4)).save(path)
    picture = tmp_path / "uniform.png"
    status, out, _ = run(capsys, "profile", "show", path, "--output", picture)
    assert status == 0
    assert "does not come from data" in out
    assert "the first 4 tokens of each image" in out
    assert "SSS" in out and "statistics" not in out
    assert out.endswith(f"{picture}\n")


def test_a_shipped_profile_is_shown_by_its_name(capsys, tmp_path, monkeypatch):
    from bsjax.profiles import profile as profile_file

    measured().save(tmp_path / "some-model.json")
    monkeypatch.setattr(profile_file, "shipped_folder", lambda: tmp_path)
    monkeypatch.chdir("/")
    status, out, _ = run(capsys, "profile", "show", "some-model")
    assert status == 0 and "3 layers of 10 heads" in out


# --- pictures


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (28, 28), (62, 32), (80, 64)])
def test_pictures_show_every_head_at_any_size(tmp_path, layers, heads):
    from matplotlib.colors import to_rgb

    from bsjax.profiles.picture import CATEGORY_COLORS

    profile = measured(layers, heads)
    path = tmp_path / "profile.png"
    figure = plot_profile(profile, path)
    with Image.open(path) as picture:
        assert max(picture.size) < 3000
        pixels = np.asarray(picture.convert("RGB"))
    map_axes = next(axes for axes in figure.get_axes() if axes.get_ylabel() == "layer")
    (image,) = map_axes.images
    np.testing.assert_array_equal(np.asarray(image.get_array()), profile.categories)
    # Each cell has the colour of its category, except for the letter in its middle.
    for layer, head in {(0, 0), (layers - 1, heads - 1), (layers // 2, heads // 3)}:
        x, y = map_axes.transData.transform((head + 0.32, layer + 0.3)) / figure.dpi * 140
        found = pixels[round(pixels.shape[0] - y), round(x)]
        wanted = to_rgb(CATEGORY_COLORS[HeadCategory(int(profile.categories[layer, head]))])
        np.testing.assert_allclose(found / 255, wanted, atol=0.02)


def test_pictures_stack_attention_masses_up_to_one(tmp_path):
    figure = plot_profile(measured())
    axes = {one.get_xlabel(): one for one in figure.get_axes()}
    bars = axes["attention of image queries, mean over heads"].containers
    ends = [patch.get_x() + patch.get_width() for patch in bars[-1].patches]
    np.testing.assert_allclose(ends, 1)
    mass = measured().evidence.statistics["mass_TEXT"].mean(axis=1)
    np.testing.assert_allclose([patch.get_width() for patch in bars[0].patches], mass)
    errors = axes["relative error of a head's output"]
    lines = {line.get_label(): line for line in errors.lines}
    within = lines["SINK"].get_ydata()[
        np.searchsorted(lines["SINK"].get_xdata(), 0.2, side="right") - 1
    ]
    assert within == np.mean(measured().evidence.statistics["error_SINK"] <= 0.2)
    sinks = axes["token of an image, counted from its first"].lines[1]
    assert sinks.get_xdata().tolist() == [0, 7]


def test_pictures_can_be_drawn_from_little_data():
    given = measured(evidence={"sink_discovery": None})
    assert len(plot_profile(given).get_axes()) == 4
    assert len(plot_profile(measured()).get_axes()) == 5
    uniform = Profile.uniform("DENSE", family="gemma3", layers=2, heads=2)
    assert len(plot_profile(uniform).get_axes()) == 1
    # Errors and curves of zero have no logarithm.
    found = given.evidence.statistics
    zero = {name: np.zeros_like(v) for name, v in found.items() if "error" in name}
    flat = {"statistics": found | zero, "sink_discovery": SinkDiscovery("none", (0.0,))}
    assert len(plot_profile(measured(evidence=flat)).get_axes()) == 5


# --- diff


def test_diff_says_that_profiles_are_equal(capsys, saved, tmp_path):
    other = tmp_path / "other.json"
    measured(versions={"bsjax": "0.2.0"}).save(other)
    status, out, _ = run(capsys, "profile", "diff", saved, other)
    assert status == 0
    assert "All 30 heads have the same category." in out
    assert "made with: bsjax 0.1.0  ->  bsjax 0.2.0" in out


def test_diff_lists_heads_and_counts_categories(capsys, saved, tmp_path):
    first, second = (
        measured(),
        measured(threshold=0.1, evidence={"end_to_end": {"kl_divergence": 2e-4}}),
    )
    other = tmp_path / "other.json"
    second.save(other)
    status, out, _ = run(capsys, "profile", "diff", saved, other)
    assert status == 1
    changed = np.argwhere(first.categories != second.categories)
    assert f"{len(changed)} of 30 heads differ ({len(changed) / 30:.1%})." in out
    letters = "DSIB"
    for layer in range(LAYERS):
        entries = [
            f"{head} {letters[first.categories[layer, head]]}"
            f"->{letters[second.categories[layer, head]]}"
            for row, head in changed.tolist()
            if row == layer
        ]
        assert (f"layer {layer}: head {', '.join(entries)}" in out) == bool(entries)
    assert "threshold 0.2, quantile 0.9)  ->  output_error (threshold 0.1," in out
    (line,) = [one.split() for one in out.splitlines() if "kl divergence" in one]
    assert line[-3:] == ["0.00015", "0.0002", "+5e-05"]

    difference = compare(first, second)
    assert difference.confusion.sum() == 30
    for ours in HeadCategory:
        for theirs in HeadCategory:
            both = (first.categories == ours) & (second.categories == theirs)
            assert difference.confusion[ours, theirs] == both.sum()
    assert difference.changed.sum() == 30 - np.trace(difference.confusion)


def test_diff_names_the_head_whose_statistics_changed_most(saved, tmp_path, capsys):
    first = measured()
    statistics = {name: np.array(values) for name, values in first.evidence.statistics.items()}
    statistics["error_SINK"][2, 4] += 3.0
    second = dataclasses.replace(
        first,
        evidence=dataclasses.replace(first.evidence, statistics=statistics),
        categories=np.zeros((LAYERS, HEADS), np.int8),
    )
    changes = compare(first, second).statistics
    (change,) = [one for one in changes if one.name == "error_SINK"]
    assert (change.layer, change.head) == (2, 4)
    assert change.largest == pytest.approx(3.0)
    assert change.second_mean - change.first_mean == pytest.approx(3.0 / 30)
    uniform = Profile.uniform("SINK", family="qwen2_5_vl", layers=LAYERS, heads=HEADS)
    difference = compare(first, uniform)
    assert difference.statistics == ()
    assert set(difference.only_first) == set(first.evidence.statistics)
    path = tmp_path / "uniform.json"
    uniform.save(path)
    assert run(capsys, "profile", "diff", path, saved)[0] == 1


def test_other_sinks_make_profiles_differ(capsys, saved, tmp_path):
    other = tmp_path / "other.json"
    measured(sinks=Sinks(2)).save(other)
    status, out, _ = run(capsys, "profile", "diff", saved, other)
    assert status == 1
    assert "All 30 heads have the same category; sinks differ." in out


def test_profiles_of_other_models_are_not_compared(capsys, saved, tmp_path):
    for name, profile in (
        ("heads", measured(heads=11)),
        ("family", measured(family="qwen2_vl")),
    ):
        other = tmp_path / f"{name}.json"
        profile.save(other)
        status, out, err = run(capsys, "profile", "diff", saved, other)
        assert (status, out) == (2, "")
        assert "only profiles of one model can be compared" in err
    with pytest.raises(ProfileError, match="3 layers of 10 heads, the second .* of 11 heads"):
        compare(measured(), measured(heads=11))


# --- run


@pytest.fixture
def photographs(tmp_path) -> Path:
    folder = tmp_path / "photographs"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(4):
        pixels = generator.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def profiler(monkeypatch):
    """Replaces the profiler and records its arguments."""
    calls = []

    def checked_run(settings, model, samples, **options):
        calls.append((model, samples, settings, options))

    def profile_checked(model, run, progress):
        calls[-1][-1]["progress"] = progress
        return measured()

    monkeypatch.setattr("bsjax.profiling.driver.checked_run", checked_run)
    monkeypatch.setattr("bsjax.profiling.driver.profile_checked", profile_checked)
    monkeypatch.setattr(loading, "describe", lambda path, dtype, **_: (path, dtype))
    monkeypatch.setattr(loading, "with_weights", lambda described, progress: described)
    return calls


def test_run_passes_all_options_on(capsys, profiler, photographs, tmp_path):
    output, state = tmp_path / "out.json", tmp_path / "state"
    status, out, err = run(
        capsys, "profile", "model", photographs, "--output", output, "--limit", 3, "--seed", 5,
        "--images-per-prompt", "2-3", "--question", "One?", "--question", "Two?",
        "--max-pixels", 4000, "--pan-and-scan", "--held-out", 0.5, "--criterion", "mass",
        "--threshold", 0.1, "--quantile", 0.75, "--target-reduction", 0.4, "--refine",
        "--max-evaluations", 50,
        "--sinks-first", 2, "--sink-offset", 9, "--sink-offset", 4, "--answer-tokens", 4,
        "--resume", state, "--dtype", "float32", "--backend", "xla",
    )  # fmt: skip
    assert status == 0, err
    ((model, samples, settings, options),) = profiler
    assert model == ("model", "float32")
    expected = bsjax.read_samples(
        photographs,
        limit=3,
        seed=5,
        images_per_prompt=(2, 3),
        question=["One?", "Two?"],
        max_pixels=4000,
        pan_and_scan=True,
    )
    assert samples == expected and len(samples.messages) == 3
    assert settings == Settings(
        budget=Reduction(0.4),
        criterion="mass",
        quantile=0.75,
        refine=True,
        max_evaluations=50,
        held_out=0.5,
        answer_tokens=4,
        seed=5,
    )
    assert options == {
        "sinks": Sinks(2, (9, 4)),
        "source": expected.description,
        "resume": state,
        "progress": None,
        "backend": "xla",
    }
    assert Profile.load(output).to_json() == measured().to_json()
    assert "attention FLOPs: reduction" in out and out.endswith(f"{output}\n")


def test_run_can_be_named_and_options_may_come_first(capsys, profiler, photographs, tmp_path):
    output = tmp_path / "out.json"
    for arguments in (
        ("run", "model", photographs, "--output", output),
        ("--output", output, "model", photographs, "--quiet"),
        ("run", "show", photographs, "--output", output),
    ):
        assert run(capsys, "profile", *arguments)[0] == 0
    first, second, third = profiler
    assert first[0] == second[0] == ("model", None)
    assert third[0] == ("show", None)
    *_, settings, options = first
    assert settings == Settings()
    assert options["sinks"] is None
    assert options["progress"] is None and second[-1]["progress"] is False
    # The remaining defaults are those of `bsjax.profile`.
    parameters = inspect.signature(bsjax.profile).parameters
    assert options | {"source": ""} == {name: parameters[name].default for name in options}


@pytest.mark.parametrize(
    ("arguments", "budget"),
    [
        (("--threshold", 0.1), Threshold(0.1)),
        (("--target-reduction", 0.4), Reduction(0.4)),
        (("--refine", "--max-kl", 0.02), Divergence(0.02)),
    ],
)
def test_run_has_one_budget(capsys, profiler, photographs, tmp_path, arguments, budget):
    output = tmp_path / "out.json"
    assert run(capsys, "profile", "model", photographs, "--output", output, *arguments)[0] == 0
    ((_, _, settings, _),) = profiler
    assert settings.budget == budget


@pytest.mark.slow
def test_run_profiles_a_real_checkpoint(capsys, tiny_checkpoint, photographs, tmp_path):
    output = tmp_path / "out.json"
    status, out, err = run(
        capsys, "profile", tiny_checkpoint, photographs, "--images-per-prompt", 2, "--limit", 2,
        "--output", output, "--target-reduction", 0.02, "--held-out", 0, "--sinks-first", 1,
    )  # fmt: skip
    assert status == 0, err
    profile = Profile.load(output)
    evidence = profile.evidence
    assert evidence.sample_count == 2 and evidence.end_to_end is None
    assert evidence.attention_flops.reduction >= 0.02
    (line,) = [one.split() for one in out.splitlines() if "reduction" in one]
    assert line[-1] == f"{evidence.attention_flops.reduction:.4g}"
    assert "2 prompts of 2 of the 4 images in the folder photographs" in profile.source
    picture = tmp_path / "out.png"
    assert run(capsys, "profile", "show", output, "--output", picture)[0] == 0
    assert picture.stat().st_size > 10_000
    assert run(capsys, "profile", "diff", output, output)[0] == 0


@pytest.mark.parametrize(
    ("source", "options", "words"),
    [
        ("empty.jsonl", [], "is empty"),
        ("broken.jsonl", [], "broken.jsonl, line 2 is not JSON"),
        ("digits.jsonl", [], "digits.jsonl, line 1 is not JSON"),
        ("image.jsonl", [], "line 1: there is no image"),
        ("nothing", [], "no file or folder nothing"),
        ("", [], "an empty text"),
        ("benchmark:nothing", [], "no benchmark 'nothing'"),
        ("folder", ["--limit", "0"], "--limit must be at least 1"),
        ("folder", ["--images-per-prompt", "9-3"], "below the smallest"),
        ("folder", [], "has 0 images"),
        ("folder", ["--sinks-first", "0"], "--sinks-first or --sink-offset: "),
        ("folder", ["--threshold", "-1"], "--threshold must be a number of at least 0"),
        ("folder", ["--held-out", "1"], "--held-out must be"),
        ("folder", ["--max-kl", "0.1"], "turn on --refine"),
        ("folder", ["--refine", "--max-kl", "0.1", "--target-reduction", "0.4"], "not both"),
        ("folder", ["--output", "no folder/out.json"], "there is no folder"),
        ("folder", ["--output", "folder"], "is a folder"),
        ("folder", ["--output", "empty.jsonl/out.json"], "there is no folder"),
    ],
)
def test_bad_runs_give_a_one_line_error(
    capsys, profiler, tmp_path, monkeypatch, source, options, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    Path("empty.jsonl").touch()
    Path("broken.jsonl").write_text('[{"role": "user", "content": "?"}]\n{"messages": \n')
    image = [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]
    Path("image.jsonl").write_text(json.dumps(image))
    Path("digits.jsonl").write_text(f'{{"messages": [], "number": {"1" * 5000}}}\n')
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "profile", "model", source, "--output", "out.json", *options)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert words in err
    assert not profiler
    assert sorted(tmp_path.iterdir()) == before


def test_an_interrupted_run_says_where_its_measurements_are(
    capsys, profiler, photographs, tmp_path, monkeypatch
):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("bsjax.profiling.driver.profile_checked", interrupted)
    output = tmp_path / "out.json"
    status, out, err = run(capsys, "profile", "model", photographs, "--output", output)
    assert (status, out, err) == (130, "", "interrupted\n")
    state = tmp_path / "state"
    status, _, err = run(
        capsys, "profile", "model", photographs, "--output", output, "--resume", state
    )
    assert status == 130 and str(state) in err and err.endswith("interrupted\n")
    assert not output.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["run"],
        ["run", "model", "source"],
        ["model", "--output", "out.json"],
        ["model", "source", "--output", "out.json", "--criterion", "guess"],
        ["model", "source", "--output", "out.json", "--images-per-prompt", "few"],
        ["model", "source", "--output", "out.json", "--threshold", "low"],
        ["show"],
        ["diff", "a.json"],
    ],
)
def test_wrong_usage_exits_with_2(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        main(["profile", *arguments])
    assert caught.value.code == 2
    assert "usage: bsjax profile" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["run"], ["show"], ["diff"]])
def test_every_command_has_help(capsys, command):
    with pytest.raises(SystemExit) as caught:
        main(["profile", *command, "--help"])
    assert caught.value.code == 0
    assert (
        f"usage: bsjax profile{''.join(f' {name}' for name in command)}" in capsys.readouterr().out
    )


@pytest.mark.parametrize("command", ["show", "diff"])
def test_bad_profiles_are_refused(capsys, saved, tmp_path, command):
    status, _, err = run(capsys, "profile", "show", "x" * 5000)
    assert status == 2 and "cannot be read" in err
    for name, content, words in (
        ("missing.json", None, "cannot be read"),
        ("empty.json", b"", "not JSON"),
        ("other.json", b"{}", "not a profile"),
        ("binary.json", b"\xff\xfe", "cannot be read"),
        ("digits.json", b'{"layers": ' + b"1" * 5000 + b"}", "not JSON"),
    ):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        arguments = [path] if command == "show" else [saved, path]
        status, out, err = run(capsys, "profile", command, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ") and words in err and str(path) in err


@pytest.mark.parametrize("name", ["no folder/profile.png", "profile.txt", "profile", "."])
def test_a_picture_that_cannot_be_written_is_refused(capsys, saved, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    status, out, err = run(capsys, "profile", "show", saved, "--output", name)
    assert (status, out) == (2, "")
    assert "picture cannot be written" in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_interrupts_leave_no_temporary_files(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    for write in (measured().save, lambda path: plot_profile(measured(), path)):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


def test_pictures_say_when_matplotlib_is_missing(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, err = run(capsys, "profile", "show", saved, "--output", "out.png")
    assert status == 2 and "pip install matplotlib" in err
    assert run(capsys, "profile", "show", saved)[0] == 0


def test_it_runs_as_a_module_with_a_narrow_terminal_encoding(saved):
    done = subprocess.run(
        [sys.executable, "-m", "bsjax", "profile", "show", str(saved)],
        env={"PYTHONIOENCODING": "ascii", "PATH": "/usr/bin:/bin", "COLUMNS": "80"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "3 layers of 10 heads" in done.stdout
