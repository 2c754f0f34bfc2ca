"""Plots the speed-up over the dense baseline against the ideal speed-up, one panel per workload."""

from pathlib import Path
from typing import Any

_MARKERS = {
    "bsjax, pallas": "o",
    "bsjax, triton": "D",
    "bsjax, xla": "o",
    "FlexAttention": "s",
    "FlexAttention, packed order": "^",
}


def plot(workloads: list[dict[str, Any]], path: Path) -> Path:
    """Draws the results of `benchmarks.attention` and writes the picture to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(4, len(workloads))
    lines = -(-len(workloads) // columns)
    figure = Figure(figsize=(4 * columns, 3.6 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for index, workload in enumerate(workloads):
        axes = figure.add_subplot(lines, columns, index + 1)
        ideals = [mask["ideal_speedup"] for mask in workload["masks"].values()]
        ends = [0.5, 1.2 * max(ideals)]
        axes.plot(ends, ends, color="grey", linewidth=1, label="ideal")
        for name, marker in _MARKERS.items():
            points = [
                (row["ideal_speedup"], row["speedup_over_baseline"])
                for row in workload["rows"]
                if row["variant"] == name and row.get("speedup_over_baseline")
            ]
            if points:
                axes.scatter(*zip(*points, strict=True), marker=marker, s=22, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("ideal speed-up over dense")
        axes.set_ylabel(f"speed-up over {workload['baseline']} dense")
        axes.set_title(
            f"{workload['shape']['name']}, {workload['tokens']} tokens,\n"
            f"images of {workload['image_tokens']}",
            fontsize=9,
        )
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    return path
