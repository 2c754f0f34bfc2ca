"""Damaged JSON documents, and other tools that fuzzers share.

The suite runs a few hundred examples of each fuzzer. This is the long run, without the suite's
limit on the time of a test and without its checks of annotations:

    FUZZ_EXAMPLES=10000 pytest tests -k fuzz -o addopts= -o faulthandler_timeout=0
"""

import copy
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from bsjax.errors import BsjaxError

LONG = "FUZZ_EXAMPLES" in os.environ
"""Whether this is the long run."""

FUZZ = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")))
"""Decorates a fuzzer."""

ODD_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**9, -(10**9), 2**31, 2**63, 2**64, 10**30, 0.5, 1e-300, 1e308, -1.0]),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "x", "1", "\n", "\ud800", "\0", "../..", "é" * 300]),
    st.lists(st.integers(-1, 2), max_size=3),
    st.dictionaries(st.sampled_from(["", "a", "dtype"]), st.integers(-1, 1), max_size=2),
    st.integers(1, 400).map(lambda depth: _nested(depth)),
)
"""JSON values that a field was not made for."""


def _nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside nested dictionaries and lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*path, key)
        yield from places(item, (*path, key))


@st.composite
def damaged(draw: Callable, document: Any, values: st.SearchStrategy = ODD_VALUES) -> str:
    """A document as JSON text, with a few values replaced, removed, added or repeated."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        all_places = list(places(document))
        if not all_places:
            break
        *path, last = draw(st.sampled_from(all_places))
        parent = document
        for key in path:
            parent = parent[key]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "repeat"])):
            case "replace":
                parent[last] = draw(values)
            case "remove":
                del parent[last]
            case "add" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["", "x", "\n", "dtype", "\ud800"]))] = draw(values)
            case "repeat" if isinstance(parent, list):
                parent += parent * draw(st.integers(1, 3))
    text = json.dumps(document)
    if draw(st.integers(0, 9)) == 0 and text:
        # Damage to the text itself, not to a value.
        start = draw(st.integers(0, len(text) - 1))
        length = draw(st.integers(0, 8))
        middle = draw(st.sampled_from(["", "{", "]", '"', ",", "NaN", "\0", "[" * 2000]))
        text = text[:start] + middle + text[start + length :]
    return text


def check_message(error: BsjaxError) -> None:
    """Asserts that the message is one printable line, neither empty nor very long."""
    text = str(error)
    assert text.strip() and text.isprintable() and len(text) < 3000, repr(text)
