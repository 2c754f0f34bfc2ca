"""Conversations of a JSON Lines file to answer, of which one is in memory at a time."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bsjax.checks import shown
from bsjax.errors import SampleError
from bsjax.files import check_file
from bsjax.samples.jsonl import conversation_of, read_record

_KEYS = ("id", "messages", "images")

# Images in base64 included.
_LONGEST_LINE = 2**30
_LONGEST_ID = 1000


class _Line(NamedTuple):
    """Where a conversation is in the file, and the hash of its line."""

    offset: int
    content: int


class ConversationFile:
    """A JSON Lines file: each line is a list of chat messages, or an object with `"messages"`.

    Beside `"messages"`, an object may have `"images"` (see `bsjax.read_samples`) and an `"id"` of
    its own. Lines are counted from 1, and empty lines hold nothing. If the last message of a line
    is the assistant's, it is dropped.

    The file stays open, so that another file which takes its name is not read in its place.

    Args:
      path: the file.

    Attributes:
      path: the file.
      sha256: SHA-256 of its content, as 64 hexadecimal digits.
      ids: the `"id"` of every conversation, by the number of its line; None where it has none.

    Raises:
      SampleError: the file cannot be read or is empty, a line is not JSON or has an unknown key, or
        an id occurs twice; the message names the line.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        check_file(self.path, error=SampleError)
        try:
            self._file = self.path.open("rb")
        except OSError as error:
            raise SampleError(f"{path} cannot be read: {error.strerror}.") from error
        self.ids: dict[int, str | int | None] = {}
        self._lines: dict[int, _Line] = {}
        try:
            self.sha256 = self._read_once()
        except BaseException:
            self._file.close()
            raise

    def place(self, number: int) -> str:
        """A line, for error messages."""
        return f"{self.path}, line {number}"

    def messages(self, numbers: Iterable[int]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Reads conversations again, each when it is asked for.

        Args:
          numbers: the numbers of their lines.

        Yields:
          The number of a line and its messages, in which paths of images are absolute.

        Raises:
          SampleError: a line holds no messages, or has changed since the file was opened.
        """
        for number in numbers:
            line = self._lines[number]
            self._file.seek(line.offset)
            text = self._file.readline(_LONGEST_LINE + 1)
            where = self.place(number)
            if hash(text) != line.content:
                raise SampleError(
                    f"{where} has changed while the file was in use. Run again with the file as it "
                    "is to be."
                )
            yield number, conversation_of(read_record(text, where), where, self._folder)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> "ConversationFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _folder(self) -> Path:
        return self.path.absolute().parent

    def _read_once(self) -> str:
        """Notes where the lines are, and checks what needs no images. Returns the digest."""
        digest = hashlib.sha256()
        lines_of_ids: dict[str | int, int] = {}
        number = offset = 0
        while line := self._file.readline(_LONGEST_LINE + 1):
            number += 1
            where = self.place(number)
            if len(line) > _LONGEST_LINE:
                raise SampleError(f"{where} has more than {_LONGEST_LINE:,} bytes.")
            digest.update(line)
            if line.strip():
                record = read_record(line, where)
                name = _id(record, where)
                if name is not None and lines_of_ids.setdefault(name, number) != number:
                    raise SampleError(
                        f"{where} has the id {shown(name)}, as has line {lines_of_ids[name]}: give "
                        "each its own."
                    )
                self.ids[number] = name
                self._lines[number] = _Line(offset, hash(line))
            offset += len(line)
        if not self._lines:
            raise SampleError(f"{self.path} has no conversations: it is empty.")
        return digest.hexdigest()


def _id(record: Any, where: str) -> str | int | None:
    """The id of a line, whose keys are checked."""
    if not isinstance(record, dict):
        return None
    unknown = [key for key in record if key not in _KEYS]
    if unknown:
        raise SampleError(
            f"{where} has the unknown key{'s' * (len(unknown) > 1)} "
            f"{', '.join(map(shown, unknown))}; known are {', '.join(_KEYS)}."
        )
    name = record.get("id")
    is_text = isinstance(name, str) and len(name) <= _LONGEST_ID and _is_unicode(name)
    is_number = isinstance(name, int) and not isinstance(name, bool) and abs(name) < 2**63
    if name is not None and not is_text and not is_number:
        raise SampleError(
            f"{where}: an id must be a text of at most {_LONGEST_ID} characters or a whole number, "
            f"got {shown(name)}."
        )
    return name


def _is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
