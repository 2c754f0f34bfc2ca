"""Prints what the model of speed says of what the attention benchmark has timed."""

import argparse
import math
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload
from tools.speed import comparison

# For 1,024 tokens, one mask and one kernel, on one CPU core: measured, roughly.
_SECONDS_PER_PREDICTION = 0.03
# With a time limit, predictions that take longer are left to machines without a GPU.
_MOST_SECONDS_OF_PREDICTIONS = 20.0


def seconds_for_predictions(workload: Workload, options: argparse.Namespace) -> float | None:
    """About how long predictions take; None if that is too long while a GPU waits.

    The model builds all schedules again.
    """
    masks = len({"DENSE", *options.categories}) * len(options.kernel)
    seconds = _SECONDS_PER_PREDICTION * workload.tokens / 1024 * masks
    is_short = seconds <= _MOST_SECONDS_OF_PREDICTIONS or options.time_limit == math.inf
    return seconds if is_short else None


def print_predictions(result: dict[str, Any], path: Path, *, later: bool) -> None:
    """Prints what the model of speed says of the masks that were timed, or how to get it later."""
    gpu = comparison.gpu_in_use()
    if gpu is None or not later:
        print(f"\n{comparison.beside(result, gpu)}", flush=True)
    else:
        print(f"\nMODEL, on any machine: python -m tools.speed_model --beside {path}", flush=True)


def print_falsifiers() -> None:
    """Prints what would show that the model is wrong, if it knows this machine's GPU."""
    if comparison.gpu_in_use() is not None:
        print(f"\nThe model is wrong if\n{comparison.falsifiers()}")
