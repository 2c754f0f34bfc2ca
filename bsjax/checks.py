"""Checks of numbers and of the process; how error messages show values and places."""

import math
import operator
import os
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bsjax.errors import BsjaxError


def whole_number(
    name: str, value: Any, *, least: int, most: int | None = None, error: type[BsjaxError]
) -> int:
    """`value` as an int.

    Args:
      name: what the value is, for the error message.
      value: an int, or a NumPy integer.
      least: the smallest valid value.
      most: the largest valid value; None for no bound.
      error: raised if it is not a whole number, or out of bounds.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise error(f"{name} must be a whole number, got {shown(value)}.") from None
    if number < least:
        raise error(f"{name} must be at least {least}, got {shown(number)}.")
    if most is not None and number > most:
        raise error(f"{name} must be at most {most}, got {shown(number)}.")
    return number


def positive_number(name: str, value: Any, *, error: type[BsjaxError]) -> float:
    """`value` as a float.

    Args:
      name: what the value is, for the error message.
      value: an int or a float.
      error: raised if it is not a finite number above 0.
    """
    if not 0 < as_number(value) < math.inf:
        raise error(f"{name} must be a number above 0, got {shown(value)}.")
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


_SHORT = reprlib.Repr()  # Python 3.11 takes no arguments here.
_SHORT.maxlevel = 4
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 20
_SHORT.maxstring = _SHORT.maxother = 200


def shown(value: Any) -> str:
    """`value` as error messages show it, whatever it is."""
    try:
        # Lists that hold the same list many times grow exponentially when they are written out.
        nested = isinstance(value, dict | list | tuple | set | frozenset)
        return _SHORT.repr(value) if nested else repr(value)
    except Exception:  # Python refuses to write integers of thousands of digits, for example.
        return f"a value of type {type(value).__name__}"


@contextmanager
def naming(place: str | None) -> Iterator[None]:
    """Adds a place to the message of any error of bsjax that is raised inside the block.

    Args:
      place: such as the number of a conversation in a batch, or a line of a file; None adds
        nothing.
    """
    try:
        yield
    except BsjaxError as error:
        if place is None:
            raise
        raise type(error)(f"{place}: {error}") from error


_process_of_first_use: int | None = None


def check_not_forked(error: type[BsjaxError]) -> None:
    """Refuses to compute in a process that was forked after bsjax computed in its parent.

    The threads in which JAX computes exist in the parent only: a forked child would wait for them
    forever. A child that was forked before the first use may compute.

    Args:
      error: raised in such a child.
    """
    global _process_of_first_use
    if _process_of_first_use is None:
        _process_of_first_use = os.getpid()
    elif _process_of_first_use != os.getpid():
        raise error(
            f"This process was forked from process {_process_of_first_use} after JAX had been used "
            "there, and JAX does not survive a fork. Start processes with "
            "multiprocessing.get_context('spawn'), or fork before loading the model and load it in "
            "the child."
        )
