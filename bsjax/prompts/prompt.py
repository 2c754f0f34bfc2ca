"""Chat messages to what a model reads: token ids, pixel values, and how many tokens each image has.

The template, the tokenizer and the image processor are the checkpoint's own, from transformers;
none of the three needs torch. What Hugging Face's processors add to them is done here and in the
family's `PromptRules`: the chat template writes one placeholder per image, the family says what
stands there instead, and image tokens are repeated until the image has all of its tokens.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse
from urllib.request import url2pathname

import jinja2
import numpy as np
import PIL.Image
from jaxtyping import Float32, Int32
from transformers.image_utils import load_image

from bsjax.errors import MessageError
from bsjax.models import FAMILIES
from bsjax.models.family import ProcessedImage, PromptRules

IMAGE_FILE_KEYS = ("image", "url", "path", "image_url")
"""What an image part may have a file's name under, or a URL."""
IMAGE_KEYS = (*IMAGE_FILE_KEYS, "base64")
"""What an image part may have its image under."""
_OPTION_KEYS = tuple(
    sorted({name for family in FAMILIES.values() for name in family.prompts.image_options})
)
_DOWNLOAD_SECONDS = 60.0
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Prompt:
    """A prompt in prompt order, on the host."""

    token_ids: Int32[np.ndarray, "tokens"]
    """Placeholders already repeated: every image token is in it."""
    pixel_values: Float32[np.ndarray, "patches patch_values"] | None
    """Patches of all images, one after the other; None without images."""
    grid_thw: Int32[np.ndarray, "images 3"]
    """Patches of each image along time, height and width."""
    image_tokens: tuple[int, ...]
    """Tokens of each image, in prompt order."""


class _ImageItem(NamedTuple):
    """One image of the messages, not read yet."""

    where: str
    key: str
    source: Any
    options: dict[str, Any]


def prepare_prompt(messages: Any, tokenizer: Any, image_processor: Any, config: Any) -> Prompt:
    """Turns one conversation into a prompt that ends where the assistant's answer begins.

    Computes what `apply_chat_template(..., add_generation_prompt=True, tokenize=True)` of the
    family's processor in transformers does for images and text.

    Args:
      messages: a list of dicts with `role` and `content`; `content` is a string, or a list of
        `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. An image is a PIL
        image, an array of 0-255 values (height x width, with channels first or last), a path, a
        URL, a data URL or base64; `"url"`, `"path"`, `"base64"` and OpenAI's `{"type": "image_url",
        "image_url": {"url": ...}}` are read as well. `"max_pixels"` and `"min_pixels"` beside an
        image bound the size it is scaled to (Qwen), `"do_pan_and_scan"` adds crops of it, which are
        images too (Gemma 3; with `"pan_and_scan_min_crop_size"`, `"pan_and_scan_max_num_crops"` and
        `"pan_and_scan_min_ratio_to_activate"` as in its processor). Images read from files are
        turned upright as their EXIF data says; PIL images are taken as they are. Both as in
        transformers.
      tokenizer: the checkpoint's tokenizer, with a chat template.
      image_processor: the checkpoint's image processor (PIL backend); None for a model that reads
        text only.
      config: the checkpoint's configuration, of a family in `bsjax.models.FAMILIES`.

    Raises:
      MessageError: no messages, messages of another form, an image that cannot be read, images for
        a model that reads text only, or other than one placeholder in the prompt for each image.
        The message says which image, and why.
    """
    rules = FAMILIES[config.model_type].prompts
    template_messages, items = _read_messages(messages)
    if items and image_processor is None:
        raise MessageError(
            f"The messages hold {len(items)} image{'s' * (len(items) > 1)}, and this model reads "
            "text only."
        )
    text = _render(template_messages, tokenizer)
    token_ids = _tokenize(text, tokenizer)
    _check_placeholders(token_ids, len(items), tokenizer, config, rules)
    if not items:
        return Prompt(token_ids, None, np.zeros((0, 3), np.int32), ())

    processed = []
    for number, item in enumerate(items):
        label = f"Image {number + 1} of {len(items)} ({item.where}{_shown_source(item.source)})"
        processed.append(_process_image(item, label, image_processor, config, rules))
    expanded = rules.expand(text, [len(of.image_tokens) for of in processed], tokenizer, config)
    if expanded != text:
        token_ids = _tokenize(expanded, tokenizer)
    image_tokens = np.concatenate([of.image_tokens for of in processed])
    repeats = np.ones(token_ids.size, np.int64)
    repeats[token_ids == rules.image_token_id(config)] = image_tokens
    return Prompt(
        np.repeat(token_ids, repeats),
        np.concatenate([of.pixel_values for of in processed]),
        np.concatenate([of.grid_thw for of in processed]).astype(np.int32),
        tuple(image_tokens.tolist()),
    )


