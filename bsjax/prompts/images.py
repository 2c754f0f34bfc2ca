"""Reads the images of messages: files, URLs, data URLs, base64, PIL images and arrays.

Images are read in such a way that the image processor computes the same pixels from them as it does
in transformers. Images whose values are ambiguous are rejected with the reason.
"""

import base64
import binascii
import contextlib
import io
import math
import mmap
import os
import re
import threading
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlparse
from urllib.request import url2pathname

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps
from transformers.image_transforms import convert_to_rgb

from bsjax.errors import MessageError
from bsjax.files import check_file
from bsjax.models.pixels import image_size
from bsjax.prompts.downloads import download
from bsjax.prompts.sources import DEFAULT_SOURCES, ImageSources

IMAGE_FILE_KEYS = ("image", "url", "path", "image_url")
"""Keys of an image part whose value may be a file's name or a URL."""
IMAGE_KEYS = (*IMAGE_FILE_KEYS, "base64")
"""Keys of an image part that may hold its image."""

_NO_URLS = "URLs are not allowed here (allow_urls)."
_LONGEST_NAME = 80
# Decoders spend time on every row, however short: 80 million rows of one pixel take 10 seconds.
_LONGEST_SIDE = 2**20
# A JPEG file may pass over its pixels any number of times, in a few bytes each: thousands of passes
# over a large image take minutes. Encoders write about ten. For the largest image that is read by
# default, a hundred take 7 seconds.
_MOST_SCANS = 100
# Markers may have any number of \xff before them: only the last one is looked for, because a search
# for all of them takes the square of their number.
_JPEG_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])", re.DOTALL)
_loading = threading.Lock()
# Formats whose header says the size of the pixels, and how they are to be turned.
_SIZE_IN_HEADER = ("JPEG", "MPO", "PNG", "WEBP")
# EXIF orientations that exchange height and width.
_TURNED = (5, 6, 7, 8)
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
_BASE64 = re.compile(r"[A-Za-z0-9+/=\s]+")
_SHOWN_CHARACTERS = 200


def image_file(key: str, source: Any) -> Path | None:
    """The local file that an image is read from; None if it is a URL, data or an object.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
    """
    if key == "base64" or not isinstance(source, str | PathLike):
        return None
    text = os.fsdecode(source)
    if _scheme(text) == "file":
        return Path(url2pathname(urlparse(text).path))
    if key != "path" and _scheme(text) in ("http", "https", "data"):
        return None
    # Under "image", long text that is not the name of a file is base64 data.
    if key == "image" and _may_be_data(text) and not _is_file(text):
        return None
    return Path(text)


@contextlib.contextmanager
def opened_image(
    source: Path | bytes, max_source_pixels: int = DEFAULT_SOURCES.max_source_pixels
) -> Iterator[PIL.Image.Image]:
    """Opens an image, reading no more than its header, and checks its size.

    Args:
      source: an ordinary file, or the bytes of one.
      max_source_pixels: the most pixels.

    Raises:
      MessageError: the file is not an ordinary one, or the image has no pixels or too many.
      Exception: it is not an image; decoders raise many kinds of exceptions.
    """
    stream: io.BytesIO | io.BufferedReader
    if isinstance(source, Path):
        check_file(source, error=MessageError)
        stream = source.open("rb")
    else:
        stream = io.BytesIO(source)
    with stream:
        try:
            image = PIL.Image.open(stream)
        except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning) as error:
            reason = "it has more pixels than Pillow reads (PIL.Image.MAX_IMAGE_PIXELS)"
            raise MessageError(_too_large(reason, max_source_pixels)) from error
        except PIL.UnidentifiedImageError as error:
            raise MessageError("cannot identify image file: its format is not known.") from error
        if image.format == "EPS":
            raise MessageError("it is a program in PostScript, not an image with pixels.")
        _check_pixels(image.width, image.height, max_source_pixels)
        if image.format in ("JPEG", "MPO"):
            _check_scans(stream)
        yield image


