"""What can be asked about a scene, and the right answers.

content   What is in image C?                                one image
colour    What colour is image C?                            one image
find      Which image shows a 7? / is red?                   looking for one
count     How many images show a 7? / are red?               all images
compare   Do images B and E show the same? / ... colour?     two images
repeat    Which image repeats an earlier one? / ... colour?  every image and those before it
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .scenes import COLOURS, CONTENTS, LABELS, Scene

NONE = "none"


class Question(NamedTuple):
    """A question about a scene."""

    task: str
    """A key of `TASKS`."""
    text: str
    answer: str


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


def _content(random: np.random.Generator, scene: Scene) -> tuple[str, str]:
    image = random.integers(len(scene.pictures))
    return f"What is in image {LABELS[image]}?", scene.contents[image]


def _colour(random: np.random.Generator, scene: Scene) -> tuple[str, str]:
    image = random.integers(len(scene.pictures))
    return f"What colour is image {LABELS[image]}?", scene.colours[image]


def _find(random: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
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
    return text, NONE if absent else f"image {LABELS[values.index(name)]}"


def _count(random: np.random.Generator, scene: Scene) -> tuple[str, str]:
    by_colour = random.random() < 0.5
    values = scene.colours if by_colour else scene.contents
    if random.random() < 0.1:
        names = tuple(COLOURS) if by_colour else CONTENTS
        name = names[random.integers(len(names))]
    else:
        present = sorted(set(values))
        name = present[random.integers(len(present))]
    text = f"How many images are {name}?" if by_colour else f"How many images show a {name}?"
    return text, str(values.count(name))


def _compare(random: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
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
    one, other = (LABELS[image] for image in pairs[random.integers(len(pairs))])
    what = "have the same colour" if by_colour else "show the same"
    return f"Do images {one} and {other} {what}?", "yes" if alike else "no"


def _repeat(random: np.random.Generator, scene: Scene) -> tuple[str, str] | None:
    by_colour = random.random() < 0.5
    for values, what in (
        (scene.colours, "an earlier colour"),
        (scene.contents, "an earlier one"),
    )[:: 1 if by_colour else -1]:
        again = [image for image, value in enumerate(values) if value in values[:image]]
        if len(again) < 2:
            return f"Which image repeats {what}?", f"image {LABELS[again[0]]}" if again else NONE
    return None


TASKS: dict[str, Callable[[np.random.Generator, Scene], tuple[str, str] | None]] = {
    "content": _content,
    "colour": _colour,
    "find": _find,
    "count": _count,
    "compare": _compare,
    "repeat": _repeat,
}
