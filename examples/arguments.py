"""Types of command-line arguments that examples share."""

import argparse
from collections.abc import Callable

from .train_small_vlm.scenes import LABELS


def whole(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return parse


def numbers_of_images(text: str) -> tuple[int, ...]:
    """A list such as 4,5,6: each a number of images that a scene can have."""
    numbers = tuple(whole(1)(part) for part in text.split(","))
    if max(numbers) > len(LABELS):
        raise argparse.ArgumentTypeError(f"a scene has at most {len(LABELS)} images")
    return numbers
