"""State files: what a profiling run has measured, so that an interrupted run can be continued.

The file is an SQLite database of named arrays. Its conditions are what all records depend on;
anything else that a record depends on, such as its sample, is part of the record's name. Every
record is written in its own transaction, so the file is consistent whenever the process ends. A run
that finds a record uses it instead of measuring again, so a resumed run makes the same decisions
and arrives at the same profile.
"""

import hashlib
import io
import json
import os
import sqlite3
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.checkpoint.loading import DescribedModel
from bsjax.checks import argument, shown
from bsjax.errors import ProfileError
from bsjax.files import check_file
from bsjax.profiles.profile import installed_versions

_FORMAT = "bsjax profiling state 2"

# Marks databases of this module: "bsjx".
_APPLICATION_ID = 0x62736A78

Record = dict[str, np.ndarray]


class State:
    """A file of records. Without a path nothing is kept, and everything is computed.

    The file is kept when the run is complete, and a later run with other samples, thresholds or
    budgets reuses what it can.
    """

    def __init__(
        self, path: str | PathLike[str] | None = None, conditions: Mapping[str, str] | None = None
    ) -> None:
        """Opens or creates the file.

        Args:
          path: path of the file; None keeps nothing.
          conditions: what all records depend on, by name.

        Raises:
          ProfileError: the file cannot be used, is not a state file, or was made under other
            conditions.
        """
        if not isinstance(path, str | PathLike | None):
            raise ProfileError(
                f"{argument('resume')} must be the path of a state file, got {shown(path)}."
            )
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        if os.path.lexists(self._path):
            check_file(self._path, error=ProfileError)
        wanted = {"format": _FORMAT, **(conditions or {})}
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application != _APPLICATION_ID:
                if application or objects:
                    raise ProfileError(
                        f"{self._path} cannot be used: it is a database of another program, not a "
                        f"state file. Give {argument('resume')} another path."
                    )
                connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute("CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value)")
            connection.execute("CREATE TABLE IF NOT EXISTS records (name TEXT PRIMARY KEY, value)")
            present = dict(connection.execute("SELECT name, value FROM settings").fetchall())
            if not present:
                connection.executemany("INSERT INTO settings VALUES (?, ?)", wanted.items())
                present = wanted
        for name, value in wanted.items():
            if present.get(name) != value:
                raise ProfileError(
                    f"The state file {self._path} was made with {name} = {present.get(name)}, but "
                    f"this run has {value}, so it cannot continue from it. Delete the file, or "
                    f"give {argument('resume')} another path."
                )

    def recall(self, name: str, compute: Callable[[], Record]) -> Record:
        """Returns the record of that name. If there is none, it is computed and kept.

        Raises:
          ProfileError: the file cannot be read or written.
        """
        if self._path is None:
            return compute()
        with self._open() as connection:
            row = connection.execute("SELECT value FROM records WHERE name = ?", (name,)).fetchone()
        if row is not None:
            return _unpacked(row[0], self._path)
        record = compute()
        with self._open() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO records VALUES (?, ?)", (name, _packed(record))
            )
        return record

    @contextmanager
    def _open(self) -> Any:
        """A connection with a transaction, committed at the end or rolled back on an error."""
        assert self._path is not None
        try:
            with closing(sqlite3.connect(self._path)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise ProfileError(
                f"The state file {self._path} cannot be used: {error}. If no earlier run made "
                f"this file, give {argument('resume')} another path."
            ) from error


def conditions_of(model: DescribedModel, backend: str) -> dict[str, str]:
    """What all records depend on: weights, how prompts are made, dtype, backend and versions."""
    prompts = hashlib.sha256()
    for part in (
        model.config.to_json_string(),
        "" if model.image_processor is None else model.image_processor.to_json_string(),
        json.dumps(model.tokenizer.get_vocab(), sort_keys=True),
        json.dumps(model.tokenizer.chat_template, sort_keys=True),
    ):
        prompts.update(part.encode())
        prompts.update(b"\0")
    return {
        "checkpoint": model.fingerprint,
        "config, tokenizer and image settings": prompts.hexdigest(),
        "dtype": str(model.dtype),
        "backend": backend,
        "versions": ", ".join(f"{name} {one}" for name, one in installed_versions().items()),
    }


NO_STATE = State()
"""A state that keeps nothing."""


def _packed(record: Record) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **record)
    return buffer.getvalue()


def _unpacked(value: Any, path: Path) -> Record:
    try:
        with np.load(io.BytesIO(value), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (EOFError, OSError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ProfileError(f"The state file {path} holds a damaged record: {error}") from error
