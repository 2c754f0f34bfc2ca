"""Checks the GPU kernels on this machine's GPU, and times attention there.

    make gpu-check PYTHON=python3      # or: python3 -m tools.gpu_check

Compares every case of `tools.gpu_cases` with float32, then runs a short benchmark and prints what
the model of speed (docs/speed.md) had predicted, in under eight minutes. Needs only JAX for CUDA
and NumPy; bsjax need not be installed. If PyTorch is installed, the benchmark includes it. The exit
status is 0 only if every case passed. The JSON file has all measurements.

`--interpret` runs a few small cases in interpret mode on any machine. It tests this program, and
the parts of the kernels that do not depend on a GPU.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import attention
from benchmarks.measure import write_result
from bsjax.attention import resolve_backend
from tools.gpu_cases import Case, all_cases, small_cases
from tools.speed.comparison import beside, gpu_of

NAME = "gpu_check"
_SECONDS_OF_BENCHMARK = 150.0


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

    cases = [
        case for case in (all_cases() if on_gpu else small_cases()) if options.only in case.name
    ]
    deadline = started + options.time_limit
    records = [check(case, deadline, index, len(cases)) for index, case in enumerate(cases, 1)]
    failed = [record for record in records if not record["passed"]]
    seconds = time.monotonic() - started
    summary = {"cases": len(records), "failed": len(failed), "seconds": seconds}
    path = write_result(NAME, summary | {"records": records}, options.output)
    print(f"\n{len(records) - len(failed)} of {len(records)} cases passed in {seconds:.0f} s.")
    for record in failed:
        print(f"FAILED {record['name']}: {describe(record)}")
    print(f"written to {path}", flush=True)

    benchmarked = True
    if not options.no_benchmark:
        benchmarked = not run_benchmark(options.output, deadline)
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
        if not each["passed"] or (record["passed"] and each["name"] == "output")
    ]
    return ", ".join(f"{each['name']} {each['error']:.1e} of {each['limit']:.1e}" for each in shown)


def run_benchmark(output: Path, deadline: float) -> int:
    """Runs one quick workload, in the time left or the time that it should need if that is less."""
    seconds = min(_SECONDS_OF_BENCHMARK, deadline - time.monotonic())
    options = ["--quick", "--time-limit", f"{seconds:.0f}", "--output", str(output)]
    if jax.default_backend() != "gpu":
        options += ["--tokens", "256", "--images", "60", "--categories", "INTRA_IMAGE_SINK"]
        options += ["--no-torch"]
    status = attention.main(options)
    results = sorted(output.glob("attention_on_*.json"), key=lambda path: path.stat().st_mtime)
    if results:
        print(f"\n{predicted(results[-1])}", flush=True)
    return status


def predicted(benchmark: Path) -> str:
    """The predictions of `tools.speed_model` beside the results of a benchmark."""
    device = jax.devices()[0].device_kind
    gpu = gpu_of(device)
    if gpu is None:
        return f"MODEL: no predictions for {device}."
    workloads = json.loads(benchmark.read_text(encoding="utf-8"))["workloads"]
    backend = resolve_backend("auto")
    return "\n\n".join(beside(each, gpu, backend) for each in workloads)


if __name__ == "__main__":
    sys.exit(main())
