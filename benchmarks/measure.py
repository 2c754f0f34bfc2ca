"""Side-by-side timing, and what a result must say about the machine it comes from."""

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "numpy", "torch")
RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, every round: each once per round, after one unmeasured round.

    Interleaving makes whatever else the machine does fall on all of them alike.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            samples[name].append(time.perf_counter() - start)
    return samples


def median_ratio(samples: Mapping[str, list[float]], name: str, base: str) -> float:
    """The median over rounds of one call's time over another's in the same round."""
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
    return {
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def write_result(name: str, result: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Writes a result with its environment as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
