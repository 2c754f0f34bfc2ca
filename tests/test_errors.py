"""Whatever a message holds, it is one line that is not long."""

import pytest

from bsjax.errors import BsjaxError


@pytest.mark.parametrize(
    "text",
    ["x" * 10**6, "\0" * 2000, "\0" * 10**6, "\ud800\U0010ffff" * 999, "a\n" * 5000, " \n" * 5000],
    ids=["printable", "short", "long", "escapes of ten", "lines", "spaces"],
)
def test_messages_are_short_lines(text):
    line = str(BsjaxError(f"first {text} last"))
    assert line.startswith("first ") and line.endswith(" last")
    assert len(line) < 2100 and line.isprintable()


def test_short_messages_are_as_they_were():
    assert str(BsjaxError("two  spaces")) == "two  spaces"
    assert str(BsjaxError("two\nlines\t\x07 \u00fc")) == "two lines \\x07 \u00fc"
