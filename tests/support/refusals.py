"""Asserts that bad arguments are refused with a one-line error."""

from collections.abc import Callable
from typing import Any

import pytest

from bsjax import BsjaxError

HUGE = 10**5000
"""Python refuses to write an integer with so many digits."""


def refused(function: Callable[[], Any], error: type[BsjaxError], words: str) -> None:
    """Asserts that `function` raises exactly `error`, with one line that contains `words`."""
    with pytest.raises(BsjaxError) as caught:
        function()
    assert type(caught.value) is error
    assert words in str(caught.value) and "\n" not in str(caught.value)
