"""Samples in the order of their fingerprints, split into those to choose with and those held out.

The order does not depend on how the samples were given, and so neither does the choice of held-out
samples or any sum over samples.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from bsjax.checks import naming
from bsjax.errors import ProfileError
from bsjax.prompts.images import IMAGE_FILE_KEYS, image_file
from bsjax.prompts.messages import Messages, read_messages
from bsjax.samples import Samples


class OrderedSamples(NamedTuple):
    """Distinct conversations in the order of their fingerprints.

    Attributes:
      messages: one conversation per sample.
      fingerprints: fingerprint of each sample, 64 hexadecimal digits.
      places: where each sample comes from, for error messages.
    """

    messages: tuple[Messages, ...]
    fingerprints: tuple[str, ...]
    places: tuple[str, ...]

    @classmethod
    def of(cls, samples: Any) -> "OrderedSamples":
        """Orders `bsjax.Samples` or a list of conversations.

        Duplicates are dropped: otherwise, a held-out sample could also be one that the categories
        were chosen with.

        Raises:
          ProfileError: there are no samples, or they are not a sequence of conversations.
        """
        places: Sequence[str] = ()
        if isinstance(samples, Samples):
            samples, places = samples.messages, samples.places
        if isinstance(samples, str | bytes | Mapping) or not isinstance(samples, Sequence):
            raise ProfileError(
                "Samples must be a list of conversations, each a list of chat messages, got "
                f"{type(samples).__name__}."
            )
        if not samples:
            raise ProfileError("There are no samples to profile with.")
        if isinstance(samples[0], Mapping):
            raise ProfileError(
                "Samples must be a list of conversations, each a list of chat messages, got a "
                "single conversation. Put it into a list."
            )
        if len(places) != len(samples):
            places = [f"samples[{number}]" for number in range(len(samples))]
        by_fingerprint: dict[str, tuple[Messages, str]] = {}
        for messages, place in zip(samples, places, strict=True):
            by_fingerprint.setdefault(fingerprint(messages), (messages, place))
        digests = tuple(sorted(by_fingerprint))
        ordered = [by_fingerprint[digest] for digest in digests]
        return cls(
            tuple(messages for messages, _ in ordered),
            digests,
            tuple(place for _, place in ordered),
        )

    @property
    def fingerprint(self) -> str:
        """Fingerprint of all samples together."""
        return hashlib.sha256("".join(self.fingerprints).encode()).hexdigest()

    def __bool__(self) -> bool:
        return bool(self.messages)

    def split(self, held_out: float, seed: int) -> "tuple[OrderedSamples, OrderedSamples]":
        """Splits into samples to choose categories with, and samples to check the choice on.

        Args:
          held_out: share of the samples to hold out, in [0, 1), rounded to whole samples. A share
            above 0 holds out at least one sample if there are two or more, but never all.
          seed: seed of the draw of held-out samples.
        """
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
            tuple(self.places[index] for index in indices),
        )


def check_images(samples: OrderedSamples, *, several: bool) -> None:
    """Rejects samples that would make a run fail later. Does not read images.

    Args:
      samples: samples to check.
      several: whether at least one sample must have several images.

    Raises:
      ProfileError: a sample has no image, or, with `several`, no sample has two.
      MessageError: `bsjax.generate` would reject the messages of a sample.
    """
    most = 0
    for messages, place in zip(samples.messages, samples.places, strict=True):
        with naming(place):
            count = len(read_messages(messages)[1])
            if not count:
                raise ProfileError(
                    "A sample has no image, so it says nothing about what image tokens attend to. "
                    f"Leave such samples out: {str(messages)[:200]}"
                )
        # How many crops an image has depends on its size, which is not read here.
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
    """The error for samples that have one image each."""
    return ProfileError(
        "No sample has two images or more, and a single image says nothing about attention between "
        "images: add prompts with several images."
    )


def fingerprint(messages: Any) -> str:
    """SHA-256 of a conversation: roles, texts and images.

    An image contributes the bytes of its file, its pixels if it is in memory, or its URL.
    """
    digest = hashlib.sha256()
    _add(digest, messages)
    return digest.hexdigest()


def _add(digest: Any, value: Any, image_key: str | None = None) -> None:
    """Adds a value with its kind and length, so that different values cannot give the same bytes.

    Args:
      digest: hash to update.
      value: any part of a conversation.
      image_key: key of the value in an image part; None elsewhere, where text is not a file name.
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
        # Pixels are indices into a palette, which the array does not contain.
        _add(digest, value.convert("RGBA"))
    elif hasattr(value, "__array__") or hasattr(value, "__array_interface__"):
        array = np.asarray(value)
        entry("array", f"{array.shape} {array.dtype}".encode())
        entry("values", np.ascontiguousarray(array).tobytes())
    else:
        entry(type(value).__name__, repr(value).encode())


def _file_content(key: str, value: Any) -> bytes | None:
    """The bytes of the file that an image is read from; None if it is not a file."""
    path = image_file(key, value)
    try:
        return path.read_bytes() if path is not None and path.is_file() else None
    except (OSError, ValueError):  # Text and base64 data are not paths.
        return None
