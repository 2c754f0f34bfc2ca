"""Compares bsjax's attention with dense implementations and FlexAttention, for one layer.

    python -m benchmarks.attention --tokens 75K --time-limit 540   # on a GPU
    python -m benchmarks.attention            # without one: small sizes, on the CPU

A workload is a shape (a published model's heads) and a prompt (tokens, tokens per image). Each
variant is first compared with float32. Then all variants and masks of a workload are timed on the
same random inputs, interleaved in rounds, which also measure the rate of matrix products and the
bandwidth of a copy. A variant that is not installed, fails or is wrong stays in the table with the
reason. On a GPU that the model of speed knows (docs/speed.md), its predictions are printed, too.

Results are written after each workload. `--time-limit` ends the run before a deadline, for machines
rented by the minute; the printed output and the JSON file list what was left out.

Needs JAX and NumPy; PyTorch, tokamax and matplotlib are used if they are installed.
"""

import argparse
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.attention_arrays import Arrays, random_arrays
from benchmarks.dense_rows import greatest_error, sampled_positions, tolerance
from benchmarks.device_timing import copy_call, jax_sampler, matrix_rate_call
from benchmarks.measure import RESULTS, interleaved_samples, markdown_table, write_result
from benchmarks.predictions import print_falsifiers, print_predictions, seconds_for_predictions
from benchmarks.variants import (
    BSJAX,
    CUDNN,
    FLEX,
    FLEX_PACKED,
    JAX_XLA,
    NotAvailable,
    Variant,
    variants,
    wanted_rows,
)
from benchmarks.workloads import MASK_NAMES, SHAPES, AttentionShape, HeadMask, Workload
from bsjax.attention import GPU_KERNELS, resolve_backend

GPU_TOKENS = tuple(1024 * thousands for thousands in (36, 75, 150, 300))
CPU_TOKENS = (4096,)
GPU_SHAPES = (
    "qwen2.5-vl-7b",
    "gemma-3-4b-global",
    "gemma-3-4b-local",
    "gemma-3-27b-global",
    "gemma-3-27b-local",
)
CPU_SHAPES = ("small", "small-window")
QUICK_MASKS = ("DENSE", "INTRA_IMAGE_SINK", "cut 41 %")

ROWS_CHECKED = 64
_MATRIX, _COPY = "matrix product", "copy"


@dataclass(frozen=True)
class Row:
    """The result of one variant."""

    variant: Variant
    problem: str | None
    """Why there are no times, or None."""
    error: float | None
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """The range of the samples relative to their median."""
        return (max(self.seconds) - min(self.seconds)) / self.median


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    # PyTorch needs memory on the same GPU, and JAX would otherwise take most of it at the start.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    options = parse(arguments)
    deadline = started + options.time_limit
    workloads = chosen_workloads(options)
    on_gpu = jax.default_backend() == "gpu"
    finished: list[dict[str, Any]] = []
    skipped: list[str] = []
    path = None
    name = f"attention_on_{_slug(jax.devices()[0].device_kind)}"
    cost = _Cost()
    for workload in workloads:
        if time.monotonic() + cost.expected(workload) > deadline:
            skipped.append(workload.name)
            continue
        before = time.monotonic()
        for_predictions = seconds_for_predictions(workload, options) if on_gpu else 0.0
        finished.append(run_workload(workload, options, deadline - (for_predictions or 0.0)))
        cost.note(workload, time.monotonic() - before)
        print(f"\n{render(finished[-1])}", flush=True)
        left = [other.name for other in workloads[len(finished) + len(skipped) :]]
        result = {
            # Neither the output folder nor an infinite time limit is worth recording.
            "options": {
                name: value
                for name, value in vars(options).items()
                if name != "output" and value != math.inf
            },
            "workloads": finished,
            "not_run": skipped + left,
        }
        path = write_result(name, result, options.output)
        if on_gpu:
            print_predictions(finished[-1], path, later=for_predictions is None)
    if on_gpu and path is not None:
        print_falsifiers()
    print(f"\n{time.monotonic() - started:.0f} s in total.")
    for workload_name in skipped:
        print(f"Not run, out of time: {workload_name}.")
    if path is None:
        print("Nothing was run: the time limit is too short.", file=sys.stderr)
        return 1
    print(f"written to {path}")
    if options.plot:
        from benchmarks.attention_plot import plot

        print(f"written to {plot(finished, path.with_suffix('.png'))}")
    return 1 if any(ours_is_broken(row) for result in finished for row in result["rows"]) else 0


