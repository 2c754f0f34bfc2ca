"""Checks of arguments that several modules make."""

import operator
from typing import Any

from bsjax.errors import BsjaxError


def whole_number(name: str, value: Any, *, least: int, error: type[BsjaxError]) -> int:
    """`value` as an int.

    Raises:
      error: it is not a whole number (NumPy's are), or below `least`; the message names `name`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be a whole number, got {value!r}.") from None
    if number < least:
        raise error(f"{name} must be at least {least}, got {number}.")
    return number
