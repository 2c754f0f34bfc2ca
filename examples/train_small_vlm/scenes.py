"""Scenes: several small images, each a digit or a shape in a colour.

Digits are the handwritten ones from scikit-learn, which are divided here into training and test
digits. Shapes are drawn.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

DIGITS = tuple("0123456789")
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
CONTENTS = DIGITS + SHAPES
COLOURS = {
    "red": (225, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (240, 230, 50),
    "green": (40, 180, 60),
    "cyan": (50, 215, 225),
    "blue": (60, 90, 235),
    "purple": (165, 60, 200),
    "white": (240, 240, 240),
}
LABELS = tuple("ABCDEFGHIJKLMNOP")
SIDES = (20, 24, 28)
"""Heights and widths of images, in pixels."""

_TEST_DIGITS = 500
_SPLIT_SEED = 20240914


@dataclass(frozen=True)
class Picture:
    """One image of a scene, and the features that a question can ask about."""

    content: str
    """One of `CONTENTS`."""
    colour: str
    """A key of `COLOURS`."""
    pixels: UInt8[np.ndarray, "height width 3"]


@dataclass(frozen=True)
class Scene:
    """The images of a prompt, in order."""

    pictures: tuple[Picture, ...]
    first_label: int = 0
    """Index in `LABELS` of the first image's label; in prompts outside of training it is A."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The letter of each image."""
        return LABELS[self.first_label : self.first_label + len(self.pictures)]

    @property
    def contents(self) -> list[str]:
        """What each image shows."""
        return [picture.content for picture in self.pictures]

    @property
    def colours(self) -> list[str]:
        """The colour of each image."""
        return [picture.colour for picture in self.pictures]


def draw_scene(random: np.random.Generator, images: int, *, test: bool) -> Scene:
    """A random scene.

    In half of the scenes at most one content occurs twice, so that a question can ask which image
    repeats an earlier one. In the others a few contents occur several times, so that counting is
    not trivial. The same holds for colours.

    Args:
      random: the generator for everything that is drawn.
      images: number of images, up to `len(LABELS)`.
      test: whether to use the digits that are held out for testing.
    """
    contents = _draw_names(random, CONTENTS, images)
    colours = _draw_names(random, tuple(COLOURS), images)
    pictures = (
        draw_picture(random, content, colour, test=test)
        for content, colour in zip(contents, colours, strict=True)
    )
    return Scene(tuple(pictures))


def _draw_names(random: np.random.Generator, names: tuple[str, ...], count: int) -> list[str]:
    """A name for each image: nearly all are different, or only few are."""
    if random.random() < 0.5 and count <= len(names):
        chosen = random.permutation(len(names))[:count]
        if random.random() < 0.7 and count > 1:
            again = random.integers(1, count)
            chosen[again] = chosen[random.integers(again)]
    else:
        few = random.permutation(len(names))[: random.integers(2, 6)]
        chosen = few[random.integers(0, few.size, count)]
    return [names[index] for index in chosen]


def draw_picture(random: np.random.Generator, content: str, colour: str, *, test: bool) -> Picture:
    """One image of random size, position and shade; a digit is a random handwritten one."""
    height, width = (int(side) for side in random.choice(SIDES, 2))
    size = int(random.uniform(0.7, 0.95) * min(height, width))
    if content in DIGITS:
        stencil = _digit_stencil(random, int(content), size, test)
    else:
        stencil = _shape_stencil(random, content, size)
    top, left = random.integers(0, (height - size + 1, width - size + 1))
    cover = np.zeros((height, width, 1))
    cover[top : top + size, left : left + size, 0] = stencil
    ink = np.asarray(COLOURS[colour]) + random.uniform(-15, 15, 3)
    ground = random.uniform(0, 50) + random.normal(0, 8, (height, width, 3))
    pixels = ground * (1 - cover) + ink * cover
    return Picture(content, colour, np.clip(pixels, 0, 255).astype(np.uint8))


def _digit_stencil(random: np.random.Generator, digit: int, size: int, test: bool) -> np.ndarray:
    """How much of each pixel a handwritten digit covers, 0 to 1."""
    candidates = digit_images(test)[digit]
    image = Image.fromarray(candidates[random.integers(len(candidates))])
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR)) / 255


def _shape_stencil(random: np.random.Generator, shape: str, size: int) -> np.ndarray:
    """How much of each pixel a shape covers, 0 to 1."""
    big = 4 * size
    canvas = Image.new("L", (big, big))
    draw = ImageDraw.Draw(canvas)
    low, high, middle = 0.06 * big, 0.94 * big, 0.5 * big
    thick = random.uniform(0.2, 0.28) * big
    match shape:
        case "circle":
            draw.ellipse((low, low, high, high), fill=255)
        case "square":
            draw.rectangle((low, low, high, high), fill=255)
        case "triangle":
            draw.polygon([(middle, low), (high, high), (low, high)], fill=255)
        case "cross":
            draw.rectangle((middle - thick / 2, low, middle + thick / 2, high), fill=255)
            draw.rectangle((low, middle - thick / 2, high, middle + thick / 2), fill=255)
        case "ring":
            draw.ellipse((low, low, high, high), outline=255, width=int(0.7 * thick))
        case "star":
            angle = np.arange(10) * np.pi / 5
            radius = np.where(np.arange(10) % 2, 0.19, 0.47) * big
            points = zip(
                middle + radius * np.sin(angle), middle - radius * np.cos(angle), strict=True
            )
            draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
        case _:
            raise ValueError(f"{shape!r} is not one of the shapes {', '.join(SHAPES)}.")
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX)) / 255


@cache
def digit_images(test: bool) -> tuple[UInt8[np.ndarray, "count 8 8"], ...]:
    """The handwritten digits for training or for testing, by the digit that they show."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    chosen = order[:_TEST_DIGITS] if test else order[_TEST_DIGITS:]
    images = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return tuple(images[digits.target[chosen] == digit] for digit in range(10))
