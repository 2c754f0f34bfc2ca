"""What all sources of samples share: placeholders, draws, and checking images in advance."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.errors import MessageError, SampleError
from bsjax.prompts.images import image_file, opened_image
from bsjax.prompts.messages import read_messages

PLACEHOLDER = "<image>"


def interleave(text: str, images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Makes a message's content: each image at its placeholder, or before a text that has none.

    Args:
      text: has `<image>` once for each image, or not at all.
      images: content parts of type "image".

    Raises:
      SampleError: the numbers of placeholders and images differ.
    """
    pieces = text.split(PLACEHOLDER)
    if len(pieces) == 1:
        return [*images, {"type": "text", "text": text}]
    if len(pieces) - 1 != len(images):
        raise SampleError(
            f"the text has {len(pieces) - 1} {PLACEHOLDER} placeholders for {len(images)} "
            f"image{'s' * (len(images) != 1)}: it must have one for each, or none"
        )
    content: list[dict[str, Any]] = []
    for index, piece in enumerate(pieces):
        if index:
            content.append(images[index - 1])
        if piece:
            content.append({"type": "text", "text": piece})
    return content


def draw_indices(count: int, limit: int | None, seed: int) -> list[int]:
    """Indices of the samples to use, in ascending order: all, or `limit` drawn with the seed."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def share_in_words(taken: int, count: int, noun: str, seed: int) -> str:
    """How many of the samples were used, in words."""
    plural = noun if count == 1 else f"{noun}s"
    return f"{count} {plural}" if taken == count else f"{taken} of {count} {plural}, seed {seed}"


def check_sample(messages: Any, where: str, known: set[Path]) -> None:
    """Checks the form of messages, and that their image files exist and are images.

    Finds errors before hours of work rather than in the middle. Reads only the headers of images.

    Args:
      messages: chat messages.
      where: where the messages come from, for error messages.
      known: files already checked; those of this sample are added.

    Raises:
      SampleError: a message has an invalid form, or an image cannot be opened.
    """
    try:
        _, images = read_messages(messages)
    except MessageError as error:
        raise SampleError(f"{where}: {error}") from error
    for image in images:
        path = image_file(image.key, image.source)
        if path is None or path in known:
            continue
        if not os.path.exists(path):
            raise SampleError(
                f"{where}: there is no image {path}. Correct the path, or leave out the sample."
            )
        try:
            with opened_image(path):
                known.add(path)
        except Exception as error:  # Decoders raise many kinds.
            raise SampleError(
                f"{where}: {path} cannot be read as an image ({error}). Replace the file, or leave "
                "out the sample."
            ) from error


def with_image_options(
    messages: Sequence[dict[str, Any]], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The messages, with the options added to every image that does not have its own."""
    return [
        {
            **message,
            "content": [
                {**options, **part}
                if isinstance(part, dict) and part.get("type") in ("image", "image_url")
                else part
                for part in message["content"]
            ],
        }
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]
