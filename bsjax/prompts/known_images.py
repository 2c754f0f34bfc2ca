"""Digests of images that come again: found from their sources, without decoding or scaling them.

    source -> content -> pixels of the prompt -> digest of the pixels
              digest of the content -----------> the same, if it has been computed before

The content is a file's bytes, or the pixels of an image in memory, and it is read in every call: a
file that was replaced or an array that was changed has other content, whatever its name, size or
time. What is downloaded is downloaded again, and decoded.
"""

import hashlib
import threading
from collections import OrderedDict
from os import PathLike
from typing import Any

import numpy as np
import PIL.Image
from typing_extensions import override

from bsjax.prompts.images import encoded_content, read_encoded, read_image
from bsjax.prompts.messages import ImagePart
from bsjax.prompts.sources import ImageSources

_MOST_KNOWN = 2**14
# Modes whose pixels are all that there is, unlike those with palettes.
_PLAIN_MODES = ("RGB", "L")


class KnownImages:
    """Digests of pixels by the digest of the content that they were made from.

    The least recently used of many are forgotten.
    """

    def __init__(self) -> None:
        self._digests: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, content: str | None, index: int) -> str | None:
        """The digest of the pixels of an image or a crop; None if it is not known.

        Args:
          content: from `ImageContent.digest`.
          index: 0 for the image, and the number of a crop.
        """
        if content is None:
            return None
        with self._lock:
            digest = self._digests.get((content, index))
            if digest is not None:
                self._digests.move_to_end((content, index))
            return digest

    def put(self, content: str | None, index: int, digest: str) -> None:
        """Keeps a digest. The arguments are those of `get`, and what it is to return."""
        if content is None:
            return
        with self._lock:
            self._digests[content, index] = digest
            while len(self._digests) > _MOST_KNOWN:
                self._digests.popitem(last=False)


class ContentDigests(KnownImages):
    """Digests of what images are read from, in place of those of their pixels.

    Processes that share a model read only some of the images of a prompt, and must agree on which
    ones they have had before.
    """

    @override
    def get(self, content: str | None, index: int) -> str | None:
        if content is None:
            return None
        return hashlib.sha256(f"{content} {index}".encode()).hexdigest()

    @override
    def put(self, content: str | None, index: int, digest: str) -> None:
        """Keeps nothing: `get` needs nothing."""


class ImageContent:
    """What an image of the messages is read from, as it is in one call.

    Encoded images are read once, so that digest and pixels are of the same bytes.

    Args:
      image: the image.
      sources: which sources are allowed, and limits.
    """

    def __init__(self, image: ImagePart, sources: ImageSources) -> None:
        self._image, self._sources = image, sources
        self._lock = threading.Lock()
        self._encoded: bytes | None = None
        self._is_read = False

    def pixels(self) -> PIL.Image.Image | np.ndarray:
        """What `read_image` returns.

        Raises:
          Exception: as for `read_image`.
        """
        encoded = self._encoded_once()
        if encoded is not None:
            return read_encoded(encoded, self._sources)
        return read_image(self._image.key, self._image.source, self._sources)

    def digest(self) -> str | None:
        """SHA-256 of the content and of the image's options.

        None if there is none that says what the pixels are: for downloads, very large files, images
        in memory with palettes or transparency, and whatever cannot be read, which reading the
        pixels reports.
        """
        key, source, options = self._image.key, self._image.source, self._image.options
        digest = hashlib.sha256(repr(sorted(options.items())).encode())
        try:
            encoded = self._encoded_once()
            if encoded is not None:
                described, content = "encoded", encoded
            elif isinstance(source, str | PathLike):
                return None
            else:
                described, content = _in_memory(read_image(key, source, self._sources))
        except Exception:  # Decoders raise many kinds of exceptions.
            return None
        if content is None:
            return None
        digest.update(described.encode())
        digest.update(content)
        return digest.hexdigest()

    def _encoded_once(self) -> bytes | None:
        with self._lock:
            if not self._is_read:
                key, source = self._image.key, self._image.source
                self._encoded = encoded_content(key, source, self._sources)
                self._is_read = True
            return self._encoded


def _in_memory(image: PIL.Image.Image | np.ndarray) -> tuple[str, Any]:
    """What an image in memory is, and its bytes; None if its pixels are not all that matters."""
    if isinstance(image, np.ndarray):
        return f"array {image.dtype.str} {image.shape}", np.ascontiguousarray(image).data
    if image.mode not in _PLAIN_MODES or image.has_transparency_data:
        return "", None
    return f"image {image.mode} {image.size}", image.tobytes()
