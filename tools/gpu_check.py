"""Checks the GPU kernels on this machine's GPU, and times attention there.

    make gpu-check PYTHON=python3      # or: python3 -m tools.gpu_check

Compares every case of `tools.gpu_cases` with float32, for Pallas' kernels and for Triton's, then
runs a short benchmark of both and prints what the model of speed (docs/speed.md) had predicted. A
longer prompt is timed, too, if there is time. Needs only JAX for CUDA and NumPy; bsjax need not be
installed. Kernels of which something is missing are left out: without jax-triton, those of Triton
and all gradients. If PyTorch is installed, the benchmark includes it. The exit status is 0 only if
every case passed. The JSON file has all measurements.

The limit of eight minutes is a limit, not a measurement: no GPU has run this program yet. Cases
that are not reached count as failed.

`--interpret` runs a few small cases in interpret mode on any machine; with TRITON_INTERPRET=1 in
the environment, those of Triton, too. It tests this program, and the parts of the kernels that do
not depend on a GPU.
"""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import attention
from benchmarks.kernels import problem_of
from benchmarks.measure import write_result
from bsjax.attention import GPU_KERNELS
from tools.gpu_cases import Case, all_cases, small_cases

NAME = "gpu_check"
# The errors that are printed of a case that passed.
_SHOWN = ("output", "gradient")
# What the benchmarks should need at most: one of all implementations, and one of a longer prompt.
_SECONDS_OF_BENCHMARK, _SECONDS_OF_LONG_PROMPT = 150.0, 90.0
# With less time than this left, the longer prompt would only be compiled.
_LEAST_SECONDS = 30.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status: 0, 1 for a failure, 2 for no GPU."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--interpret", action="store_true", help="run a few cases in interpret mode, on any machine"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="run only cases with TEXT in their name"
    )
    parser.add_argument(
        "--kernel", nargs="+", choices=GPU_KERNELS, help="the kernels to check (both)"
    )
    parser.add_argument("--no-benchmark", action="store_true", help="correctness only")
    parser.add_argument(
        "--time-limit",
        type=float,
        default=450.0,
        metavar="SECONDS",
        help="limit for the whole run; cases that are not reached count as failed",
    )
    parser.add_argument(
        "--output", type=Path, default=Path("build/gpu-check"), help="folder for the JSON files"
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    problem = no_gpu()
    if problem is not None and not options.interpret:
        print(
            f"error: {problem} Nothing was checked. On any machine, a few small cases run in "
            "interpret mode: python3 -m tools.gpu_check --interpret",
            file=sys.stderr,
        )
        return 2
    on_gpu = problem is None
    device = jax.devices()[0].device_kind
    print(f"{device}, JAX {jax.__version__}" + ("" if on_gpu else ", interpret mode"), flush=True)
    kernels, gradients_of = usable(options.kernel or GPU_KERNELS, on_gpu)
    if not kernels:
        print("error: No kernel can run here. Nothing was checked.", file=sys.stderr)
        return 2

    chosen = (all_cases if on_gpu else small_cases)(kernels, gradients_of)
    cases = [case for case in chosen if options.only in case.name]
    deadline = started + options.time_limit
    records = [check(case, deadline, index, len(cases)) for index, case in enumerate(cases, 1)]
    failed = [record for record in records if not record["passed"]]
    seconds = time.monotonic() - started
    summary: dict[str, Any] = {"cases": len(records), "failed": len(failed), "seconds": seconds}
    summary |= {"kernels": kernels, "gradients_of": gradients_of}
    path = write_result(NAME, summary | {"records": records}, options.output)
    print(f"\n{len(records) - len(failed)} of {len(records)} cases passed in {seconds:.0f} s.")
    for record in failed:
        print(f"FAILED {record['name']}: {describe(record)}")
    print(f"written to {path}", flush=True)

    benchmarked = True
    if not options.no_benchmark:
        benchmarked = run_benchmarks(kernels, options.output, deadline)
    return 0 if benchmarked and records and not failed else 1


def no_gpu() -> str | None:
    """Why the kernels cannot run here; None if they can."""
    try:
        backend = jax.default_backend()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that this machine lacks.
        return f"JAX finds no GPU ({str(error).splitlines()[0]})."
    if backend != "gpu":
        return f"JAX finds no GPU here: it runs on {backend}."
    capability = getattr(jax.devices()[0], "compute_capability", "")
    if not capability[:1].isdigit() or float(capability) < 8.0:
        return (
            f"{jax.devices()[0].device_kind} ({capability or 'unknown'}) is not an NVIDIA GPU "
            "of the Ampere generation or later."
        )
    return None


def usable(kernels: Sequence[str], on_gpu: bool) -> tuple[list[str], list[str]]:
    """The kernels that can run here, and those of them that can be differentiated by kernels.

    Prints what is left out, and why.
    """
    problems = {kernel: problem_of(kernel) for kernel in GPU_KERNELS}
    found = [kernel for kernel in kernels if problems[kernel] is None]
    for kernel in kernels:
        if problems[kernel] is not None:
            print(f"Left out: the kernels of {kernel}. {problems[kernel]}")
    if problems["triton"] is not None:
        print("Left out: gradients, whose kernels are those of triton.")
        return found, []
    # Without a GPU, the xla backend's code computes the gradients of Pallas' outputs.
    return found, found if on_gpu else [kernel for kernel in found if kernel == "triton"]


def check(case: Case, deadline: float, index: int, count: int) -> dict[str, Any]:
    """Runs one case and prints its result."""
    start = time.monotonic()
    record: dict[str, Any] = {"name": case.name, "passed": False, "comparisons": []}
    if start > deadline:
        record["problem"] = "not reached within the time limit"
    else:
        try:
            comparisons = case.run()
            record["comparisons"] = [vars(each) | {"passed": each.passed} for each in comparisons]
            record["passed"] = bool(comparisons) and all(each.passed for each in comparisons)
        except Exception as error:  # The other cases are still informative.
            record["problem"] = f"{type(error).__name__}: {error}"
            record["traceback"] = traceback.format_exc()
    record["seconds"] = time.monotonic() - start
    verdict = "ok  " if record["passed"] else "FAIL"
    print(f"{index:3}/{count} {verdict} {case.name}: {describe(record)}", flush=True)
    return record


def describe(record: dict[str, Any]) -> str:
    """The error of a case that passed, or everything that is wrong with one that failed."""
    if "problem" in record:
        return record["problem"].splitlines()[0][:300]
    shown = [
        each
        for each in record["comparisons"]
        if not each["passed"] or (record["passed"] and each["name"].startswith(_SHOWN))
    ]
    return ", ".join(f"{each['name']} {each['error']:.1e} of {each['limit']:.1e}" for each in shown)


def run_benchmarks(kernels: Sequence[str], output: Path, deadline: float) -> bool:
    """One quick workload and a longer prompt, in the time left; returns whether all is right."""
    left = deadline - time.monotonic()
    quick = ["--quick", "--output", str(output)]
    if jax.default_backend() != "gpu":
        quick += ["--tokens", "256", "--images", "60", "--categories", "INTRA_IMAGE_SINK"]
        quick += ["--no-torch"]
        return attention.main([*quick, "--time-limit", f"{left:.0f}"]) == 0
    quick += ["--kernel", *kernels]
    right = attention.main([*quick, "--time-limit", f"{min(_SECONDS_OF_BENCHMARK, left):.0f}"]) == 0
    left = min(_SECONDS_OF_LONG_PROMPT, deadline - time.monotonic())
    again = long_prompt(kernels, output)
    if left < _LEAST_SECONDS:
        print(f"\nLeft out, no time: python3 -m benchmarks.attention {' '.join(again)}")
        return right
    return attention.main([*again, "--time-limit", f"{left:.0f}"]) == 0 and right


def long_prompt(kernels: Sequence[str], output: Path) -> list[str]:
    """The options of `benchmarks.attention` for 75K tokens, dense and sparse."""
    return [
        *("--shapes", "qwen2.5-vl-7b", "--tokens", "75K", "--images", "400", "--no-torch"),
        *("--categories", "DENSE", "INTRA_IMAGE_SINK", "--rounds", "3"),
        *("--kernel", *kernels, "--output", str(output / "75k")),
    ]


if __name__ == "__main__":
    sys.exit(main())
