"""Chat messages of tests."""

from typing import Any


def asked(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one message: strings are text, everything else is an image."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in parts
    ]
    return [{"role": "user", "content": content}]
