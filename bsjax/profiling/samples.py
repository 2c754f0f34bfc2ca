"""Samples: their fingerprints, an order that is their own, and the share held out.

Everything downstream sees the samples in the order of their fingerprints. Which of them are held
out, and every sum over them, is then the same in whatever order they were given.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bsjax.errors import ProfileError

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""


class Samples(NamedTuple):
    """Conversations in the order of their fingerprints.

    Attributes:
      messages: one conversation per sample.
      fingerprints: of each, 64 hexadecimal digits.
    """

    messages: tuple[Messages, ...]
    fingerprints: tuple[str, ...]

    @classmethod
    def of(cls, samples: Any) -> "Samples":
        """The samples in their own order.

        Raises:
          ProfileError: there are none, or they are not a sequence of conversations.
        """
        if isinstance(samples, str | bytes | Mapping) or not isinstance(samples, Sequence):
            raise ProfileError(
                "Samples are a list of conversations, each a list of chat messages, got "
                f"{type(samples).__name__}."
            )
        if not samples:
            raise ProfileError("There are no samples to profile with.")
        if isinstance(samples[0], Mapping):
            raise ProfileError(
                "Samples are a list of conversations, each a list of chat messages; this is a "
                "single conversation. Put it into a list."
            )
        ordered = sorted(
            ((fingerprint(messages), messages) for messages in samples), key=lambda pair: pair[0]
        )
        return cls(
            tuple(messages for _, messages in ordered), tuple(digest for digest, _ in ordered)
        )

    @property
    def fingerprint(self) -> str:
        """Of all samples together."""
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    def __bool__(self) -> bool:
        return bool(self.messages)

    def split(self, held_out: float, seed: int) -> "tuple[Samples, Samples]":
        """The samples to choose categories with, and those held out to check the choice.

        The held-out share is rounded; it is at least one sample, and leaves at least one, when it
        is above 0 and there are two samples or more.

        Raises:
          ProfileError: the share is not in [0, 1).
        """
        if isinstance(held_out, str | bytes) or not 0 <= held_out < 1:
            raise ProfileError(f"held_out is a share of the samples in [0, 1), got {held_out!r}.")
        count = len(self.messages)
        held = math.floor(count * held_out + 0.5)
        if held_out > 0:
            held = min(max(held, 1), count - 1)
        drawn = sorted(
            range(count),
            key=lambda index: hashlib.sha256(
                f"{seed} {self.fingerprints[index]}".encode()
            ).digest(),
        )
        return self._taking(sorted(drawn[held:])), self._taking(sorted(drawn[:held]))

    def _taking(self, indices: list[int]) -> "Samples":
        return Samples(
            tuple(self.messages[index] for index in indices),
            tuple(self.fingerprints[index] for index in indices),
        )


def fingerprint(messages: Any) -> str:
    """SHA-256 of a conversation: texts, roles, and images by their content where it is at hand.

    Images count by the bytes of their file, or by their pixels; those at a URL by the URL.
    """
    digest = hashlib.sha256()
    _add(digest, messages)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Adds a value with its kind and length, so that no two values look alike."""

    def entry(kind: str, content: bytes) -> None:
        digest.update(f"{kind} {len(content)} ".encode())
        digest.update(content)

    if isinstance(value, Mapping):
        entry("mapping", str(len(value)).encode())
        for key in sorted(value, key=str):
            entry("key", str(key).encode())
            _add(digest, value[key])
    elif isinstance(value, list | tuple):
        entry("list", str(len(value)).encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, str | PathLike):
        content = _file_content(value)
        entry("text" if content is None else "file", content or str(value).encode())
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        entry("array", f"{array.shape} {array.dtype}".encode())
        entry("values", np.ascontiguousarray(array).tobytes())
    else:
        entry(type(value).__name__, repr(value).encode())


def _file_content(value: Any) -> bytes | None:
    """The bytes of the file that a text names; None where it names none."""
    path = Path(str(value).removeprefix("file://"))
    try:
        return path.read_bytes() if path.is_file() else None
    except (OSError, ValueError):  # Texts and base64 data are no paths.
        return None