def read_image(key: str, source: Any, sources: ImageSources) -> PIL.Image.Image | np.ndarray:
    """Reads an image into a form that transformers' image processors accept.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
      sources: which sources are allowed, and limits.

    Returns:
      A PIL image, or an array with its channels first.

    Raises:
      MessageError: the source is not allowed, exceeds a limit, or is ambiguous.
      Exception: the image cannot be read; decoders and connections raise many kinds of exceptions.
    """
    if isinstance(source, str | PathLike):
        return read_encoded(_located(key, source, sources), sources)
    if key in ("base64", "path"):
        what = "base64 text" if key == "base64" else "the path of a file"
        raise MessageError(f"'{key}' holds a {type(source).__name__} and not {what}.")
    if isinstance(source, PIL.Image.Image):
        _check_pixels(source.width, source.height, sources.max_source_pixels)
        _load(source)
        _check_mode(source)
        return source
    return _read_array(source, sources)


def encoded_content(key: str, source: Any, sources: ImageSources) -> bytes | None:
    """The bytes of an encoded image: of a file, a data URL or base64 text.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
      sources: which sources are allowed, and limits.

    Returns:
      None for an image in memory, for one that would be downloaded, and for a file with more than
      `max_bytes`, of which decoders may need a part only.

    Raises:
      MessageError: the source is not allowed, or exceeds a limit.
      OSError: the file cannot be read.
    """
    if not isinstance(source, str | PathLike) or _is_download(key, source):
        return None
    located = _located(key, source, sources)
    if isinstance(located, bytes):
        return located
    check_file(located, error=MessageError)
    if located.stat().st_size > sources.max_bytes:
        return None
    return located.read_bytes()


def check_image(
    key: str, source: Any, sources: ImageSources, *, decode: bool
) -> tuple[int, int] | None:
    """Finds what is wrong with an image without downloading it.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
      sources: which sources are allowed, and limits.
      decode: whether an encoded image is decoded, rather than only its header read.

    Returns:
      Height and width; None if only a download would tell.

    Raises:
      Exception: as for `read_image`.
    """
    if isinstance(source, str | PathLike) and _is_download(key, source):
        if not sources.allow_urls:
            raise MessageError(_NO_URLS)
        return None
    if decode or not isinstance(source, str | PathLike):
        return image_size(read_image(key, source, sources))
    with opened_image(_located(key, source, sources), sources.max_source_pixels) as image:
        return image.height, image.width


def size_before_reading(key: str, source: Any, sources: ImageSources) -> tuple[int, int] | None:
    """Height and width that `read_image` will give an image, found without decoding it.

    Args:
      key: one of `IMAGE_KEYS`.
      source: the value of that key.
      sources: which sources are allowed, and limits.

    Returns:
      None if only decoding the image or downloading it would tell.

    Raises:
      Exception: as for `read_image`.
    """
    if isinstance(source, PIL.Image.Image) and key not in ("base64", "path"):
        _check_pixels(source.width, source.height, sources.max_source_pixels)
        if source.format is not None and source.format not in _SIZE_IN_HEADER:
            _load(source)
            _check_pixels(source.width, source.height, sources.max_source_pixels)
        return source.height, source.width
    if not isinstance(source, str | PathLike):
        return image_size(read_image(key, source, sources))
    if _is_download(key, source):
        return None
    with opened_image(_located(key, source, sources), sources.max_source_pixels) as image:
        if image.format not in _SIZE_IN_HEADER or (
            image.format == "PNG" and _has_late_metadata(image)
        ):
            return None
        # A PNG file's own method decodes the image to look for what may follow it.
        orientation = PIL.Image.Image.getexif(image).get(PIL.ExifTags.Base.Orientation)
        is_turned = orientation in _TURNED
        return (image.width, image.height) if is_turned else (image.height, image.width)


def shown_source(source: Any) -> str:
    """The image's path or URL, for an error message; empty for an image in memory."""
    if not isinstance(source, str | PathLike):
        return ""
    return f", {shortened(os.fsdecode(source), _SHOWN_CHARACTERS)!r}"


def shortened(text: str, characters: int) -> str:
    """The first `characters` of a text, so that messages do not contain base64 data."""
    return text if len(text) <= characters else f"{text[:characters]}..."


def _scheme(text: str) -> str:
    """The scheme of a URL that bsjax knows, in lower case; empty for other text."""
    scheme, colon, rest = text[:10].partition(":")
    scheme = scheme.lower()
    if colon and (scheme == "data" or (scheme in ("http", "https", "file") and rest[:2] == "//")):
        return scheme
    return ""


