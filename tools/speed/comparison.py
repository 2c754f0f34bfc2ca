"""Predictions beside what a benchmark has measured."""

from collections.abc import Mapping
from typing import Any

from benchmarks.measure import markdown_table
from benchmarks.variants import BSJAX
from benchmarks.workloads import SHAPES, HeadMask, Workload
from bsjax.masks.categories import HeadCategory
from tools.gpu_targets import TARGETS
from tools.speed.kernels import HEAD_DIMS
from tools.speed.whole import predict_whole

FALSIFIERS = (
    "a dense run of 75K tokens or more takes 15 % more or less than the model says: then the "
    "cycles of a full block are wrong (`ISSUE`, `loops.alone`)",
    "on an H100 or H200, dense, the Triton kernel takes less than 1.2 times as long as the Pallas "
    "kernel: then waits for copies cost less than `loops.alone` reads from the code",
    "the speed-up of INTRA_IMAGE_SINK over own dense is off by 20 % or more: at 36K tokens a "
    "program then costs more or less than `PROGRAM_CYCLES`, or one without rows than "
    "`EMPTY_CYCLES`; at 300K tokens, where programs are long, partial blocks do",
    "a mix that cuts 32 to 41 % is off by 5 % or more while dense and sparse are right: then "
    "programs do not start in the order, or on the slots, that `simulation` says",
)
"""What on the first GPU run would show that the model is wrong, and in which part."""


def gpu_of(device_kind: str) -> str | None:
    """The GPU in `gpu_targets.TARGETS` that calls itself so; None if there is none."""
    kinds = {target.device_kind: gpu for gpu, target in TARGETS.items()}
    return kinds.get(device_kind)


def beside(result: Mapping[str, Any], gpu: str, package: str) -> str:
    """A table of what the benchmark measured of bsjax and what the model says of the same masks.

    Args:
      result: one workload of `benchmarks.attention`.
      gpu: what it ran on.
      package: the kernel that ran, "pallas" or "triton".
    """
    shape = SHAPES[result["shape"]["name"]]
    if shape.dtype != "bfloat16" or shape.head_dim not in HEAD_DIMS:
        return f"No prediction for {shape.name}: the model knows other kernels."
    workload = Workload(shape, result["tokens"], result["image_tokens"])
    measured = {
        row["mask"]: row["median_seconds"]
        for row in result["rows"]
        if row["variant"] == BSJAX and "median_seconds" in row
    }
    rows = []
    predicted: dict[str, float] = {}
    dense = HeadCategory.DENSE.name
    for name, seconds in measured.items():
        categories = tuple(HeadCategory[each] for each in result["masks"][name]["categories"])
        predicted[name] = predict_whole(workload, HeadMask(name, categories), package, gpu).seconds
        over_dense = [
            f"{times[dense] / times[name]:.2f}" if dense in times else ""
            for times in (measured, predicted)
        ]
        cells = (f"{1e3 * seconds:.3f}", f"{1e3 * predicted[name]:.3f}")
        rows.append((name, *cells, f"{seconds / predicted[name]:.2f}", *over_dense))
    header = ("mask", "measured, ms", "MODEL, ms", "measured / MODEL")
    header += ("measured dense / this", "MODEL dense / this")
    lines = [
        f"MODEL of the {package} kernel beside measurement: {workload.name}, {gpu}",
        "",
        markdown_table(header, rows),
        "",
        "The model is wrong if",
        *(f"- {each};" for each in FALSIFIERS),
    ]
    return "\n".join(lines)
