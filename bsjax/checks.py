"""Checks of numbers in arguments and configurations."""

import math
import operator
from typing import Any

from bsjax.errors import BsjaxError


def whole_number(name: str, value: Any, *, least: int, error: type[BsjaxError]) -> int:
    """`value` as an int.

    Args:
      name: what the value is, for the error message.
      value: an int, or a NumPy integer.
      least: the smallest valid value.
      error: raised if it is not a whole number or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be a whole number, got {value!r}.") from None
    if number < least:
        raise error(f"{name} must be at least {least}, got {number}.")
    return number


def positive_number(name: str, value: Any, *, error: type[BsjaxError]) -> float:
    """`value` as a float.

    Args:
      name: what the value is, for the error message.
      value: an int or a float.
      error: raised if it is not a finite number above 0.
    """
    if not 0 < as_number(value) < math.inf:
        raise error(f"{name} must be a number above 0, got {value!r}.")
    return float(value)


def as_number(value: Any) -> int | float:
    """Converts to a Python int or float; anything that is not a number gives NaN.

    Text and booleans are not numbers, and neither are integers too large for a float.
    """
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan
    return value if type(value) is int else number
