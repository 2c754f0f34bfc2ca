"""The manifest of a converted checkpoint: size and SHA-256 of every file in its folder.

Comparing the files with it reveals any that are missing, added or changed. This alone is no
protection against someone who can write to the folder, because they can write a new manifest too.
Keep the manifest's fingerprint somewhere else, and compare that as well.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.errors import CheckpointError
from bsjax.files import check_file, read_json_object

MANIFEST = "manifest.json"
"""The manifest's name in the folder."""

_FORMAT = "bsjax manifest"
_FORMAT_VERSION = 1

_SHOWN = 5
_THREADS = 4

Entries = dict[str, dict[str, Any]]
"""`bytes` and `sha256` of every file, by its path in the folder."""


class Verified(NamedTuple):
    """A checkpoint whose files match its manifest."""

    files: int
    nbytes: int
    fingerprint: str
    """SHA-256 of the manifest's entries: 64 hexadecimal digits."""


def write_manifest(folder: Path) -> str:
    """Writes the manifest of all files in a folder; returns its fingerprint.

    Raises:
      CheckpointError: a file cannot be read, or is not an ordinary file.
    """
    entries = _entries(folder, _names(folder))
    manifest = {
        "format": _FORMAT,
        "format_version": _FORMAT_VERSION,
        "fingerprint": _fingerprint(entries),
        "files": entries,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest["fingerprint"]


def verify_manifest(folder: Path) -> Verified:
    """Compares every file of a folder with the manifest.

    Raises:
      CheckpointError: there is no manifest, it is damaged, or files are missing, were added or were
        changed; the message names them.
    """
    if not (folder / MANIFEST).exists():
        raise CheckpointError(
            f"{folder} holds no {MANIFEST}: it is not a converted checkpoint, or was converted "
            "by an older bsjax. Convert it again."
        )
    stated = _read(folder / MANIFEST)
    names = _names(folder)
    missing, extra = sorted(stated.keys() - names), sorted(names - stated.keys())
    actual = _entries(folder, stated.keys() & names)
    changed = sorted(name for name, entry in actual.items() if entry != stated[name])
    problems = [
        f"{what} {len(found)}: {', '.join(found[:_SHOWN])}{', ...' if len(found) > _SHOWN else ''}"
        for what, found in (("missing", missing), ("changed", changed), ("added", extra))
        if found
    ]
    if problems:
        raise CheckpointError(
            f"the files in {folder} are not those that were converted ({'; '.join(problems)}). "
            "Convert the checkpoint again."
        )
    return Verified(
        len(stated), sum(entry["bytes"] for entry in stated.values()), _fingerprint(stated)
    )


def _read(file: Path) -> Entries:
    manifest = read_json_object(file, error=CheckpointError)
    if (manifest.get("format"), manifest.get("format_version")) != (_FORMAT, _FORMAT_VERSION):
        raise CheckpointError(
            f"{file} is not a manifest of format version {_FORMAT_VERSION}. Convert the checkpoint "
            "again, or use the bsjax that wrote it."
        )
    entries: Any = manifest.get("files")
    is_valid = isinstance(entries, dict) and all(
        isinstance(entry, dict)
        and entry.keys() == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and isinstance(entry["sha256"], str)
        for entry in entries.values()
    )
    if not is_valid or _fingerprint(entries) != manifest.get("fingerprint"):
        raise CheckpointError(
            f"{file} was changed: its fingerprint is not that of its entries. Convert the "
            "checkpoint again."
        )
    return entries


def _names(folder: Path) -> set[str]:
    """The paths of all files in a folder except the manifest, relative to the folder.

    A link to a folder counts as a file: nothing behind it was converted.
    """

    def fail(error: OSError) -> None:
        raise CheckpointError(f"{error.filename} cannot be read: {error.strerror}.") from error

    names = set()
    for parent, folders, files in os.walk(folder, onerror=fail):
        files += [name for name in folders if os.path.islink(Path(parent, name))]
        names |= {Path(parent, name).relative_to(folder).as_posix() for name in files}
    return names - {MANIFEST}


def _entries(folder: Path, names: set[str]) -> Entries:
    # Hashing releases Python's lock.
    with ThreadPoolExecutor(_THREADS) as threads:
        ordered = sorted(names)
        return dict(
            zip(ordered, threads.map(lambda name: _entry(folder / name), ordered), strict=True)
        )


def _entry(file: Path) -> dict[str, Any]:
    check_file(file, error=CheckpointError)
    try:
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return {"bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


def _fingerprint(entries: Entries) -> str:
    canonical = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
