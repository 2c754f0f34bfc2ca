"""Reads chat messages: checks their form and separates images from what the template needs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bsjax.checks import shown
from bsjax.errors import MessageError
from bsjax.files import JSON_DEPTH
from bsjax.models import FAMILIES
from bsjax.prompts.images import IMAGE_KEYS

_OPTION_KEYS = tuple(
    sorted({name for family in FAMILIES.values() for name in family.image_options})
)

Messages = Sequence[Mapping[str, Any]]
"""One conversation: Hugging Face chat messages."""

MAX_CHARACTERS = 1_000_000
"""Most characters of text in the messages of a conversation: more than any model reads. Tokenizers
take up to 5 seconds for that many."""

MAX_VALUES = 100_000
"""Most values in the messages of a conversation: texts, numbers, lists and so on."""


class ImagePart(NamedTuple):
    """An image of the messages, not read yet."""

    where: str
    """Its place in the messages, for error messages."""
    key: str
    """One of `IMAGE_KEYS`."""
    source: Any
    """The value of that key: a path, a URL, data, or the image itself."""
    options: dict[str, Any]
    """Options for the family's image processing."""


def read_messages(messages: Any) -> tuple[list[dict[str, Any]], list[ImagePart]]:
    """Separates messages into what the chat template needs and the images, in order.

    Raises:
      MessageError: there are no messages, or one has an invalid form; says which message, and why.
    """
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise MessageError(
            f"Messages must be a list of {{'role': ..., 'content': ...}}, got "
            f"{type(messages).__name__}."
        )
    if not messages:
        raise MessageError("The list of messages is empty: give at least one user message.")
    template_messages: list[dict[str, Any]] = []
    images: list[ImagePart] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, Mapping):
            raise MessageError(
                f"{where} is a {type(message).__name__}: each message must be a dict with 'role' "
                "and 'content'."
            )
        missing = [key for key in ("role", "content") if key not in message]
        if missing:
            raise MessageError(f"{where} has no {' and no '.join(map(repr, missing))}.")
        if not isinstance(message["role"], str):
            raise MessageError(f"{where}['role'] must be text, got {shown(message['role'])}.")
        content = message["content"]
        if isinstance(content, list | tuple):
            parts = []
            for index, part in enumerate(content):
                for item in _read_part(part, f"{where}['content'][{index}]"):
                    if isinstance(item, ImagePart):
                        images.append(item)
                        parts.append({"type": "image"})
                    else:
                        parts.append({"type": "text", "text": item})
            content = parts
        elif not isinstance(content, str):
            raise MessageError(
                f"{where}['content'] is a {type(content).__name__}: it must be a string or a list "
                "of text and image parts."
            )
        template_messages.append({**message, "content": content})
    _check_values(template_messages)
    return template_messages, images


def check_answer(messages: list[dict[str, Any]]) -> None:
    """Checks that the last message is an answer of the assistant that can be continued or scored.

    Args:
      messages: from `read_messages`.

    Raises:
      MessageError: the last message is not the assistant's, does not end with text, or has none.
    """
    where, message = f"messages[{len(messages) - 1}]", messages[-1]
    if message["role"] != "assistant":
        raise MessageError(
            f"{where}, the last message, has the role {shown(message['role'])}, but only one of "
            "the role 'assistant' can be continued or scored."
        )
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if parts and parts[-1]["type"] != "text":
        raise MessageError(
            f"{where} ends with an image: an answer that is continued or scored ends with text."
        )
    if not any(part["type"] == "text" and part["text"].strip() for part in parts):
        raise MessageError(f"{where} is to be continued or scored, but holds no text.")


def _check_values(messages: list[dict[str, Any]]) -> None:
    """Rejects text that is not valid Unicode, and values that are too long, too deep or cyclic."""
    left: list[tuple[Any, str, int]] = [
        (message, f"messages[{number}]", 0) for number, message in enumerate(messages)
    ]
    values = characters = 0
    while left:
        value, where, depth = left.pop()
        values += 1
        if isinstance(value, str):
            characters += len(value)
            try:
                value.encode()
            except UnicodeEncodeError as error:
                half = ascii(value[error.start])
                raise MessageError(
                    f"{where} holds {half}, half of a surrogate pair, which is not a character: "
                    "decode the text again from its bytes, or leave it out."
                ) from None
        elif isinstance(value, Mapping | list | tuple):
            if depth == JSON_DEPTH:
                raise MessageError(
                    f"{where} is nested deeper than {JSON_DEPTH} levels, or contains itself."
                )
            inside = [*value, *value.values()] if isinstance(value, Mapping) else value
            left += [(each, where, depth + 1) for each in inside]
        if values + len(left) > MAX_VALUES or characters > MAX_CHARACTERS:
            raise MessageError(
                f"The messages are too long: more than {MAX_CHARACTERS:,} characters of text, or "
                f"{MAX_VALUES:,} values."
            )


def _read_part(part: Any, where: str) -> Iterator[ImagePart | str]:
    """Reads one entry of a content list."""
    if isinstance(part, str):
        yield part
        return
    if not isinstance(part, Mapping):
        raise MessageError(f"{where} is a {type(part).__name__}: it must be a dict with a 'type'.")
    # Records from a table have every column, with None where it does not apply.
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.pop("type", None)
    # Comparing an array with a string gives neither true nor false.
    name = kind if isinstance(kind, str) else ""
    if name == "text":
        text = part.pop("text", None)
        if not isinstance(text, str):
            raise MessageError(f"{where} is of type 'text' and needs a string under 'text'.")
        _refuse_unknown_keys(part, where, ("text",))
        yield text
    elif name in ("image", "image_url"):
        yield _read_image_part(part, where)
    elif name in ("video", "video_url"):
        raise MessageError(f"{where} is a video: bsjax reads text and images only.")
    else:
        raise MessageError(
            f"{where} has the type {shown(kind)}: supported are 'text', 'image' and 'image_url'."
        )


def _read_image_part(part: dict[str, Any], where: str) -> ImagePart:
    keys = [key for key in IMAGE_KEYS if key in part]
    if not keys:
        raise MessageError(
            f"{where} is an image part without an image: give it under 'image' (PIL image, array, "
            "path or URL), 'url', 'path' or 'base64'."
        )
    if len(keys) > 1:
        raise MessageError(f"{where} names its image more than once: {', '.join(keys)}.")
    key = keys[0]
    source = part.pop(key)
    if isinstance(source, Mapping):
        source = source.get("url")
        if source is None:
            raise MessageError(f"{where}[{key!r}] is a dict without 'url'.")
    options = {name: part.pop(name) for name in _OPTION_KEYS if name in part}
    _refuse_unknown_keys(part, where, IMAGE_KEYS + _OPTION_KEYS)
    return ImagePart(where, key, source, options)


def _refuse_unknown_keys(part: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    if part:
        raise MessageError(
            f"{where} has the unknown key{'s' * (len(part) > 1)} "
            f"{', '.join(shown(key) for key in part)}; known are {', '.join(known)}."
        )
