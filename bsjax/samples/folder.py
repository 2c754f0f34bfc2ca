"""Samples from a folder of images: prompts with a random number of images in random order."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bsjax.checks import argument, shown, whole_number
from bsjax.errors import SampleError
from bsjax.samples.content import check_sample, interleave

QUESTIONS = (
    "What do these images show? Describe each in one sentence.",
    "Which of these images have most in common, and what sets the others apart?",
    "Compare the first image with the last one.",
    "Is there an image here that does not belong with the others? Explain.",
)
"""The questions to draw from if none is given."""

# All prompts are in memory at once, and a folder could make any number of them.
_MOST_PROMPTS = 100_000
_ENDINGS = frozenset((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))


def read_folder(
    folder: Path,
    limit: int | None,
    seed: int,
    question: str | Sequence[str],
    images_per_prompt: tuple[int, int],
) -> tuple[list[list[dict[str, Any]]], str]:
    """Makes prompts from a folder's images; see `bsjax.samples.read_samples`.

    Raises:
      SampleError: there are too few images, a file is not an image, the question is invalid, or a
        number is out of range.
    """
    questions = [question] if isinstance(question, str) else question
    if (
        not isinstance(questions, Sequence)
        or not questions
        or not all(isinstance(text, str) and text.strip() for text in questions)
    ):
        raise SampleError("question must be a text that is not empty, or a list of such texts.")
    least, most = _checked_range(images_per_prompt)
    if limit is not None:
        whole_number(
            "limit of a folder of images", limit, least=1, most=_MOST_PROMPTS, error=SampleError
        )
    paths = _image_files(folder)
    if len(paths) < least:
        raise SampleError(
            f"{folder} has {len(paths)} image{'s' * (len(paths) != 1)} "
            f"({', '.join(sorted(_ENDINGS))}), but a prompt needs {least}: add images, or allow "
            "prompts with fewer images."
        )
    generator = np.random.default_rng(seed)
    samples: list[list[dict[str, Any]]] = []
    known: set[Path] = set()
    waiting: list[int] = []
    covered = 0
    while len(samples) < limit if limit is not None else covered < len(paths):
        count = int(generator.integers(least, min(most, len(paths)) + 1))
        if len(waiting) < count:
            # Every image is used once before any is used again, and never twice in a prompt.
            left = set(waiting)
            waiting += [i for i in generator.permutation(len(paths)).tolist() if i not in left]
        chosen, waiting = waiting[:count], waiting[count:]
        covered += count
        images = [{"type": "image", "image": str(paths[index])} for index in chosen]
        text = questions[int(generator.integers(len(questions)))]
        try:
            content = interleave(text, images)
        except SampleError as error:
            raise SampleError(
                f"The question {text!r} does not fit prompts of {least} to {most} images: {error}."
            ) from error
        sample = [{"role": "user", "content": content}]
        check_sample(sample, str(folder), known)
        samples.append(sample)
    most = min(most, len(paths))
    return samples, (
        f"{len(samples)} prompts of {least if least == most else f'{least} to {most}'} of the "
        f"{len(paths)} images in the folder {folder.resolve().name}, seed {seed}"
    )


def _image_files(folder: Path) -> list[Path]:
    """All images below a folder except hidden ones, in the same order on every file system."""

    def refuse(error: OSError) -> None:
        raise SampleError(f"{folder} cannot be read: {error}") from error

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in _ENDINGS:
                found.append(Path(parent, name))
    found.sort(key=lambda path: path.relative_to(folder).as_posix())
    return [path.absolute() for path in found]


def _checked_range(images_per_prompt: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(images_per_prompt, Sequence) or len(images_per_prompt) != 2:
        raise SampleError(
            f"{argument('images_per_prompt')} must be a pair, the smallest and the largest number, "
            f"got {shown(images_per_prompt)}."
        )
    least, most = images_per_prompt
    least = whole_number("the fewest images per prompt", least, least=1, error=SampleError)
    most = whole_number("the most images per prompt", most, least=1, error=SampleError)
    if most < least:
        raise SampleError(
            f"{argument('images_per_prompt')}: the largest number ({most}) is below the smallest "
            f"({least})."
        )
    return least, most
