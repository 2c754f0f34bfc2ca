"""Finds out how much memory of each GPU models take that are divided among several, without a GPU.

    python -m tools.device_memory

Compiles every program of a generation ahead of time, as `tools.memory_table` does for one GPU, and
writes the table of docs/devices.md.
"""

import sys
from pathlib import Path

from tools.gpu_targets import TARGETS
from tools.memory_table import STAGES, measure

CASES = (
    ("Qwen2.5-VL-72B", 36_000, "h200", 4),
    ("Qwen2.5-VL-72B", 36_000, "h100", 8),
    ("Qwen2.5-VL-72B", 150_000, "h100", 8),
    ("Qwen2.5-VL-72B", 300_000, "h100", 8),
    ("Qwen2.5-VL-72B", 300_000, "h200", 8),
    ("Qwen2.5-VL-7B", 300_000, "a100", 4),
    ("Gemma-3-27B", 65_536, "a100", 2),
    ("Gemma-3-27B", 131_000, "h100", 8),
)
"""Model, tokens, GPU and number of GPUs."""

_HEADER = "| model | tokens | GPUs | weights | cache | vision | prefill | decode | peak | of |"
_PAGE = Path(__file__).parents[1] / "docs" / "devices.md"


def row(model: str, tokens: int, target: str, devices: int) -> str:
    """A line of the table."""
    found = measure(model, tokens, target, devices=devices)
    sizes = (found.weights, found.cache, *map(found.temporaries, STAGES), found.peak)
    cells = [
        model,
        f"{tokens:,}",
        f"{devices} x {TARGETS[target].device_kind}",
        *(f"{size / 2**30:.2f}" for size in sizes),
        f"{TARGETS[target].device_memory / 2**30:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Writes the table; returns the exit status."""
    lines = [_HEADER, "|---|---:|---" + "|---:" * (_HEADER.count("|") - 4) + "|"]
    for case in CASES:
        lines.append(row(*case))
        print(lines[-1], flush=True)
    page = _PAGE.read_text(encoding="utf-8").splitlines()
    first = page.index(_HEADER)
    end = next(index for index in range(first, len(page)) if not page[index].startswith("|"))
    page[first:end] = lines
    _PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
