"""Finds out what models on several GPUs take, without a GPU: memory, and what travels.

    python -m tools.device_memory                        # the tables of docs/devices.md
    python -m tools.device_memory --largest Qwen2.5-VL-72B h100 1x8

Compiles every program of a generation ahead of time, as `tools.memory_table` does for one GPU.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tools.gpu_targets import TARGETS
from tools.memory_table import STAGES, Measurement, measure


class Case(NamedTuple):
    """A model on a mesh of GPUs of `gpu_targets.TARGETS`."""

    model: str
    tokens: int
    target: str
    context: int
    tensor: int
    hosts: int = 1

    def measure(self) -> Measurement:
        """Compiles its programs."""
        return measure(**self._asdict())


CASES = (
    Case("Qwen2.5-VL-72B", 36_000, "h200", 1, 4),
    Case("Qwen2.5-VL-72B", 36_000, "h100", 1, 8),
    Case("Qwen2.5-VL-72B", 150_000, "h100", 1, 8),
    Case("Qwen2.5-VL-72B", 300_000, "h100", 1, 8),
    Case("Qwen2.5-VL-72B", 300_000, "h200", 1, 8),
    Case("Qwen2.5-VL-72B", 300_000, "h100", 2, 4),
    Case("Qwen2.5-VL-72B", 300_000, "h100", 2, 8, hosts=2),
    Case("Qwen2-VL-72B", 36_000, "h100", 1, 8),
    Case("Qwen2-VL-72B", 150_000, "h100", 1, 8),
    Case("Qwen2-VL-72B", 300_000, "h100", 1, 8),
    Case("Qwen2.5-VL-7B", 300_000, "a100", 1, 4),
    Case("Qwen2.5-VL-7B", 300_000, "h100", 4, 1),
    Case("Qwen2.5-VL-7B", 300_000, "h100", 8, 1),
    Case("Gemma-3-27B", 65_536, "a100", 1, 2),
    Case("Gemma-3-27B", 131_000, "h100", 1, 8),
    Case("Gemma-3-27B", 131_000, "h100", 4, 2),
)

MEMORY_FRACTION = 0.75
"""The share of a GPU's memory that JAX takes by default."""

_SIZES = {"bf16": 2, "f32": 4, "s32": 4}
_STARTS = re.compile(
    r"= (?P<results>\(*\w+\[.*?) (?P<kind>all-reduce|all-gather|reduce-scatter)(?:-start)?\("
)
_LOOP = re.compile(
    r"while\(.*body=(?P<body>%[^,\s]+).*known_trip_count\":{\"n\":\"(?P<count>\d+)\""
)

_MEMORY = (
    "| model | tokens | GPUs | context x tensor | weights | cache | vision | prefill | decode "
    "| peak | of |"
)
_TRAVELS = "| model | tokens | GPUs | context x tensor | chunk | all-reduces | all-gathers | MiB |"
_PAGE = Path(__file__).parents[1] / "docs" / "devices.md"


class _Loop(NamedTuple):
    """A loop of a program: the computation that it is in, and how often it runs."""

    parent: str
    count: int


def travelling(hlo: str) -> list[tuple[str, int]]:
    """The collectives of a layer: the kind of each, and the bytes of its result on a device.

    Args:
      hlo: the compiled program of a chunk, whose layers are a loop.
    """
    lines, computation = [], ""
    outer: dict[str, _Loop] = {}  # By the name of its body.
    for line in hlo.splitlines():
        if line.endswith("{"):
            computation = line.split(" ", 1)[0]
        lines.append((computation, line))
        loop = _LOOP.search(line)
        if loop:
            outer[loop["body"]] = _Loop(computation, int(loop["count"]))
    found = []
    for computation, line in lines:
        match = _STARTS.search(line)
        if not match or computation not in outer:
            continue
        # Within the loop of the layers are those of local layers, and of the MLP of a large chunk.
        times, inner = 1, computation
        while outer[inner].parent in outer:
            times *= outer[inner].count
            inner = outer[inner].parent
        shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["results"])
        sizes = [
            _SIZES[dtype] * int(np.prod([int(size) for size in shape.split(",") if size]))
            for dtype, shape in shapes
        ]
        # An all-gather that has begun names its operands, too, before its results.
        if match["kind"] == "all-gather" and "all-gather-start" in line:
            sizes = sizes[len(sizes) // 2 :]
        found += [(match["kind"], size) for size in sizes] * times
    return found


def memory_row(case: Case, found: Measurement) -> str:
    """A line of the table of memory."""
    sizes = (found.weights, found.cache, *map(found.temporaries, STAGES), found.peak)
    return _line(
        case,
        *(f"{size / 2**30:.2f}" for size in sizes),
        f"{TARGETS[case.target].device_memory / 2**30:.0f}",
    )


def travel_row(case: Case, found: Measurement) -> str:
    """A line of the table of what travels in a layer of the largest chunk."""
    stage = next(stage for stage in found.stages if stage.name == "prefill")
    collectives = travelling(stage.program.compiled.as_text())

    def count(kind: str) -> str:
        sizes = [size for each, size in collectives if each == kind]
        counts = sorted(Counter(sizes).items(), reverse=True)
        return ", ".join(f"{many} of {size / 2**20:.1f}" for size, many in counts) or "none"

    total = sum(size for _, size in collectives)
    return _line(
        case,
        f"{found.chunk_rows:,}",
        count("all-reduce"),
        count("all-gather"),
        f"{total / 2**20:.0f}",
    )


def _line(case: Case, *cells: str) -> str:
    gpus = f"{case.context * case.tensor} x {TARGETS[case.target].device_kind}"
    if case.hosts > 1:
        gpus += f", {case.hosts} hosts"
    first = (case.model, f"{case.tokens:,}", gpus, f"{case.context} x {case.tensor}")
    return f"| {' | '.join((*first, *cells))} |"


def largest(case: Case) -> int:
    """The largest number of tokens, to 5 %, for which a case fits; found by bisection."""
    limit = MEMORY_FRACTION * TARGETS[case.target].device_memory

    def fits(tokens: int) -> bool:
        peak = case._replace(tokens=tokens).measure().peak
        print(f"{tokens:,} tokens: {peak / 2**30:.2f} GiB", flush=True)
        return peak <= limit

    fitting, failing = 36_000, 72_000
    while fits(failing):
        fitting, failing = failing, 2 * failing
    while failing - fitting > fitting // 20:
        middle = (fitting + failing) // 2
        if fits(middle):
            fitting = middle
        else:
            failing = middle
    return fitting


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--largest", nargs=3, metavar=("MODEL", "GPU", "CONTEXTxTENSOR"))
    options = parser.parse_args(arguments)
    if options.largest:
        model, target, mesh = options.largest
        context, tensor = map(int, mesh.split("x"))
        print(f"largest: {largest(Case(model, 0, target, context, tensor)):,} tokens")
        return 0
    rows: dict[str, list[str]] = {_MEMORY: [], _TRAVELS: []}
    for case in CASES:
        found = case.measure()
        rows[_MEMORY].append(memory_row(case, found))
        rows[_TRAVELS].append(travel_row(case, found))
        print(rows[_MEMORY][-1], rows[_TRAVELS][-1], sep="\n", flush=True)
    page = _PAGE.read_text(encoding="utf-8").splitlines()
    for header, lines in rows.items():
        first = page.index(header)
        end = next(index for index in range(first, len(page)) if not page[index].startswith("|"))
        rule = "|---|---:|---|---" + "|---:" * (header.count("|") - 5) + "|"
        page[first:end] = [header, rule, *lines]
    _PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
