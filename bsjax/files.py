"""Reads files that someone else may have written: ordinary files of a limited size, and JSON.

A path that a user gives, or that a checkpoint contains, may be a pipe that never ends, a device, or
a file that is too large to read. `check_file` finds this out before the file is opened.
"""

import json
import os
import stat
from os import PathLike
from pathlib import Path
from typing import Any

from bsjax.errors import BsjaxError

JSON_BYTES = 64 * 2**20
"""Largest JSON file to read. The largest one in published checkpoints, a tokenizer, has 33 MB."""

JSON_DEPTH = 100
"""Deepest nesting of lists and objects in JSON; some readers exhaust their stack beyond it."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(
    path: str | PathLike[str], *, error: type[BsjaxError], limit: int | None = None
) -> None:
    """Rejects what is not an ordinary file, without opening it.

    Args:
      path: the file; links are followed.
      error: raised, naming `path`, if there is no such file, if it is a pipe, device, socket or
        folder, or if it is larger than `limit`.
      limit: the largest size, in bytes; None for any.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as missing:
        if os.path.islink(path):
            raise error(
                f"{path} is a link to {os.readlink(path)}, which does not exist."
            ) from missing
        parent, name = os.path.split(os.fspath(path))
        raise error(f"{path} cannot be read: {parent or '.'} holds no {name}.") from missing
    except (OSError, TypeError, ValueError) as failure:  # ValueError: a null character in the path.
        reason = getattr(failure, "strerror", None) or failure
        raise error(f"{path!s} cannot be read: {reason}.") from failure
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a special file")
        raise error(f"{path} is {kind}, not an ordinary file. Give a file.")
    if limit is not None and found.st_size > limit:
        raise error(
            f"{path} has {found.st_size:,} bytes, more than the {limit:,} that a file of its kind "
            "may have: it is damaged or another file."
        )


def read_text(
    path: str | PathLike[str], *, error: type[BsjaxError], limit: int = JSON_BYTES
) -> str:
    """Reads an ordinary text file in UTF-8.

    Args:
      path: the file.
      error: raised if the file cannot be read; see `check_file`.
      limit: the largest size, in bytes.
    """
    check_file(path, error=error, limit=limit)
    try:
        with open(path, "rb") as stream:
            # The size is checked again: the kernel's files, as in /proc, claim to be empty.
            content = stream.read(limit + 1)
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror or failure}.") from failure
    if len(content) > limit:
        raise error(f"{path} has more than {limit:,} bytes: it grew, or is another file.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as failure:
        raise error(f"{path} cannot be read: it is not text in UTF-8 ({failure}).") from failure


def parse_json(
    text: str | bytes, where: str, *, error: type[BsjaxError], strict: bool = False
) -> Any:
    """Parses JSON text.

    Args:
      text: JSON, as a string or as bytes in UTF-8.
      where: where the text comes from, for error messages.
      error: raised if the text is not JSON or is nested deeper than `JSON_DEPTH`.
      strict: also reject names that appear twice in an object, NaN and Infinity, which JSON readers
        treat differently.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in result if names.count(name) > 1)
            raise error(f"`{twice}` appears twice in {where}.")
        return result

    def reject_constant(constant: str) -> None:
        raise error(f"{constant} in {where} is not a valid JSON number.")

    options: Any = {}
    if strict:
        options = {"object_pairs_hook": without_duplicates, "parse_constant": reject_constant}
    try:
        value = json.loads(text, **options)
    except RecursionError as failure:
        raise error(_too_deep(where)) from failure
    except ValueError as failure:  # Also for integers of thousands of digits.
        if isinstance(failure, BsjaxError):
            raise
        raise error(f"{where} is not JSON: {failure}.") from failure
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(JSON_DEPTH):
        if not level:
            return value
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
    raise error(_too_deep(where))


def _too_deep(where: str) -> str:
    return f"{where} is not JSON that can be read: it is nested deeper than {JSON_DEPTH} levels."


def read_json(
    path: str | PathLike[str],
    *,
    error: type[BsjaxError],
    limit: int = JSON_BYTES,
    strict: bool = False,
) -> Any:
    """Reads a JSON file.

    Args:
      path: the file.
      error: raised if the file cannot be read (see `check_file`) or is not JSON (see `parse_json`).
      limit: the largest size, in bytes.
      strict: as for `parse_json`.
    """
    text = read_text(path, error=error, limit=limit)
    return parse_json(text, str(path), error=error, strict=strict)


def read_json_object(
    path: str | PathLike[str], *, error: type[BsjaxError], limit: int = JSON_BYTES
) -> dict[str, Any]:
    """Like `read_json`, for a file that must hold an object.

    Args:
      path: the file.
      error: as for `read_json`; also raised if the file does not hold an object.
      limit: the largest size, in bytes.
    """
    value = read_json(path, error=error, limit=limit)
    if not isinstance(value, dict):
        raise error(f"{Path(path)} does not hold a JSON object.")
    return value
