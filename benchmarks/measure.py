"""Interleaved timing, and result files that describe the machine that they come from."""

import datetime
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "numpy", "torch", "triton", "tokamax", "transformers")
RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, after one round that is not measured.

    Interleaving makes other load on the machine affect all calls equally.
    """

    def timed(call: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            start = time.perf_counter()
            jax.block_until_ready(call())
            return time.perf_counter() - start

        return sample

    for call in calls.values():
        jax.block_until_ready(call())
    return interleaved_samples({name: timed(call) for name, call in calls.items()}, rounds)


def interleaved_samples(
    samplers: Mapping[str, Callable[[], float]], rounds: int, deadline: float = math.inf
) -> dict[str, list[float]]:
    """One sample of every sampler per round; samplers must be warmed up.

    After `deadline`, on the clock of `time.monotonic()`, no further round starts.
    """
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for index in range(rounds):
        if index and time.monotonic() > deadline:
            break
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples


def median_ratio(samples: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of the ratio of two calls' times in the same round."""
    return statistics.median(
        time / base_time for time, base_time in zip(samples[name], samples[base], strict=True)
    )


def environment() -> dict[str, Any]:
    """Device, versions and date of a run."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "multiprocessors": getattr(device, "core_count", None),
        "driver": _driver() if device.platform == "gpu" else None,
        "platform_version": device.client.platform_version,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a result with its environment as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    # Completely or not at all: a run may be killed while it writes.
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    os.replace(temporary, path)
    return path


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, also readable as text; all columns but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        padded = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def _driver() -> str | None:
    """The version of NVIDIA's driver, if nvidia-smi is installed."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    process = subprocess.run(query, capture_output=True, text=True)
    return process.stdout.strip().split("\n")[0] or None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()


def first_calls(module: str, arguments: Sequence[Any]) -> list[dict[str, Any]]:
    """The first call of two processes: with an empty cache of compiled programs, then with it.

    Args:
      module: a benchmark that with `--first-call` makes one call and prints JSON as its last line.
      arguments: its other arguments.
    """
    calls = []
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": folder}
        for cache in ("empty", "left by the first process"):
            command = [sys.executable, "-m", module, "--first-call", *map(str, arguments)]
            output = subprocess.run(
                command, check=True, capture_output=True, text=True, env=environment
            ).stdout
            calls.append({"cache": cache, **json.loads(output.splitlines()[-1])})
    return calls
