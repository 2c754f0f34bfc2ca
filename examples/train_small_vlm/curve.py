"""The learning curve of a run, from its logs."""

from pathlib import Path

from .questions import TASKS
from .training import read_log


def plot_curve(folder: Path, path: Path) -> None:
    """Draws both stages of a run: training and held-out accuracy against steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    tower_panel, model_panel = figure.subplots(1, 2, width_ratios=(1, 2))

    tower = read_log(folder / "tower" / "log.jsonl")
    for name in ("content", "colour"):
        tower_panel.plot(
            [line["step"] for line in tower],
            [100 * line["training"][name] for line in tower],
            label=name,
        )
    tower_panel.set_title("vision tower: single images", fontsize=10)
    tower_panel.set_ylabel("right answers, %")

    model = read_log(folder / "model" / "log.jsonl")
    for index, name in enumerate(("all", *TASKS)):
        colour = "black" if name == "all" else f"C{index - 1}"
        seen = [line for line in model if name in line["training"]]
        model_panel.plot(
            [line["step"] for line in seen],
            [100 * line["training"][name] for line in seen],
            color=colour,
            linewidth=2 if name == "all" else 1,
            label=name,
        )
        held_out = [line for line in model if name in line.get("held_out", {})]
        model_panel.plot(
            [line["step"] for line in held_out],
            [100 * line["held_out"][name] for line in held_out],
            color=colour,
            marker="o",
            markersize=4 if name == "all" else 2.5,
            linestyle="none",
        )
    model_panel.set_title(
        "whole model: lines are training prompts, dots held-out ones of 8 images", fontsize=10
    )
    for panel in (tower_panel, model_panel):
        panel.set_xlabel("step")
        panel.set_ylim(0, 102)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
