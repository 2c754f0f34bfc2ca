"""The page and the picture of `examples.evaluate`, from its results."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .train_small_vlm.questions import TASKS

Row = dict[str, Any]

LINES = {
    "refined": ("tab:blue", "o"),
    "one-shot, error": ("tab:orange", "s"),
    "one-shot, mass": ("tab:green", "^"),
    "refined on 2 and 3 images": ("tab:gray", "d"),
}
CONTROLS = ("dealt at random", "dealt within layers", "one for all heads")
POINTS = {
    "profile": ("tab:blue", "*"),
    "dealt at random": ("tab:red", "x"),
    "dealt within layers": ("tab:pink", "+"),
    "one for all heads": ("tab:purple", "D"),
    "hybrid": ("tab:brown", "P"),
    "at the hybrid's FLOPs": ("tab:cyan", "v"),
}


def report(results: dict[str, Any], picture: str) -> str:
    """The Markdown page."""
    parts = [_INTRODUCTION.format(**results)]
    hybrid = results["hybrid"]
    if hybrid is not None:
        measured = hybrid.get("measured")
        parts[0] += _HYBRID.format(
            layers=", ".join(map(str, hybrid["sparse_layers"])),
            measured=f" The hybrid's answers are those of {measured}." if measured else "",
        )
    parts.append(f"![Change of accuracy against FLOPs saved]({picture})\n")
    parts.append(_NOTES)
    for name, one_set in results["sets"].items():
        images = ", ".join(map(str, one_set["images"]))
        parts.append(f"## {_TITLES[name]}\n\n{one_set['prompts']} prompts of {images} images.\n")
        parts.append(_table(one_set["rows"]))
        parts.append(_controls(one_set["rows"]))
        parts.append(
            "Accuracy by task, in %. *Most common answer* is the score for always giving it:\n"
        )
        parts.append(_task_table(one_set))
        parts.append("Change relative to dense by task, in points:\n")
        parts.append(_change_table(one_set["rows"]))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    command = "python -m examples.evaluate" + ("" if hybrid is None else " --hybrid RUN")
    parts.append(
        f"Made on {results['date']} by `{command}` on {results['machine']} ({results['device']}); "
        f"{versions}. `benchmarks/results/evaluation.json` has the result for every prompt.\n"
    )
    return "\n".join(parts)


_TITLES = {
    "as profiled": "As many images as were profiled",
    "more images": "More images than were profiled",
}

_INTRODUCTION = """\
# Accuracy of the small trained model, dense and sparse

The Qwen2.5-VL that `examples/train_small_vlm` trains answers questions about scenes with
handwritten digits that neither training nor profiling has seen. An answer is right if all of its
tokens are. *FLOPs saved* counts attention FLOPs of prefill, over all layers, heads and prompts,
text queries included. In the last layer only the last token of a prompt has a query, dense or
sparse, so nothing can be saved there. *Change* is relative to dense, prompt by prompt. Intervals
are 95 % bootstrap intervals over scenes (questions about one scene are not independent).

- **dense**: every head sees everything.
- **profile**: `{profile[name]}`, chosen on {profile[samples]} other prompts ({profile[source]}).
- **one-shot**: every head takes the cheapest category within a threshold, which limits the error of
  its output or the attention mass that it drops. The threshold is the smallest that saves the given
  share of FLOPs.
- **refined**: categories are chosen by measured damage to the answers per FLOP saved, then
  corrected while all other heads have their chosen categories, too. One-shot and refined
  conditions are chosen on {calibration_prompts} prompts of 4 to 8 images with training digits.
- **refined on 2 and 3 images**: the same, on as many prompts of two and three images. All prompts
  evaluated here have more images; the FLOPs budget refers to the prompts that were refined on.
- **dealt at random**: a control. The profile's categories, assigned to other heads at random,
  except those of the last layer, where they change nothing; the FLOPs are the same.
- **dealt within layers**: a control. Categories are exchanged only between heads of one layer.
- **one for all heads**: a control. The same category for every head.
"""

_HYBRID = """\
- **hybrid**: another model, trained in the same way except that its layers {layers} (counted from
  0) are INTRA_IMAGE_SINK from the first training step on. Its change is also relative to the
  dense-trained model. **at the hybrid's FLOPs** is the dense-trained model, refined to the FLOPs of
  the hybrid.{measured}
"""

_NOTES = """\
Notes:

- If no question of a task can be asked about a scene (for instance because no image is the only one
  of its kind), the question asks for the content of an image instead. So tasks have different
  numbers of prompts, and *find* and *repeat* become rarer with more images. Beyond eight images,
  *repeat* never asks about colours, as there are only eight.
