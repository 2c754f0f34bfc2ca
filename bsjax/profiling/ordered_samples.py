"""Samples: their fingerprints, an order that is their own, and the share held out.

Everything downstream sees the samples in the order of their fingerprints. Which of them are held
out, and every sum over them, is then the same in whatever order they were given.
"""

import hashlib
import math
import numbers
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from bsjax.errors import ProfileError
from bsjax.prompts.images import IMAGE_FILE_KEYS, image_file
from bsjax.prompts.messages import read_messages
from bsjax.samples import Samples

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""


class OrderedSamples(NamedTuple):
    """Conversations in the order of their fingerprints, each of them once.

    Attributes:
      messages: one conversation per sample.
      fingerprints: of each, 64 hexadecimal digits.
    """

    messages: tuple[Messages, ...]
    fingerprints: tuple[str, ...]

    @classmethod
    def of(cls, samples: Any) -> "OrderedSamples":
        """The samples in their own order, from `bsjax.Samples` or a list of conversations.

        Of samples with the same content one is kept: one of two could not be held out from what the
        other was chosen with.

        Raises:
          ProfileError: there are none, or they are not a sequence of conversations.
        """
        if isinstance(samples, Samples):
            samples = samples.messages
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
        by_fingerprint = {fingerprint(messages): messages for messages in samples}
        digests = tuple(sorted(by_fingerprint))
        return cls(tuple(by_fingerprint[digest] for digest in digests), digests)

    @property
    def fingerprint(self) -> str:
        """Of all samples together."""
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    def __bool__(self) -> bool:
        return bool(self.messages)

    def split(self, held_out: float, seed: int) -> "tuple[OrderedSamples, OrderedSamples]":
        """The samples to choose categories with, and those held out to check the choice.

        The held-out share is rounded; it is at least one sample, and leaves at least one, when it
        is above 0 and there are two samples or more.

        Raises:
          ProfileError: the share is not in [0, 1).
        """
        if not isinstance(held_out, numbers.Real) or not 0 <= held_out < 1:
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

    def _taking(self, indices: list[int]) -> "OrderedSamples":
        return OrderedSamples(
            tuple(self.messages[index] for index in indices),
            tuple(self.fingerprints[index] for index in indices),
        )


def check_images(samples: OrderedSamples, *, several: bool) -> None:
    """Refuses samples that would be refused in the middle of a run. Reads no image.

    Args:
      samples: to look at.
      several: whether at least one sample must have several images.

    Raises:
      ProfileError: a sample has no image, or, with `several`, none has two.
      MessageError: messages of another form than `bsjax.generate` takes.
    """
    most = 0
    for messages in samples.messages:
        count = len(read_messages(messages)[1])
        if not count:
            raise ProfileError(
                "A sample has no image, and says nothing about what image tokens look at. Leave "
                f"such samples out: {str(messages)[:200]}"
            )
        # How many images crops make of one depends on its size, which is not read here.
        if _asks_for_crops(messages):
            count = max(count, 2)
        most = max(most, count)
    if several and most < 2:
        raise no_several_images()


def _asks_for_crops(messages: Messages) -> bool:
    return any(
        isinstance(part, Mapping) and part.get("do_pan_and_scan")
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def no_several_images() -> ProfileError:
    """The error of samples that have one image each."""
    return ProfileError(
        "No sample has two images or more, and one image alone says nothing about attention "
        "between images: add prompts of several."
    )


def fingerprint(messages: Any) -> str:
    """SHA-256 of a conversation: texts, roles, and images by their content where it is at hand.

    Images count by the bytes of their file, or by their pixels; those at a URL by the URL.
    """
    digest = hashlib.sha256()
    _add(digest, messages)
    return digest.hexdigest()


def _add(digest: Any, value: Any, image_key: str | None = None) -> None:
    """Adds a value with its kind and length, so that no two values look alike.

    Args:
      digest: to add to.
      value: any part of a conversation.
      image_key: what an image part has the value under; None elsewhere, where texts name no file.
    """

    def entry(kind: str, content: bytes) -> None:
        digest.update(f"{kind} {len(content)} ".encode())
        digest.update(content)

    if isinstance(value, Mapping):
        entry("mapping", str(len(value)).encode())
        is_image = image_key is not None or value.get("type") in ("image", "image_url")
        for key in sorted(value, key=str):
            entry("key", str(key).encode())
            _add(digest, value[key], str(key) if is_image and key in IMAGE_FILE_KEYS else None)
    elif isinstance(value, list | tuple):
        entry("list", str(len(value)).encode())
        for item in value:
            _add(digest, item)
    elif isinstance(value, str | PathLike):
        content = None if image_key is None else _file_content(image_key, value)
        entry("text" if content is None else "file", content or str(value).encode())
    elif hasattr(value, "getexif") and value.mode in ("P", "PA"):
        # Their values are places in a palette, which is no part of the array.
        _add(digest, value.convert("RGBA"))
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        entry("array", f"{array.shape} {array.dtype}".encode())
        entry("values", np.ascontiguousarray(array).tobytes())
    else:
        entry(type(value).__name__, repr(value).encode())


def _file_content(key: str, value: Any) -> bytes | None:
    """The bytes of the file that an image is read from; None where there is none."""
    path = image_file(key, value)
    try:
        return path.read_bytes() if path is not None and path.is_file() else None
    except (OSError, ValueError):  # Texts and base64 data are no paths.
        return None
