"""What can be asked about a scene, and the right answers.

content   What is in image C?                              one image
colour    What colour is image C?                          one image
find      Which image shows a 7? / is red?                 a search for one image
count     How many images show a 7? / are red?             all images
compare   Is image B like image E? / coloured like ...?    two images
repeat    What comes twice? / Which colour comes twice?    every image and those before it
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .scenes import COLOURS, CONTENTS, Scene

NONE = "none"


FEATURES = ("content", "colour")
"""What a question can be about."""


class Question(NamedTuple):
    """A question about a scene."""

    task: str
    """A key of `TASKS`."""
    feature: str
    """One of `FEATURES`."""
    text: str
    answer: str
    images: tuple[int, ...]
    """The images that the last word of the question refers to; none if there is no such image."""
    compared: int | None = None
    """The image that is compared with the one in `images`; None in other tasks."""


def ask(random: np.random.Generator, scene: Scene, task: str | None = None) -> Question:
    """A random question about a scene, from a random task unless one is given.

    If the task has no question about the scene (for instance because no image is the only one of
    its kind), the question is about the content of an image.
    """
    tasks = list(TASKS) if task is None else [task]
    for name in [tasks[random.integers(len(tasks))], "content"]:
        question = TASKS[name](random, scene)
        if question is not None:
            return question
    raise AssertionError("the content of an image can always be asked for")


def _content(random: np.random.Generator, scene: Scene) -> Question:
    image = int(random.integers(len(scene.pictures)))
    text = f"What is in image {scene.labels[image]}?"
    return Question("content", "content", text, scene.contents[image], (image,))


def _colour(random: np.random.Generator, scene: Scene) -> Question:
    image = int(random.integers(len(scene.pictures)))
    text = f"What colour is image {scene.labels[image]}?"
    return Question("colour", "colour", text, scene.colours[image], (image,))


def _find(random: np.random.Generator, scene: Scene) -> Question | None:
    feature, values, names = _drawn_feature(random, scene)
    counts = Counter(values)
    absent = random.random() < 0.1
    wanted = [name for name in names if counts[name] == (0 if absent else 1)]
    if not wanted:
        return None
    name = wanted[random.integers(len(wanted))]
    text = f"Which image is {name}?" if feature == "colour" else f"Which image shows a {name}?"
    if absent:
        return Question("find", feature, text, NONE, ())
    image = values.index(name)
    # With a leading space, the letter is the same token as the one after the image.
    return Question("find", feature, text, f" {scene.labels[image]}", (image,))


def _count(random: np.random.Generator, scene: Scene) -> Question:
    feature, values, names = _drawn_feature(random, scene)
    if random.random() < 0.1:
        name = names[random.integers(len(names))]
    else:
        present = sorted(set(values))
        name = present[random.integers(len(present))]
    images = _where(values, name)
    kind = f"are {name}" if feature == "colour" else f"show a {name}"
    return Question("count", feature, f"How many images {kind}?", str(len(images)), images)


def _compare(random: np.random.Generator, scene: Scene) -> Question | None:
    if len(scene.pictures) < 2:
        return None
    feature, values, _ = _drawn_feature(random, scene)
    alike = random.random() < 0.5
    count = len(values)
    pairs = [
        (one, other)
        for one in range(count)
        for other in range(one + 1, count)
        if (values[one] == values[other]) == alike
    ]
    if not pairs:
        return None
    one, other = pairs[random.integers(len(pairs))]
    coloured = "coloured " if feature == "colour" else ""
    text = f"Is image {scene.labels[one]} {coloured}like image {scene.labels[other]}?"
    return Question("compare", feature, text, "yes" if alike else "no", (other,), one)


def _repeat(random: np.random.Generator, scene: Scene) -> Question | None:
    by_colour = random.random() < 0.5
    for feature, values, text in (
        ("colour", scene.colours, "Which colour comes twice?"),
        ("content", scene.contents, "What comes twice?"),
    )[:: 1 if by_colour else -1]:
        again = [value for image, value in enumerate(values) if value in values[:image]]
        if len(again) == 1:
            return Question("repeat", feature, text, again[0], _where(values, again[0]))
        if not again:
            return Question("repeat", feature, text, NONE, ())
    return None


def _drawn_feature(
    random: np.random.Generator, scene: Scene
) -> tuple[str, list[str], tuple[str, ...]]:
    """A random feature, its value in each image, and all values that it can have."""
    if random.random() < 0.5:
        return "colour", scene.colours, tuple(COLOURS)
    return "content", scene.contents, CONTENTS


def _where(values: list[str], wanted: str) -> tuple[int, ...]:
    return tuple(index for index, value in enumerate(values) if value == wanted)


TASKS: dict[str, Callable[[np.random.Generator, Scene], Question | None]] = {
    "content": _content,
    "colour": _colour,
    "find": _find,
    "count": _count,
    "compare": _compare,
    "repeat": _repeat,
}

BY_LETTER = ("content", "colour", "compare")
"""Tasks whose questions end with the letter of an image."""