def _is_download(key: str, source: str | PathLike[Any]) -> bool:
    return (
        key not in ("path", "base64")
        and isinstance(source, str)
        and _scheme(source) in ("http", "https")
    )


def _may_be_data(text: str) -> bool:
    return len(text) >= _LONGEST_NAME and _BASE64.fullmatch(text) is not None


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except (OSError, ValueError):  # Base64 data is too long for a path.
        return False


def _located(key: str, source: str | PathLike[Any], sources: ImageSources) -> Path | bytes:
    """The file that holds an encoded image, or its bytes."""
    text = os.fsdecode(source)
    scheme = "file" if isinstance(source, PathLike) else _scheme(text)
    if key == "base64":
        if isinstance(source, PathLike):
            raise MessageError("'base64' holds a path and not base64 text.")
        return _decoded(text, sources)
    if key != "path" and scheme == "data":
        _, comma, data = text.partition(",")
        if not comma:
            raise MessageError("a data URL has a comma before its data, and this one has none.")
        return _decoded(data, sources)
    if _is_download(key, source):
        if not sources.allow_urls:
            raise MessageError(_NO_URLS)
        return download(text, sources)
    # Where files are not allowed, no message may reveal whether one exists.
    may_be_data = key == "image" and not scheme and _may_be_data(text)
    if not sources.allow_files:
        if may_be_data:
            with contextlib.suppress(MessageError):
                return _decoded(text, sources)
        raise MessageError("files are not allowed here (allow_files).")
    path = Path(text) if isinstance(source, PathLike) else image_file(key, text)
    if path is None:
        return _decoded(text, sources)
    if not os.path.lexists(path) or path.is_dir():
        if key in ("url", "image_url"):
            raise MessageError("it is neither a URL nor a file that exists.")
        raise MessageError("there is no such file.")
    return path


def _decoded(text: str, sources: ImageSources) -> bytes:
    if len(text) * 3 // 4 > sources.max_bytes:
        raise MessageError(f"its data has more than {sources.max_bytes:,} bytes (max_bytes).")
    try:
        # transformers leaves out every character that is not base64's, and so makes another image
        # of escapes (%2B) and of the alphabet for URLs. Only line breaks and spaces mean nothing.
        return base64.b64decode(text.encode().translate(None, b" \t\r\n\f\v"), validate=True)
    except (binascii.Error, UnicodeError) as error:
        raise MessageError(f"it is not base64 data: {error}.") from error


def read_encoded(source: Path | bytes, sources: ImageSources) -> PIL.Image.Image | np.ndarray:
    """The pixels of an encoded image as transformers' `load_image` gives them.

    Args:
      source: an ordinary file, or the bytes of one.
      sources: limits.

    Raises:
      MessageError: the image exceeds a limit, or is ambiguous.
      Exception: it cannot be decoded; decoders raise many kinds of exceptions.
    """
    with opened_image(source, sources.max_source_pixels) as image:
        image.load()
        # An icon may hold an image of another size than its header says.
        _check_pixels(image.width, image.height, sources.max_source_pixels)
        _check_mode(image)
        PIL.ImageOps.exif_transpose(image, in_place=True)
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        if image.has_transparency_data:
            as_file = np.asarray(convert_to_rgb(pixels, return_numpy=True))
            as_object = np.asarray(convert_to_rgb(image, return_numpy=True))
            if not np.array_equal(as_file, as_object):
                raise MessageError(
                    "it has transparent pixels, which transformers shows differently in a file "
                    "(their hidden colours) and in a PIL image (white). Say which: give "
                    "PIL.Image.open(path), or that converted to RGB."
                )
            return np.moveaxis(as_file, -1, 0)
        return pixels


def _load(image: PIL.Image.Image) -> None:
    """Decodes an image whose file is only open; two threads must not do so at a time."""
    with _loading:
        image.load()


def _has_late_metadata(image: Any) -> bool:
    """Whether a PNG file has metadata behind its pixels, which may turn the image."""
    stream = image.fp
    before = stream.tell()
    stream.seek(len(_PNG_SIGNATURE))
    after_pixels = False
    try:
        while len(start := stream.read(8)) == 8:
            length, kind = int.from_bytes(start[:4], "big"), start[4:]
            after_pixels |= kind == b"IDAT"
            if after_pixels and kind in _PNG_METADATA:
                return True
            stream.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        stream.seek(before)


