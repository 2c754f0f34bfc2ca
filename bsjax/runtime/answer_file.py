"""The file of a batch's answers: one JSON object per line, complete however the process ends.

    {"bsjax_batch": 1, "made_with": {"input SHA-256": ..., "temperature": 0.0, ...}}
    {"line": 2, "text": ..., "token_ids": ..., ...}
    {"line": 1, "id": "cat", "error": "..."}

The first line says what the answers depend on; a run goes on with a file only if that is the same.
Every other line is written when its answer is known, in one write at the end of the file, so that a
process which is killed leaves whole lines and at most one torn line, the last. The next run cuts it
off. While a process writes, it holds a lock on the file, which ends with the process.
"""

import contextlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from bsjax.checks import argument, shown
from bsjax.errors import GenerationError
from bsjax.files import JSON_BYTES, check_file, parse_json

try:
    import fcntl
except ImportError:  # Windows lacks these locks.
    fcntl = None

_FORMAT = 1
_BEGINNING = b'{"bsjax_batch": '

# A killed process loses nothing that it has written; only a machine that stops does. On a disk
# where this takes 2.5 ms, it costs a run a four-hundredth of its time, however short answers are.
_SECONDS_BETWEEN_SYNCS = 1.0


class AnswerFile:
    """A file to which the answers of a batch are appended.

    Args:
      path: the file, which need not exist.
      made_with: what the answers depend on, by name: values of JSON. A name of an argument is shown
        as `argument` says.
      ids: the id of every conversation, or None, by the number of its line.

    Attributes:
      path: the file.
      done: the numbers of the lines that are answered, and whether they have errors.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        made_with: Mapping[str, Any],
        ids: Mapping[int, str | int | None],
    ) -> None:
        self.path = Path(path)
        self.done: dict[int, bool] = {}
        self._made_with, self._ids = made_with, ids
        self._descriptor: int | None = None
        self._end = 0
        self._synced = time.monotonic()

    def resume(self) -> None:
        """Reads what an earlier run has answered, if the file exists. Changes nothing.

        From here on the file is locked.

        Raises:
          GenerationError: another process writes the file, or it is not a file of answers, was made
            with something else, or is damaged.
        """
        if self._descriptor is None and os.path.lexists(self.path):
            check_file(self.path, error=GenerationError)
            self._open(os.O_RDWR)

    def begin(self) -> None:
        """Makes the file if it does not exist, and cuts off a torn line.

        Raises:
          GenerationError: as for `resume`.
          OSError: the file cannot be written.
        """
        is_new = self._descriptor is None
        if is_new:
            # Another process may have made it just now.
            self._open(os.O_RDWR | os.O_CREAT)
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, self._end)
        if not self._end:
            header = {"bsjax_batch": _FORMAT, "made_with": dict(self._made_with)}
            self._write(json.dumps(header, ensure_ascii=False).encode() + b"\n")
            self._sync()
        if is_new and os.name == "posix":
            # The file's name is in its folder.
            folder = os.open(self.path.absolute().parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def add(self, number: int, outcome: Mapping[str, Any]) -> None:
        """Appends the outcome of a line of the input.

        Args:
          number: the number of the line.
          outcome: what is known of it: `text` and so on, or `error`.

        Raises:
          OSError: the file cannot be written. Lines that were written before are whole.
        """
        name = self._ids[number]
        record = {"line": number, **({} if name is None else {"id": name}), **outcome}
        self._write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self.done[number] = "error" in outcome
        if time.monotonic() - self._synced > _SECONDS_BETWEEN_SYNCS:
            self._sync()

    def close(self) -> None:
        """Writes through to the disk, and lets other processes have the file."""
        if self._descriptor is not None:
            try:
                self._sync()
            finally:
                os.close(self._descriptor)
                self._descriptor = None

    def __enter__(self) -> "AnswerFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self, flags: int) -> None:
        """Opens, locks and reads the file."""
        try:
            descriptor = os.open(
                self.path, flags | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666
            )
        except OSError as error:
            raise GenerationError(
                f"{self.path} cannot be written: {error.strerror}. Give {argument('output')} "
                "another file."
            ) from error
        try:
            self._lock(descriptor)
            self._read(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def _lock(self, descriptor: int) -> None:
        if fcntl is None:
            raise GenerationError(
                "This system has no locks (flock), without which two runs could write to "
                f"{self.path} at a time. Use bsjax.generate_iter in a program of your own."
            )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise GenerationError(
                f"Another process is writing to {self.path}: wait for it, or give "
                f"{argument('output')} another file."
            ) from error
        except OSError as error:
            raise GenerationError(
                f"{self.path} cannot be locked ({error.strerror}), and without a lock two runs "
                f"could write to it at a time. Give {argument('output')} a file on another disk."
            ) from error

    def _read(self, descriptor: int) -> None:
        """Finds the end of the last whole line, and what is answered up to there."""
        self.done.clear()
        self._end, number, is_ours, has_answers = 0, 0, True, False
        with open(os.dup(descriptor), "rb") as file:
            file.seek(0)
            while line := file.readline(JSON_BYTES):
                number += 1
                if number == 1:
                    is_ours = line.startswith(_BEGINNING) or _BEGINNING.startswith(line)
                if not is_ours:
                    raise GenerationError(
                        f"{self.path} exists and is not a file of answers by bsjax generate "
                        f"--batch. Give {argument('output')} another file."
                    )
                if not line.endswith(b"\n"):
                    if len(line) == JSON_BYTES:
                        raise self._damaged(number, "it is too long")
                    break
                if number == 1:
                    header = line
                else:
                    # Only now: a file that has no answers may become that of another run.
                    if not has_answers:
                        self._check_header(header)
                    has_answers = True
                    self._read_answer(line, number)
                self._end += len(line)
        if not has_answers:
            self._end = 0

    def _check_header(self, line: bytes) -> None:
        header = parse_json(line, f"{self.path}, line 1", error=GenerationError)
        version = header.get("bsjax_batch")
        theirs = header.get("made_with")
        if version != _FORMAT or not isinstance(theirs, dict):
            raise GenerationError(
                f"{self.path} is of version {shown(version)} of the format, and this bsjax writes "
                f"{_FORMAT}. Give {argument('output')} another file."
            )
        for name in [*self._made_with, *theirs]:
            before, now = theirs.get(name), self._made_with.get(name)
            if before != now:
                raise GenerationError(
                    f"{self.path} was made with {argument(name)} = {shown(before)}, but this run "
                    f"has {shown(now)}, so it cannot go on with it. Delete the file, or give "
                    f"{argument('output')} another one."
                )

    def _read_answer(self, line: bytes, number: int) -> None:
        record = parse_json(line, f"{self.path}, line {number}", error=GenerationError)
        answered = record.get("line") if isinstance(record, dict) else None
        if type(answered) is not int or answered not in self._ids:
            raise self._damaged(number, "it answers no line of the input")
        if record.get("id") != self._ids[answered] or not ("text" in record) ^ ("error" in record):
            raise self._damaged(number, f"it is no answer to line {answered} of the input")
        if answered in self.done:
            raise self._damaged(number, f"it answers line {answered} of the input again")
        self.done[answered] = "error" in record

    def _damaged(self, number: int, reason: str) -> GenerationError:
        return GenerationError(
            f"{self.path}, line {number}, is damaged: {reason}. Delete that line, or give "
            f"{argument('output')} another file."
        )

    def _write(self, line: bytes) -> None:
        assert self._descriptor is not None
        left = memoryview(line)
        try:
            while left:
                # All at once, unless the disk is full.
                left = left[os.write(self._descriptor, left) :]
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._end)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise
        self._end += len(line)

    def _sync(self) -> None:
        assert self._descriptor is not None
        os.fsync(self._descriptor)
        self._synced = time.monotonic()
