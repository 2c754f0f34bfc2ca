"""What can be asked about a scene, and the right answers.

content   What is in image C?                              one image
colour    What colour is image C?                          one image
find      Which image shows a 7? / is red?                 looking for one
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


class Question(NamedTuple):
    """A question about a scene."""

    task: str
    """A key of `TASKS`."""
    text: str
    answer: str
    images: tuple[int, ...]
    """The images that the last word of the question stands for; none if there is no such image."""
    compared: int | None = None
    """The image that these are compared with."""


Asked = tuple[str, str, tuple[int, ...]] | tuple[str, str, tuple[int, ...], int]


def ask(random: np.random.Generator, scene: Scene, task: str | None = None) -> Question:
    """A random question about a scene, of a random task unless one is given.

    Scenes of which a task can ask nothing (no image is the only one of its kind, say) get a
    question of another task.
    """
    tasks = list(TASKS) if task is None else [task]
    for name in [tasks[random.integers(len(tasks))], "content"]:
        asked = TASKS[name](random, scene)
        if asked is not None:
            return Question(name, *asked)
    raise AssertionError("the content of an image can always be asked for")


def _content(random: np.random.Generator, scene: Scene) -> Asked:
    image = int(random.integers(len(scene.pictures)))
    return f"What is in image {scene.labels[image]}?", scene.contents[image], (image,)


def _colour(random: np.random.Generator, scene: Scene) -> Asked:
    image = int(random.integers(len(scene.pictures)))
    return f"What colour is image {scene.labels[image]}?", scene.colours[image], (image,)


def _find(random: np.random.Generator, scene: Scene) -> Asked | None:
    by_colour = random.random() < 0.5
    values = scene.colours if by_colour else scene.contents
    counts = Counter(values)
    absent = random.random() < 0.1
    names = tuple(COLOURS) if by_colour else CONTENTS
    wanted = [name for name in names if counts[name] == (0 if absent else 1)]
    if not wanted:
        return None
    name = wanted[random.integers(len(wanted))]
    text = f"Which image is {name}?" if by_colour else f"Which image shows a {name}?"
    if absent:
        return text, NONE, ()
    image = values.index(name)
    # With the space before it, the letter is the token that stands behind the image.
    return text, f" {scene.labels[image]}", (image,)


def _count(random: np.random.Generator, scene: Scene) -> Asked:
    by_colour = random.random() < 0.5
    values = scene.colours if by_colour else scene.contents
    if random.random() < 0.1:
        names = tuple(COLOURS) if by_colour else CONTENTS
        name = names[random.integers(len(names))]
    else:
        present = sorted(set(values))
        name = present[random.integers(len(present))]
    text = f"How many images are {name}?" if by_colour else f"How many images show a {name}?"
    images = _where(values, name)
    return text, str(len(images)), images


def _compare(random: np.random.Generator, scene: Scene) -> Asked | None:
    if len(scene.pictures) < 2:
        return None
    by_colour = random.random() < 0.5
    values = scene.colours if by_colour else scene.contents
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
    coloured = "coloured " if by_colour else ""
    text = f"Is image {scene.labels[one]} {coloured}like image {scene.labels[other]}?"
    return text, "yes" if alike else "no", (other,), one


def _repeat(random: np.random.Generator, scene: Scene) -> Asked | None:
    by_colour = random.random() < 0.5
    for values, text in (
        (scene.colours, "Which colour comes twice?"),
        (scene.contents, "What comes twice?"),
    )[:: 1 if by_colour else -1]:
        again = [value for image, value in enumerate(values) if value in values[:image]]
        if len(again) < 2:
            return (text, again[0], _where(values, again[0])) if again else (text, NONE, ())
    return None


def _where(values: list[str], wanted: str) -> tuple[int, ...]:
    return tuple(index for index, value in enumerate(values) if value == wanted)


TASKS: dict[str, Callable[[np.random.Generator, Scene], Asked | None]] = {
    "content": _content,
    "colour": _colour,
    "find": _find,
    "count": _count,
    "compare": _compare,
    "repeat": _repeat,
}

BY_LETTER = ("content", "colour", "compare")
"""Tasks whose questions end with the letter of an image."""
