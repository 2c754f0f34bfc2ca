"""Types of command-line arguments that examples share."""

import argparse
from collections.abc import Callable


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers that are at least `least`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if number < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {number}")
        return number

    return parse