def ours_is_broken(row: dict[str, Any]) -> bool:
    """Whether a row of bsjax failed or was wrong; failures of other libraries do not count."""
    return row["variant"].startswith(BSJAX) and (row["problem"] or "").startswith(
        ("wrong", "failed")
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--tokens", type=_tokens, nargs="+", help="prompt lengths; 36K is 36 x 1024 tokens"
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="models whose heads to use")
    parser.add_argument("--images", type=int, nargs="+", help="tokens per image")
    parser.add_argument(
        "--categories",
        nargs="+",
        choices=MASK_NAMES,
        help="masks: one category for all heads, or a mix",
    )
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=GPU_KERNELS,
        help="bsjax's kernels (the one that backend='auto' takes; xla without a GPU)",
    )
    parser.add_argument("--rounds", type=int, help="samples of each variant (7; 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="one workload, few masks")
    parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="limit for the whole run",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument(
        "--plot", action="store_true", help="also draw the results (needs matplotlib)"
    )
    options = parser.parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    options.tokens = options.tokens or (GPU_TOKENS if on_gpu else CPU_TOKENS)
    options.shapes = options.shapes or (GPU_SHAPES if on_gpu else CPU_SHAPES)
    options.categories = options.categories or (QUICK_MASKS if options.quick else MASK_NAMES)
    options.kernel = options.kernel or [resolve_backend("auto")]
    options.rounds = options.rounds or (3 if options.quick else 7)
    if options.quick:
        options.tokens, options.shapes = options.tokens[:1], options.shapes[:1]
    return options


def _tokens(text: str) -> int:
    match = re.fullmatch(r"(\d+)(K?)", text, re.IGNORECASE)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tokens such as 36K or 4096")
    return int(match[1]) * (1024 if match[2] else 1)


def chosen_workloads(options: argparse.Namespace) -> list[Workload]:
    """The workloads in the order in which they run, shortest prompts first."""
    workloads = [
        Workload(SHAPES[name], tokens, image_tokens)
        for name in options.shapes
        for tokens in options.tokens
        for image_tokens in options.images or SHAPES[name].image_tokens
    ]
    if options.quick and not options.images:
        workloads = workloads[:1]
    return sorted(workloads, key=lambda workload: workload.tokens)


class _Cost:
    """Estimates how long a workload will take from the previous one.

    The estimate scales all of the time, even compilation, which does not grow but takes most of the
    time of a small workload. So it is too high rather than too low.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._flops = 1

    def expected(self, workload: Workload) -> float:
        return self._seconds * max(1.0, workload.dense_flops / self._flops) ** 0.75

    def note(self, workload: Workload, seconds: float) -> None:
        self._seconds, self._flops = seconds, workload.dense_flops


def run_workload(
    workload: Workload, options: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """Checks and times all variants of a workload; returns what goes into the JSON file."""
    masks = workload.masks(options.categories)
    arrays = random_arrays(workload)
    positions = sampled_positions(workload.template, ROWS_CHECKED)
    rows: list[Row] = []
    samplers = {}
    chosen = variants(workload, masks, backends=options.kernel, torch=not options.no_torch)
    for index, variant in enumerate(chosen):
        row, sampler = _prepare(workload, variant, arrays, positions, deadline)
        if sampler is not None:
            samplers[index] = sampler
        rows.append(row)

    on_gpu = jax.default_backend() == "gpu"
    product, product_repeats, product_flops = matrix_rate_call(8192 if on_gpu else 512)
    copy, copy_repeats, copied_bytes = copy_call(2048 if on_gpu else 64)
    samplers |= {
        _MATRIX: jax_sampler(product, product_repeats),
        _COPY: jax_sampler(copy, copy_repeats),
    }
    samples = interleaved_samples(samplers, options.rounds, deadline)
    for index, row in enumerate(rows):
        row.seconds.extend(samples.get(index, []))
    by_name = {(row.variant.name, row.variant.mask.is_dense): row for row in rows}
    baseline = by_name.get((CUDNN if on_gpu else JAX_XLA, True))
    return {
        "shape": _shape_record(workload.shape),
        "tokens": workload.tokens,
        "image_tokens": workload.image_tokens,
        "images": workload.template.num_images,
        "text_tokens": int((workload.template.image < 0).sum()),
        "masks": {mask.name: _mask_record(workload, mask) for mask in masks},
        "baseline": CUDNN if on_gpu else JAX_XLA,
        "rows_checked": int(positions.size),
        "tolerance": tolerance(workload.shape.dtype),
        "matrix_rate": {
            "flops_per_second": product_flops / statistics.median(samples[_MATRIX]),
            "seconds": samples[_MATRIX],
        },
        "copy_bandwidth": {
            "bytes_per_second": copied_bytes / statistics.median(samples[_COPY]),
            "seconds": samples[_COPY],
        },
        "rows": [
            _row_record(
                workload,
                row,
                baseline,
                by_name.get((_dense_of(row.variant.name), True)),
            )
            for row in rows
        ],
    }


def _dense_of(name: str) -> str | None:
    """The variant whose dense run a variant's sparse runs are compared with, or None."""
    if name in (FLEX, FLEX_PACKED):
        return FLEX
    return name if name.startswith(BSJAX) else None


def _prepare(
    workload: Workload, variant: Variant, arrays: Arrays, positions: np.ndarray, deadline: float
) -> tuple[Row, Any]:
    """Compiles and checks a variant; returns its sampler if it is right."""
    if time.monotonic() > deadline:
        return Row(variant, "not run, out of time", None), None
    try:
        prepared = variant.prepare(arrays)
        row_of_position = np.argsort(variant.order)
        rows = row_of_position[positions]
        wanted = wanted_rows(
            workload,
            variant.mask,
            arrays,
            variant.order,
            rows,
            visibility=variant.visibility,
        )
        error = greatest_error(prepared.rows(rows), wanted)
        limit = tolerance(workload.shape.dtype)
        if not error <= limit:
            return Row(variant, f"wrong: error {error:.1e}, {limit:.1e} allowed", error), None
        return Row(variant, None, error), prepared.sampler()
    except NotAvailable as reason:
        return Row(variant, f"not run: {reason}", None), None
    except Exception as failure:  # An exception of another library is that variant's result.
        first_line = (str(failure).strip() or "no message").splitlines()[0]
        return Row(variant, f"failed: {type(failure).__name__}: {first_line[:200]}", None), None


def _shape_record(shape: AttentionShape) -> dict[str, Any]:
    fields = {name: value for name, value in vars(shape).items() if name != "visibility"}
    return fields | vars(shape.visibility)


def _mask_record(workload: Workload, mask: HeadMask) -> dict[str, Any]:
    pairs = workload.visible_pairs(mask)
    return {
        "heads": mask.description,
        "categories": [category.name for category in mask.categories],
        "visible_pairs": pairs,
        "flops": workload.flops(pairs),
        "ideal_speedup": workload.dense_flops / workload.flops(pairs),
    }


def _row_record(
    workload: Workload, row: Row, baseline: Row | None, own_dense: Row | None
) -> dict[str, Any]:
    flops = workload.flops(workload.visible_pairs(row.variant.mask))
    ideal = workload.dense_flops / flops
    record: dict[str, Any] = {
        "variant": row.variant.name,
        "mask": row.variant.mask.name,
        "note": row.variant.note,
        "problem": row.problem,
        "error": row.error,
        "ideal_speedup": ideal,
        "seconds": row.seconds,
    }
    if not row.seconds:
        return record

    def speedup_over(other: Row | None) -> float | None:
        # Within a round, both ran while the machine was in the same state.
        if other is None or not other.seconds:
            return None
        pairs = zip(other.seconds, row.seconds, strict=True)
        return statistics.median(theirs / ours for theirs, ours in pairs)

    over_baseline, over_own = speedup_over(baseline), speedup_over(own_dense)
    return record | {
        "median_seconds": row.median,
        "spread": row.spread,
        "visible_flops_per_second": flops / row.median,
        "speedup_over_baseline": over_baseline,
        "baseline_speedup_over_ideal": over_baseline and over_baseline / ideal,
        "own_dense_speedup_over_ideal": over_own and over_own / ideal,
    }


def render(result: dict[str, Any]) -> str:
    """A workload's result as Markdown."""
    shape, baseline = result["shape"], result["baseline"]
    visibility = "bidirectional images" if shape["bidirectional_images"] else "causal"
    if shape["window"] is not None:
        visibility += f", window {shape['window']}"
    lines = [
        f"### {shape['name']}: {result['tokens']} tokens, {result['images']} images of "
        f"{result['image_tokens']}",
        "",
        f"{shape['q_heads']} query and {shape['kv_heads']} key heads of {shape['head_dim']}, "
        f"{shape['dtype']}, {visibility}. Matrix products run at "
        f"{result['matrix_rate']['flops_per_second'] / 1e12:.3g} TFLOP/s (bfloat16), copies at "
        f"{result['copy_bandwidth']['bytes_per_second'] / 1e9:.4g} GB/s. Every variant was checked "
        f"on {result['rows_checked']} rows of all heads, to {result['tolerance']:.1e}.",
        "",
        *(f"- {name}: {mask['heads']}" for name, mask in result["masks"].items()),
        "",
    ]
    header = (
        "variant",
        "mask",
        "ms",
        "spread",
        "TFLOP/s visible",
        f"{baseline} / this",
        "ideal",
        f"{baseline}: achieved/ideal",
        "own dense: achieved/ideal",
    )

    def figure(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows, remarks = [], []
    for row in result["rows"]:
        name = row["variant"]
        ideal = figure(row["ideal_speedup"], ".2f")
        if row["problem"] or row["note"]:
            where = f"{name}, {row['mask']}"
            remarks.append(f"- {where}: {row['problem'] or row['note']}")
            name += " (*)"
        if "median_seconds" not in row:
            rows.append((name, row["mask"], "-", "", "", "", ideal, "", ""))
            continue
        rows.append(
            (
                name,
                row["mask"],
                f"{1e3 * row['median_seconds']:.3f}",
                f"{100 * row['spread']:.0f} %",
                f"{row['visible_flops_per_second'] / 1e12:.4g}",
                figure(row["speedup_over_baseline"], ".2f"),
                ideal,
                figure(row["baseline_speedup_over_ideal"], ".2f"),
                figure(row["own_dense_speedup_over_ideal"], ".2f"),
            )
        )
    lines.append(markdown_table(header, rows))
    if remarks:
        lines += ["", "(*)", *remarks]
    return "\n".join(lines)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


if __name__ == "__main__":
    sys.exit(main())
