"""What a profiling run has measured so far, in a file: a run that is interrupted goes on from it.

The file is an SQLite database of named arrays. Settings say what all of them depend on; everything
else that a record depends on, its sample above all, is in its name. Every record is written in a
transaction of its own, so that the file is whole whenever the process ends. A run that finds a
record takes it instead of measuring: an interrupted run repeats its decisions, and comes to the
same profile.
"""

import hashlib
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable, Mapping
from contextlib import closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.checkpoint.loading import LoadedModel
from bsjax.errors import ProfileError
from bsjax.profiles.profile import installed_versions

_FORMAT = "bsjax profiling state 2"

# Marks the databases that are ours: "bsjx".
_APPLICATION_ID = 0x62736A78
Record = dict[str, np.ndarray]


class State:
    """A file of records, or nothing at all: without a path everything is computed.

    The file stays when the run is complete. A later run takes what it can use from it: samples,
    thresholds and budgets may differ.
    """

    def __init__(
        self, path: str | PathLike[str] | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        """Opens or makes the file.

        Args:
          path: of the file; None keeps nothing.
          settings: what the records depend on, by name. A file made with others is refused.

        Raises:
          ProfileError: the file cannot be used, is no such file, or was made with other settings.
        """
        if not isinstance(path, str | PathLike | None):
            raise ProfileError(f"A state file is named by a path, got {path!r}.")
        self._path = None if path is None else Path(path)
        if self._path is None:
            return
        wanted = {"format": _FORMAT, **(settings or {})}
        with self._open() as connection:
            connection.execute("BEGIN IMMEDIATE")
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if application != _APPLICATION_ID:
                if application or objects:
                    raise ProfileError(
                        f"{self._path} is a database of another program, not a state file: it "
                        "cannot be used. Give `resume` another path."
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
                    f"The state file {self._path} was made with {name} = {present.get(name)}, and "
                    f"this run has {value}: it cannot go on from it. Delete the file, or give "
                    "`resume` another path."
                )

    def recall(self, name: str, compute: Callable[[], Record]) -> Record:
        """The record of that name; computed and kept where there is none.

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
        """A connection with a transaction that is committed at the end, or rolled back."""
        assert self._path is not None
        try:
            with closing(sqlite3.connect(self._path)) as connection, connection:
                yield connection
        except sqlite3.Error as error:
            raise ProfileError(
                f"The state file {self._path} cannot be used: {error}. If it is not a file that an "
                "earlier run made, give `resume` another path."
            ) from error


def settings_of(model: LoadedModel, backend: str) -> dict[str, str]:
    """What all that is measured depends on beside samples: weights, prompt making, arithmetic."""
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
"""Keeps nothing."""


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
