"""Reads and writes the table of kernel configurations."""

import json
from pathlib import Path
from typing import Any

import bsjax
from bsjax.gpu.configurations import TARGETS


def table_of(package: str) -> Path:
    """The table of `pallas` or `triton`."""
    return Path(bsjax.__file__).with_name(package) / "configurations.json"


TABLE = table_of("pallas")


def write_table(entries: list[dict[str, Any]], path: Path = TABLE) -> None:
    """Replaces entries of the table, but no measured entry with an unmeasured one."""

    def key(entry: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(entry[field] for field in ("target", "width", "bytes", "heads"))

    table = {key(entry): entry for entry in read_table(path)}
    for entry in entries:
        if entry["basis"] == "measured" or table.get(key(entry), {}).get("basis") != "measured":
            table[key(entry)] = entry
    order = sorted(table.values(), key=lambda entry: (TARGETS.index(entry["target"]), key(entry)))
    lines = ",\n".join("  " + json.dumps(entry) for entry in order)
    path.write_text(f'{{"format_version": 1, "entries": [\n{lines}\n]}}\n')


def read_table(path: Path = TABLE) -> list[dict[str, Any]]:
    """All entries of the table."""
    return json.loads(path.read_text())["entries"]