def _check_pixels(width: int, height: int, most: int) -> None:
    if not width or not height:
        raise MessageError(f"it has no pixels: it is {width} x {height}.")
    if max(width, height) > _LONGEST_SIDE:
        raise MessageError(
            f"it has {width} x {height} pixels: more than {_LONGEST_SIDE:,} on a side."
        )
    if width * height > most:
        raise MessageError(_too_large(f"it has {width} x {height} pixels", most))


def _check_scans(stream: io.BytesIO | io.BufferedReader) -> None:
    """Rejects a JPEG file with more scans (passes over its pixels) than any encoder writes."""
    before = stream.tell()
    scans, position = 0, 0
    with _content(stream) as content:
        while scans <= _MOST_SCANS and (marker := _JPEG_MARKER.search(content, position)):
            kind, position = marker[1], marker.end()
            if kind == b"\xd9":  # The end; what follows is not decoded.
                break
            if kind not in (b"\xd8", b"\x01"):  # All others start with their length.
                scans += kind == b"\xda"
                position += int.from_bytes(content[position : position + 2], "big")
    stream.seek(before)
    if scans > _MOST_SCANS:
        raise MessageError(
            f"it has more than {_MOST_SCANS} scans, which take too long to decode: save it again."
        )


@contextlib.contextmanager
def _content(stream: io.BytesIO | io.BufferedReader) -> Iterator[Any]:
    """The bytes of a stream, of which only those that are looked at are read."""
    if isinstance(stream, io.BytesIO):
        yield stream.getvalue()
        return
    with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _too_large(what: str, most: int) -> str:
    return f"{what}: more than {most:,} (max_source_pixels). Scale it down first."


def _check_mode(image: PIL.Image.Image) -> None:
    """Rejects images that the conversion to RGB would clip at 255, or that are ambiguous."""
    if image.mode.startswith("I;16"):
        raise MessageError(
            f"its values have 16 bits (mode {image.mode}), and transformers would make white of "
            "everything above 255. Scale them to 0 to 255, as an array of uint8, first."
        )
    if image.mode in ("I", "F"):
        _check_values(np.asarray(image))


def _read_array(source: Any, sources: ImageSources) -> np.ndarray:
    if not hasattr(source, "__array__"):
        raise MessageError(
            f"a {type(source).__name__} is not an image. Give a PIL image, an array, a path or a "
            "URL."
        )
    array = np.asarray(source)
    if array.ndim == 2:
        array = array[None]
    elif array.ndim == 3:
        first, last = (array.shape[axis] in (1, 3, 4) for axis in (0, -1))
        if first and last and array.size:
            raise MessageError(
                f"an array of shape {array.shape} can be read with its channels first or last. "
                "Give a PIL image: PIL.Image.fromarray takes channels last."
            )
        if last:
            array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or not array.size or array.shape[0] not in (1, 3, 4):
        raise MessageError(
            f"an array of shape {np.shape(source)} is not an image: it must be height x width, "
            "with 1, 3 or 4 channels first or last."
        )
    _check_pixels(array.shape[2], array.shape[1], sources.max_source_pixels)
    if array.dtype.kind not in "iuf":
        raise MessageError(
            f"an array of type {array.dtype} is not an image: give values from 0 to 255."
        )
    _check_values(array)
    return array


def _check_values(array: np.ndarray) -> None:
    if array.dtype == np.uint8:
        return
    low, high = float(array.min()), float(array.max())
    if not math.isfinite(low) or not math.isfinite(high) or low < 0 or high > 255:
        raise MessageError(
            f"its values must be between 0 and 255, and they are between {low:g} and {high:g}."
        )
    if array.dtype.kind == "f" and 0 < high <= 1:
        raise MessageError(
            "its values are between 0 and 1, but the checkpoint's image processor expects 0 to "
            "255: multiply by 255."
        )
    if array.dtype.kind == "f" and not np.array_equal(array, np.trunc(array)):
        raise MessageError(
            "its values are not whole, and would be cut off to whole ones: round them to uint8."
        )
