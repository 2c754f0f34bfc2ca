"""Predictions beside what a benchmark has measured."""

from collections.abc import Mapping
from typing import Any

import jax

from benchmarks.measure import markdown_table
from benchmarks.variants import bsjax_name
from benchmarks.workloads import SHAPES, AttentionShape, HeadMask, Workload
from bsjax.masks.categories import HeadCategory
from tools.gpu_targets import TARGETS
from tools.speed.kernels import HEAD_DIMS, PACKAGES
from tools.speed.rates import RELATIVES, rates_of
from tools.speed.whole import predict_whole

FALSIFIERS = (
    "a dense run of 75K tokens or more takes 15 % more or less than the model says: then the "
    "cycles of a full block are wrong (`ISSUE`, `loops.alone`)",
    "on an H100 or H200, dense, the Triton kernel takes less than 0.85 or more than 1.15 times as "
    "long as the Pallas kernel: then waits, or instructions, cost other than `loops.alone` reads "
    "from the code",
    "the speed-up of INTRA_IMAGE_SINK over own dense is off by 20 % or more: at 36K tokens a "
    "program then costs more or less than `PROGRAM_CYCLES`, or one without rows than "
    "`EMPTY_CYCLES`; at 300K tokens, where programs are long, partial blocks do",
    "a mix that cuts 32 to 41 % is off by 5 % or more while dense and sparse are right: then "
    "programs do not start in the order, or on the slots, that `simulation` says",
)
"""What on the first GPU run would show that the model is wrong, and in which part."""


def falsifiers() -> str:
    """`FALSIFIERS` as a list, which continues the sentence "The model is wrong if"."""
    return "- " + ";\n- ".join(FALSIFIERS) + "."


def gpu_of(device_kind: str, multiprocessors: int | None = None) -> str | None:
    """The GPU that calls itself so, as `rates.rates_of` calls it; None for one without predictions.

    Args:
      device_kind: what JAX calls a device.
      multiprocessors: how many the device has, if that is known. A GPU of a known name that has
        more or fewer of them is not the one of the data sheet.
    """
    kinds = {each.device_kind: gpu for gpu, each in (*TARGETS.items(), *RELATIVES.items())}
    gpu = kinds.get(device_kind)
    if gpu is None or multiprocessors not in (None, rates_of(gpu).multiprocessors):
        return None
    return gpu


def gpu_in_use() -> str | None:
    """`gpu_of` this machine's first device."""
    device = jax.devices()[0]
    return gpu_of(device.device_kind, getattr(device, "core_count", None))


def is_modelled(shape: AttentionShape) -> bool:
    """Whether the model knows the kernels of a shape."""
    return shape.dtype == "bfloat16" and shape.head_dim in HEAD_DIMS


def beside(result: Mapping[str, Any], gpu: str | None) -> str:
    """A table of what a benchmark measured of bsjax and what the model says of the same masks.

    One line that says why, where there are no predictions.

    Args:
      result: one workload of `benchmarks.attention`.
      gpu: what it ran on; None for a GPU that the model does not know.
    """
    shape = SHAPES[result["shape"]["name"]]
    workload = Workload(shape, result["tokens"], result["image_tokens"])
    if gpu is None:
        return "MODEL: no prediction for this GPU."
    if not is_modelled(shape):
        widths = " or ".join(map(str, HEAD_DIMS))
        return f"MODEL: no prediction for {shape.name}, only for heads of {widths} in bfloat16."
    dense = HeadCategory.DENSE.name
    rows: list[tuple[str, ...]] = []
    dense_times: dict[str, tuple[float, float]] = {}
    for package in PACKAGES:
        for row in result["rows"]:
            if row["variant"] != bsjax_name(package) or "median_seconds" not in row:
                continue
            mask = _mask_of(row["mask"], result, shape)
            measured = row["median_seconds"]
            predicted = predict_whole(workload, mask, package, gpu).seconds
            if mask.is_dense:
                dense_times[package] = measured, predicted
            own = dense_times.get(package)
            over_dense = own and (own[0] / measured, own[1] / predicted)
            rows.append(
                (
                    package,
                    mask.name,
                    f"{1e3 * measured:.3f}",
                    f"{1e3 * predicted:.3f}",
                    f"{measured / predicted:.2f}",
                    *(f"{each:.2f}" for each in over_dense or ()),
                    *([] if over_dense else ["", ""]),
                )
            )
    if not rows:
        return f"MODEL: nothing to compare, no kernel of {' or '.join(PACKAGES)} was timed."
    header = ("kernel", "mask", "measured, ms", "MODEL, ms", "measured / MODEL")
    header += ("measured dense / this", "MODEL dense / this")
    lines = [
        f"MODEL beside measurement: {workload.name}, {gpu}",
        "",
        markdown_table(header, rows),
    ]
    if len(dense_times) == len(PACKAGES):
        measured, predicted = (
            of_triton / of_pallas
            for of_pallas, of_triton in zip(*(dense_times[each] for each in PACKAGES), strict=True)
        )
        lines += ["", f"Triton / Pallas, {dense}: measured {measured:.2f}, MODEL {predicted:.2f}"]
    return "\n".join(lines)


def _mask_of(name: str, result: Mapping[str, Any], shape: AttentionShape) -> HeadMask:
    """A mask of a benchmark's row. DENSE was timed even if it was not asked for."""
    dense = {"categories": [HeadCategory.DENSE.name] * shape.q_heads}
    names = result["masks"].get(name, dense)["categories"]
    return HeadMask(name, tuple(HeadCategory[each] for each in names))