def _tokenize(text: str, tokenizer: Any) -> Int32[np.ndarray, "tokens"]:
    return np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)


def _read_messages(messages: Any) -> tuple[list[dict[str, Any]], list[_ImageItem]]:
    """Splits messages into what the chat template needs to see and the images."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise MessageError(
            f"Messages must be a list of {{'role': ..., 'content': ...}}, got "
            f"{type(messages).__name__}."
        )
    if not messages:
        raise MessageError("The list of messages is empty: give at least one user message.")
    template_messages: list[dict[str, Any]] = []
    items: list[_ImageItem] = []
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
            raise MessageError(f"{where}['role'] must be text, got {message['role']!r}.")
        content = message["content"]
        if isinstance(content, list | tuple):
            parts = []
            for index, part in enumerate(content):
                for item in _read_part(part, f"{where}['content'][{index}]"):
                    if isinstance(item, _ImageItem):
                        items.append(item)
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
    return template_messages, items


def image_sources(messages: Any) -> list[tuple[str, Any]]:
    """The images of a conversation, in order, none of them read; checks the messages' form.

    Returns:
      For each image what it stands under ("image", "url", "path", "base64" or "image_url"), and
      what stands there.

    Raises:
      MessageError: no messages, or messages of another form than `prepare_prompt` takes.
    """
    return [(item.key, item.source) for item in _read_messages(messages)[1]]


def image_file(key: str, source: Any) -> Path | None:
    """The local file that an image is read from; None when it is a URL, data or an object."""
    if key == "base64" or not isinstance(source, str | PathLike):
        return None
    text = str(source)
    if text.startswith("file://"):
        return Path(url2pathname(urlparse(text).path))
    if key != "path" and text.startswith(("http://", "https://", "data:")):
        return None
    # Under "image", long text that names no file is base64 data.
    if key == "image" and len(text) >= _SHOWN_CHARACTERS and not _is_file(text):
        return None
    return Path(text)


def _read_part(part: Any, where: str) -> Iterator[_ImageItem | str]:
    """Reads one entry of a content list."""
    if isinstance(part, str):
        yield part
        return
    if not isinstance(part, Mapping):
        raise MessageError(f"{where} is a {type(part).__name__}: it must be a dict with a 'type'.")
    # Records that come from a table carry every column, None where it does not apply.
    part = {key: value for key, value in part.items() if value is not None}
    kind = part.pop("type", None)
    if kind == "text":
        text = part.pop("text", None)
        if not isinstance(text, str):
            raise MessageError(f"{where} is of type 'text' and needs a string under 'text'.")
        _refuse_unknown_keys(part, where, ("text",))
        yield text
    elif kind in ("image", "image_url"):
        yield _read_image_part(part, where)
    elif kind in ("video", "video_url"):
        raise MessageError(f"{where} is a video: bsjax reads text and images only.")
    else:
        raise MessageError(
            f"{where} has the type {kind!r}: bsjax knows 'text', 'image' and 'image_url'."
        )


def _read_image_part(part: dict[str, Any], where: str) -> _ImageItem:
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
    return _ImageItem(where, key, source, options)


def _refuse_unknown_keys(part: dict[str, Any], where: str, known: tuple[str, ...]) -> None:
    if part:
        raise MessageError(
            f"{where} has {', '.join(repr(key) for key in part)}, which bsjax does not know beside "
            f"{', '.join(known)}."
        )


def _render(template_messages: list[dict[str, Any]], tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        raise MessageError(
            "The checkpoint's tokenizer has no chat template, so messages cannot be turned into a "
            "prompt. Put the model's chat_template.jinja beside its tokenizer and convert again."
        )
    try:
        return tokenizer.apply_chat_template(
            template_messages, tokenize=False, add_generation_prompt=True
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise MessageError(
            f"The checkpoint's chat template cannot render these messages: {error}"
        ) from error


def _check_placeholders(
    token_ids: Int32[np.ndarray, "tokens"],
    images: int,
    tokenizer: Any,
    config: Any,
    rules: PromptRules,
) -> None:
    video_token_id = getattr(config, "video_token_id", None)
    if video_token_id is not None and np.any(token_ids == video_token_id):
        raise MessageError(
            f"The prompt holds the video token {tokenizer.decode([video_token_id])!r}: bsjax reads "
            "text and images only."
        )
    placeholder_id, image_token_id = rules.placeholder_id(config), rules.image_token_id(config)
    placeholders = int(np.count_nonzero(token_ids == placeholder_id))
    if image_token_id != placeholder_id and np.any(token_ids == image_token_id):
        raise MessageError(
            f"A text contains {tokenizer.decode([image_token_id])!r}, which stands for an image's "
            "tokens: leave it out."
        )
    if placeholders == images:
        return
    token = tokenizer.decode([placeholder_id])
    cause = (
        f"A text that contains {token!r} is the usual cause: leave it out, the chat template "
        "writes it."
        if placeholders > images
        else "The checkpoint's chat template leaves images out: do they stand in a user message?"
    )
    raise MessageError(
        f"The messages hold {images} image{'s' * (images != 1)}, but the prompt has {placeholders} "
        f"image placeholder{'s' * (placeholders != 1)}. {cause}"
    )


def _process_image(
    item: _ImageItem, label: str, image_processor: Any, config: Any, rules: PromptRules
) -> ProcessedImage:
    """Reads one image and cuts it into patches; one at a time, so that an error can name it."""
    try:
        image = _read_image(item.key, item.source)
        return rules.process_image(image, item.options, image_processor, config)
    except MessageError as error:
        raise MessageError(f"{label}: {error}") from error
    except Exception as error:  # Decoders and HTTP clients raise what they like.
        raise MessageError(f"{label} cannot be read: {_cut(str(error), 300)}") from error


def _read_image(key: str, source: Any) -> Any:
    """The image in a form that transformers' image processors take."""
    if key == "base64" and isinstance(source, str):
        return load_image(source)
    if isinstance(source, PathLike):
        source, key = str(source), "path"
    if isinstance(source, str):
        if source.startswith("file://"):
            source, key = url2pathname(urlparse(source).path), "path"
        if source.startswith(("http://", "https://")) and key != "path":
            return load_image(source, timeout=_DOWNLOAD_SECONDS)
        if source.startswith("data:") and key != "path":
            return load_image(source)
        if not _is_file(source):
            if key in ("url", "image_url"):
                raise ValueError("it is neither a URL nor a file that exists.")
            if key == "path" or len(source) < _SHOWN_CHARACTERS:
                raise ValueError("there is no such file.")
            return load_image(source)
        # Read at once: Pillow leaves the file open when its data is broken.
        return load_image(PIL.Image.open(io.BytesIO(Path(source).read_bytes())))
    if hasattr(source, "getexif"):
        return source
    return _read_array(source)


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # Base64 data is too long for a path.
        return False


def _read_array(source: Any) -> np.ndarray:
    if not hasattr(source, "__array__"):
        raise TypeError(
            f"a {type(source).__name__} is no image. Give a PIL image, an array, a path or a URL."
        )
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise ValueError(
            f"an array of shape {array.shape} is no image: it must be height x width, with 1, 3 or "
            "4 channels first or last."
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(f"an array of type {array.dtype} is no image: give values from 0 to 255.")
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise ValueError("its values must lie between 0 and 255.")
    if array.dtype.kind == "f" and 0 < array.max() <= 1:
        raise ValueError(
            "its values lie between 0 and 1, but the checkpoint's image processor takes 0 to 255: "
            "multiply by 255."
        )
    return array


def _shown_source(source: Any) -> str:
    """The image's path or URL, for an error message."""
    if not isinstance(source, str | PathLike):
        return ""
    return f", {_cut(str(source), _SHOWN_CHARACTERS)!r}"


def _cut(text: str, characters: int) -> str:
    """Keeps base64 data out of messages."""
    return text if len(text) <= characters else f"{text[:characters]}..."
