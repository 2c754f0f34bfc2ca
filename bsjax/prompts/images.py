"""Reads the images of messages: files, URLs, data URLs, base64, PIL images and arrays."""

import io
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import PIL.Image
from transformers.image_utils import load_image

IMAGE_FILE_KEYS = ("image", "url", "path", "image_url")
"""Keys of an image part whose value may be a file's name or a URL."""
IMAGE_KEYS = (*IMAGE_FILE_KEYS, "base64")
"""Keys of an image part that may hold its image."""

_DOWNLOAD_SECONDS = 60.0
_SHOWN_CHARACTERS = 80


def image_file(key: str, source: Any) -> Path | None:
    """The local file that an image is read from; None if it is a URL, data or an object.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
    """
    if key == "base64" or not isinstance(source, str | PathLike):
        return None
    text = str(source)
    if text.startswith("file://"):
        return Path(url2pathname(urlparse(text).path))
    if key != "path" and text.startswith(("http://", "https://", "data:")):
        return None
    # Under "image", long text that is not the name of a file is base64 data.
    if key == "image" and len(text) >= _SHOWN_CHARACTERS and not _is_file(text):
        return None
    return Path(text)


def read_image(key: str, source: Any) -> Any:
    """Reads an image into a form that transformers' image processors accept.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.

    Raises:
      Exception: the image cannot be read; decoders and HTTP clients raise many kinds of exceptions.
    """
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
        # Read completely first, because Pillow leaves the file open if its data is broken.
        return load_image(PIL.Image.open(io.BytesIO(Path(source).read_bytes())))
    if hasattr(source, "getexif"):
        return source
    return _read_array(source)


def shown_source(source: Any) -> str:
    """The image's path or URL, for an error message; empty for an image in memory."""
    if not isinstance(source, str | PathLike):
        return ""
    return f", {shortened(str(source), _SHOWN_CHARACTERS)!r}"


def shortened(text: str, characters: int) -> str:
    """The first `characters` of a text, so that messages do not contain base64 data."""
    return text if len(text) <= characters else f"{text[:characters]}..."


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # Base64 data is too long for a path.
        return False


def _read_array(source: Any) -> np.ndarray:
    if not hasattr(source, "__array__"):
        raise TypeError(
            f"a {type(source).__name__} is not an image. Give a PIL image, an array, a path or a "
            "URL."
        )
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size or not {array.shape[0], array.shape[-1]} & {1, 3, 4}:
        raise ValueError(
            f"an array of shape {array.shape} is not an image: it must be height x width, with 1, "
            "3 or 4 channels first or last."
        )
    if array.dtype.kind not in "iuf":
        raise ValueError(
            f"an array of type {array.dtype} is not an image: give values from 0 to 255."
        )
    if not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise ValueError("its values must be between 0 and 255.")
    if array.dtype.kind == "f" and 0 < array.max() <= 1:
        raise ValueError(
            "its values are between 0 and 1, but the checkpoint's image processor expects 0 to "
            "255: multiply by 255."
        )
    return array
