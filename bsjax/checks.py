"""Checks of numbers and of the process; how error messages show values, names and places."""

import math
import operator
import os
import re
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bsjax.errors import BsjaxError

LARGEST_WRITTEN = 2**64 - 1
"""The largest whole number that goes into files: Python writes out none of over 4,300 digits."""

# Not a context variable: messages are also made in threads, which would not inherit it.
_names: Mapping[str, str] = {}


def argument(name: str) -> str:
    """How an error message writes the name of an argument: as the user gave it.

    That is the name itself, unless the user wrote a command line (see `arguments_named`).

    Args:
      name: the name in Python, such as `max_tokens`.
    """
    return _names.get(name, name)


def with_arguments(text: str) -> str:
    """A text with each name in braces, such as `{max_tokens}`, as `argument` writes it."""
    return re.sub(r"\{(\w+)\}", lambda name: argument(name[1]), text)


@contextmanager
def arguments_named(names: Mapping[str, str]) -> Iterator[None]:
    """Inside the block, error messages of this process write arguments by other names.

    Args:
      names: the names to write, by the names in Python: `{"max_tokens": "--max-tokens"}`.
    """
    global _names
    before, _names = _names, names
    try:
        yield
    finally:
        _names = before


def whole_number(
    name: str, value: Any, *, least: int, most: int | None = None, error: type[BsjaxError]
) -> int:
    """`value` as an int.

    Args:
      name: what the value is, for the error message; a name of an argument is written as
        `argument` says.
      value: an int, or a NumPy integer; truth values are not numbers.
      least: the smallest valid value.
      most: the largest valid value; None for no bound.
      error: raised if it is not a whole number, or out of bounds.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise error(f"{argument(name)} must be a whole number, got {shown(value)}.") from None
    if number < least:
        raise error(f"{argument(name)} must be at least {least}, got {shown(number)}.")
    if most is not None and number > most:
        raise error(f"{argument(name)} must be at most {most}, got {shown(number)}.")
    return number


def truth_value(name: str, value: Any, *, error: type[BsjaxError]) -> bool:
    """`value` as a bool.

    Args:
      name: as for `whole_number`.
      value: a bool of Python or NumPy. Nothing else is taken for one: `"no"` would be true.
      error: raised if it is something else.
    """
    # NumPy's by name: the console script's help does without NumPy.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise error(f"{argument(name)} must be True or False, got {shown(value)}.")
    return bool(value)


def positive_number(
    name: str, value: Any, *, most: float | None = None, error: type[BsjaxError]
) -> float:
    """`value` as a float.

    Args:
      name: as for `whole_number`.
      value: an int or a float.
      most: the largest valid value; None for any finite one.
      error: raised if it is not a number above 0, or out of bounds.
    """
    number = as_number(value)
    if not 0 < number < math.inf or (most is not None and number > most):
        bound = "" if most is None else f", at most {most:g}"
        raise error(f"{argument(name)} must be a number above 0{bound}, got {shown(value)}.")
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


def not_a_model(model: Any) -> str:
    """The error message for what is given in place of a loaded model."""
    hint = "Load a converted checkpoint with bsjax.load."
    if isinstance(model, str | os.PathLike):
        hint = f"Load it first: bsjax.load({os.fspath(model)!r})."
    return f"model must be what bsjax.load returns, got {type(model).__name__}. {hint}"


def is_failure(error: BaseException) -> bool:
    """Whether an error means that a library failed, rather than that the program is to end.

    A library written in Rust that fails raises PanicException, which is not an Exception.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


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


jax_in_use = False
_forked_from: int | None = None


def check_not_forked(error: type[BsjaxError]) -> None:
    """Refuses to compute in a process that was forked from one that had computed.

    The threads in which JAX computes exist in the parent only: a forked child would wait for them
    forever. A child that was forked before JAX was used, by bsjax or without it, may compute.

    Args:
      error: raised in such a child.
    """
    global jax_in_use
    if _forked_from is not None:
        raise error(
            f"This process was forked from process {_forked_from} after JAX had been used "
            "there, and JAX does not survive a fork. Start processes with "
            "multiprocessing.get_context('spawn'), or fork before loading the model and load it in "
            "the child."
        )
    jax_in_use = True


def _after_fork() -> None:
    """Remembers in a child whether its parent had used JAX. Called by Python."""
    global _forked_from
    # JAX has no public way to ask this, and must not be imported here: most programs that fork
    # have not used it.
    bridge: Any = sys.modules.get("jax._src.xla_bridge")
    started = getattr(bridge, "backends_are_initialized", None)
    if _forked_from is None and (jax_in_use or (started is not None and started())):
        _forked_from = os.getppid()


if hasattr(os, "register_at_fork"):  # Windows has no forks.
    os.register_at_fork(after_in_child=_after_fork)
