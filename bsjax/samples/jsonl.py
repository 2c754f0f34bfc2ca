"""Samples in JSON Lines: one conversation per line."""

import itertools
import os
from pathlib import Path
from typing import Any

from bsjax.errors import SampleError
from bsjax.files import check_file, parse_json
from bsjax.prompts.images import IMAGE_FILE_KEYS, IMAGE_KEYS, image_file
from bsjax.samples.content import (
    PLACEHOLDER,
    check_sample,
    draw_indices,
    interleave,
    share_in_words,
)

# All samples are in memory at once, images in base64 included.
_LARGEST = 4 * 2**30

_FORM = (
    'Each line holds one sample: a list of chat messages, or {"messages": [...]} with them, and '
    'optionally "images" for the <image> placeholders in their texts, or for parts of type "image".'
)


def read_jsonl(
    path: Path, limit: int | None, seed: int
) -> tuple[list[list[dict[str, Any]]], str, tuple[str, ...]]:
    """Reads a file; see `bsjax.samples.read_samples`.

    Raises:
      SampleError: the file is empty, or a line is not a sample; the message gives the line number.
    """
    check_file(path, error=SampleError, limit=_LARGEST)
    lines = [
        (number, line)
        for number, line in enumerate(path.read_bytes().split(b"\n"), 1)
        if line.strip()
    ]
    if not lines:
        raise SampleError(f"{path} has no samples: it is empty. {_FORM}")
    parsed = [read_record(line, f"{path}, line {number}") for number, line in lines]
    samples, known = [], set()
    taken = draw_indices(len(parsed), limit, seed)
    for index in taken:
        where = f"{path}, line {lines[index][0]}"
        sample = conversation_of(parsed[index], where, path.parent)
        check_sample(sample, where, known)
        samples.append(sample)
    description = f"{path.name}: {share_in_words(len(taken), len(parsed), 'sample', seed)}"
    return samples, description, tuple(f"{path}, line {lines[index][0]}" for index in taken)


def read_record(line: bytes, where: str) -> Any:
    """The JSON of a line.

    Raises:
      SampleError: it is not JSON. The message begins with `where`.
    """
    try:
        return parse_json(line.decode("utf-8-sig"), where, error=SampleError)
    except UnicodeDecodeError as error:
        raise SampleError(f"{where} is not text in UTF-8 ({error.reason}). {_FORM}") from error
    except SampleError as error:
        hint = ""
        if line.strip() in (b"[", b"{"):
            hint = (
                " It looks like JSON over several lines. `jq -c '.[]'` writes the items of a list "
                "one per line."
            )
        raise SampleError(f"{error}{hint or ' ' + _FORM}") from error


def conversation_of(record: Any, where: str, folder: Path) -> list[dict[str, Any]]:
    """The messages of a line, with images put in their places and paths made absolute.

    Args:
      record: from `read_record`.
      where: where the line comes from, for error messages.
      folder: what paths of images are relative to.

    Raises:
      SampleError: the line is not a conversation.
    """
    images = None
    if isinstance(record, dict):
        if not isinstance(record.get("messages"), list):
            raise SampleError(f'{where} has no list under "messages". {_FORM}')
        images = record.get("images")
        record = record["messages"]
    if not isinstance(record, list) or not all(isinstance(message, dict) for message in record):
        raise SampleError(f"{where} is neither a list of messages nor an object. {_FORM}")
    if record and record[-1].get("role") == "assistant":
        record = record[:-1]
    if not record:
        raise SampleError(f"{where} has no messages before the answer. {_FORM}")
    if images is not None:
        record = _filled(record, images, where)
    return [
        {**message, "content": [_located(part, folder, where) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in record
    ]


def _filled(messages: list[dict[str, Any]], images: Any, where: str) -> list[dict[str, Any]]:
    """Puts a line's "images" at the placeholders of its texts (see `interleave`), or into parts of
    type "image" without an image.
    """
    if not isinstance(images, list):
        raise SampleError(f'{where}: "images" must be a list of paths or URLs.')
    parts: list[dict[str, Any]] = []
    for image in images:
        if not isinstance(image, str | dict):
            raise SampleError(f'{where}: "images" must be a list of paths or URLs, got {image!r}.')
        parts.append(
            {"type": "image", "image": image}
            if isinstance(image, str)
            else {**image, "type": "image"}
        )
    contents = [message.get("content") for message in messages]
    if any(isinstance(content, list) for content in contents):
        return _placed(messages, parts, where)
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) != len(contents):
        raise SampleError(
            f'{where} has "images", so the content of its messages must be text, or lists of parts.'
        )
    counts = [text.count(PLACEHOLDER) for text in texts]
    if not any(counts):
        users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
        if not users:
            raise SampleError(f'{where} has "images", but no message by the user to put them in.')
        counts[users[0]] = len(parts)
    if sum(counts) != len(parts):
        raise SampleError(
            f"{where} has {sum(counts)} {PLACEHOLDER} placeholders and {len(parts)} images: it "
            "must have one placeholder for each, or none."
        )
    filled, start = [], 0
    for message, text, count in zip(messages, texts, counts, strict=True):
        own = parts[start : start + count]
        filled.append({**message, "content": interleave(text, own) if own else text})
        start += count
    return filled


def _placed(
    messages: list[dict[str, Any]], images: list[dict[str, Any]], where: str
) -> list[dict[str, Any]]:
    """Puts images, in order, into the parts of type "image" without an image."""

    def is_empty(part: Any) -> bool:
        return (
            isinstance(part, dict)
            and part.get("type") == "image"
            and all(part.get(key) is None for key in IMAGE_KEYS)
        )

    lists = [message["content"] for message in messages if isinstance(message["content"], list)]
    empty = sum(map(is_empty, itertools.chain(*lists)))
    if empty != len(images):
        raise SampleError(
            f'{where} has {empty} parts of type "image" without an image and {len(images)} images '
            'under "images": it must have one part for each.'
        )
    left = iter(images)
    return [
        {
            **message,
            "content": [
                part | next(left) if is_empty(part) else part for part in message["content"]
            ],
        }
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _located(part: Any, folder: Path, where: str) -> Any:
    """A content part, in which the relative path of an image is joined to the file's folder."""
    if not isinstance(part, dict):
        return part
    located = dict(part)
    for key in IMAGE_FILE_KEYS:
        value = part.get(key)
        if isinstance(value, dict) and isinstance(value.get("url"), str):
            located[key] = {**value, "url": _absolute(key, value["url"], folder)}
        elif isinstance(value, str):
            located[key] = _absolute(key, value, folder)
        elif value is not None:
            raise SampleError(f"{where}: the image {value!r} is not a path, URL or base64 text.")
    return located


def _absolute(key: str, text: str, folder: Path) -> str:
    if text.startswith("file://"):
        return text
    path = os.path.abspath(folder / text)
    return path if os.path.isfile(path) or image_file(key, text) is not None else text
