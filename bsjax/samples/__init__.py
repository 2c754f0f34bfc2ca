"""Samples to profile on: conversations from a file, a folder of images, or a benchmark.

Samples are chat messages, as accepted by `bsjax.profile`, `bsjax.generate` and `bsjax.forward`.
Images are kept as they are in the source (paths, or compressed bytes in base64) and are decoded
when a sample is used, so that a thousand samples fit in memory.
"""

import os
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.checks import LARGEST_WRITTEN, shown, truth_value, whole_number
from bsjax.errors import SampleError
from bsjax.samples.benchmarks import BENCHMARKS, read_benchmark
from bsjax.samples.content import with_image_options
from bsjax.samples.folder import QUESTIONS, read_folder
from bsjax.samples.jsonl import read_jsonl

__all__ = ["BENCHMARKS", "QUESTIONS", "Samples", "read_samples"]

_PREFIX = "benchmark:"


class _Samples(NamedTuple):
    messages: list[list[dict[str, Any]]]
    """One list of chat messages per sample, ending where the answer would begin."""
    description: str
    """The sources in words, for a profile's `source`."""


class Samples(_Samples):
    """Conversations, and where they come from: `messages, description = samples`."""

    places: tuple[str, ...] = ()
    """Where each sample comes from, such as a line of a file, for error messages."""

    @classmethod
    def of(
        cls,
        messages: list[list[dict[str, Any]]],
        description: str,
        places: Sequence[str] = (),
    ) -> "Samples":
        """Samples whose places are known."""
        samples = cls(messages, description)
        samples.places = tuple(places)
        return samples


def read_samples(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    limit: int | None = None,
    seed: int = 0,
    question: str | Sequence[str] = QUESTIONS,
    images_per_prompt: tuple[int, int] = (2, 12),
    max_pixels: int | None = None,
    pan_and_scan: bool = False,
) -> Samples:
    """Reads the samples of one source, or of several.

    The same arguments give the same samples in the same order, on every machine.

    Args:
      source: one of these, or a list of them:
        - A JSON Lines file: each line is a list of chat messages, or an object with `"messages"`
          and optionally `"images"` for the `<image>` placeholders in texts, or for parts of type
          `"image"` that have no image. Relative paths of images are relative to the file's folder.
          If the last message is the assistant's, it is dropped.
        - A folder of images, including sub-folders: prompts with several of the images and a
          question.
        - `"benchmark:muirbench"`, `"benchmark:mmiu"`, `"benchmark:blink"` or
          `"benchmark:blink/Jigsaw"` (one of its tasks), read with the `datasets` library from the
          Hugging Face Hub; `"benchmark:muirbench@FOLDER"` reads a copy of the hub's repository.
      limit: largest number of samples of each source, drawn with `seed`. None uses all samples; for
        a folder of images, it makes enough prompts to show each image about once.
      seed: seed of all draws.
      question: for folders of images, the question; if there are several, one is drawn for each
        prompt.
      images_per_prompt: for folders of images, the smallest and largest number of images of a
        prompt.
      max_pixels: scales larger images down to this many pixels, unless an image has its own
        `max_pixels` (Qwen).
      pan_and_scan: adds crops of long images, unless an image has its own `do_pan_and_scan`
        (Gemma 3).

    Raises:
      SampleError: a source does not exist, is empty or malformed (the message names file and line),
        refers to an image that cannot be read, or is a benchmark that is unknown or cannot be
        loaded.
    """
    if limit is not None:
        whole_number("limit", limit, least=1, error=SampleError)
    if max_pixels is not None:
        whole_number("max_pixels", max_pixels, least=1, error=SampleError)
    whole_number("seed", seed, least=0, most=LARGEST_WRITTEN, error=SampleError)
    truth_value("pan_and_scan", pan_and_scan, error=SampleError)
    sources = [source] if isinstance(source, str | PathLike) else source
    if not isinstance(sources, Sequence) or not all(
        isinstance(one, str | PathLike) for one in sources
    ):
        raise SampleError(f"source must be a path, a name or a list of these, got {shown(source)}.")
    if not sources:
        raise SampleError("There is no source of samples: give a file, folder or benchmark.")
    parts = [_read(one, limit, seed, question, images_per_prompt) for one in sources]
    messages = [sample for part in parts for sample in part.messages]
    options = {"max_pixels": max_pixels, "do_pan_and_scan": pan_and_scan or None}
    options = {name: value for name, value in options.items() if value is not None}
    if options:
        messages = [with_image_options(sample, options) for sample in messages]
    places = tuple(
        place
        for one, part in zip(sources, parts, strict=True)
        for place in part.places or [f"{one}, sample {n}" for n in range(len(part.messages))]
    )
    return Samples.of(messages, "; ".join(part.description for part in parts), places)


def _read(
    source: str | PathLike[str],
    limit: int | None,
    seed: int,
    question: str | Sequence[str],
    images_per_prompt: tuple[int, int],
) -> Samples:
    if isinstance(source, str) and source.startswith(_PREFIX):
        return Samples(*read_benchmark(source.removeprefix(_PREFIX), limit, seed))
    if not str(source).strip():
        raise SampleError("A source of samples is an empty text: give a file, folder or benchmark.")
    # Unlike the methods of Path, those of os.path do not raise for a string that cannot be a path.
    path = Path(os.path.expanduser(source))
    try:
        if os.path.isdir(path):
            return Samples(*read_folder(path, limit, seed, question, images_per_prompt))
        if os.path.isfile(path):
            return Samples.of(*read_jsonl(path, limit, seed))
    except OSError as error:
        raise SampleError(f"{path} cannot be read: {error}") from error
    hint = ""
    if str(source).lower() in BENCHMARKS:
        hint = f" Do you mean {_PREFIX}{str(source).lower()}?"
    raise SampleError(
        f"There is no file or folder {source}.{hint} Samples come from a JSON Lines file, a folder "
        f"of images, or a benchmark ({', '.join(_PREFIX + name for name in BENCHMARKS)})."
    )