- Only *repeat* needs image tokens to look at other images. Where the dense model is bad at it,
  there is little to lose, and a condition that loses nothing proves little. The controls show
  whether that is so.
- Scenes with too many large images are drawn again, as in training, where scenes have up to twelve
  images.
- The model was taught where a few heads should look (`examples/train_small_vlm/README.md`): at the
  last tokens of images. Sinks are the first tokens of images and get little of its attention.
"""


def _controls(rows: Sequence[Row]) -> str:
    """How many controls lose accuracy significantly: if none does, these prompts prove little."""
    controls = [row for row in rows if row["kind"] in CONTROLS]
    lose = sum(row["change"][2] < 0 for row in controls)
    return (
        "Controls that lose accuracy, with the whole interval below zero: "
        f"{lose} of {len(controls)}.\n"
    )


def _table(rows: Iterable[Row]) -> str:
    lines = [
        "| categories | | FLOPs saved | accuracy | change in points |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        changed = "" if row["kind"] == "dense" else _percent(row["change"], "+.2f")
        accuracy = _percent(row["accuracy"]["all"], ".2f", " %")
        lines.append(
            f"| {row['kind']} | {row['name']} | {row['reduction']:.1%} | {accuracy} | {changed} |"
        )
    return "\n".join(lines) + "\n"


def _task_table(one_set: dict[str, Any]) -> str:
    rows, commonest = one_set["rows"], one_set["commonest"]
    asked = [task for scene in one_set["tasks"] for task in scene]
    counts = [asked.count(index) for index in range(len(TASKS))]
    chance = [f"{100 * commonest[task]:.1f}" if task in commonest else "" for task in TASKS]
    lines = [
        f"| categories | | {' | '.join(TASKS)} |",
        f"|---|---|{'---|' * len(TASKS)}",
        f"| prompts | | {' | '.join(map(str, counts))} |",
        f"| most common answer | | {' | '.join(chance)} |",
    ]
    lines += [_task_line(row, "accuracy", ".1f") for row in rows]
    return "\n".join(lines) + "\n"


def _change_table(rows: Iterable[Row]) -> str:
    lines = [f"| categories | | {' | '.join(TASKS)} |", f"|---|---|{'---|' * len(TASKS)}"]
    lines += [_task_line(row, "change_by_task", "+.1f") for row in rows if row["kind"] != "dense"]
    return "\n".join(lines) + "\n"


def _task_line(row: Row, measured: str, form: str) -> str:
    values = row[measured]
    cells = (_percent(values[task], form) if task in values else "" for task in TASKS)
    return f"| {row['kind']} | {row['name']} | {' | '.join(cells)} |"


def _percent(interval: Iterable[float], form: str, unit: str = "") -> str:
    """A share and the ends of its interval, in percent."""
    share, low, high = (format(100 * value, form) for value in interval)
    return f"{share}{unit} ({low} to {high})"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draws the change of accuracy against FLOPs saved, one panel for each set of prompts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(results["sets"]), sharey=True)
    for panel, (name, one_set) in zip(panels, results["sets"].items(), strict=True):
        rows = one_set["rows"]
        dense = next(row for row in rows if row["kind"] == "dense")["accuracy"]["all"]
        panel.axhline(0, color="grey", linewidth=1, label="dense")
        panel.axhspan(-0.5, 0.5, color="grey", alpha=0.2, label="half a point")
        for kind, (colour, marker) in {**LINES, **POINTS}.items():
            chosen = sorted(
                (row for row in rows if row["kind"] == kind), key=lambda row: row["reduction"]
            )
            if not chosen:
                continue
            saved = [100 * row["reduction"] for row in chosen]
            change = [100 * row["change"][0] for row in chosen]
            errors = [
                [100 * (row["change"][0] - row["change"][1]) for row in chosen],
                [100 * (row["change"][2] - row["change"][0]) for row in chosen],
            ]
            panel.errorbar(
                saved,
                change,
                yerr=errors,
                color=colour,
                marker=marker,
                markersize=10 if marker == "*" else 6,
                linestyle="-" if kind in LINES else "none",
                linewidth=1.2,
                elinewidth=0.8,
                capsize=2,
                label=kind,
            )
            if kind == "one for all heads":
                for row, x, y in zip(chosen, saved, change, strict=True):
                    panel.annotate(
                        row["name"].lower(), (x, y), (5, 4), textcoords="offset points", fontsize=7
                    )
        title = f"{_TITLES[name]}: {one_set['prompts']} prompts, dense {100 * dense[0]:.1f} % right"
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("attention FLOPs of prefill saved, %")
        panel.grid(alpha=0.3)
    # All panels show the same conditions.
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    panels[0].set_ylabel("accuracy: change from dense, points")
    figure.savefig(path, dpi=150)
