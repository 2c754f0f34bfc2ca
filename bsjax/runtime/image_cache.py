"""Features of images that have been encoded, for images that come again."""

import threading
import weakref
from collections import OrderedDict

import numpy as np
from jaxtyping import Float

from bsjax.checkpoint.loading import LoadedModel
from bsjax.prompts.prompt import PromptImage

Features = Float[np.ndarray, "tokens hidden"]

DEFAULT_BYTES = 2**28
"""What a session keeps: 36 images of 1,000 tokens of a 7B model in bfloat16."""


class ImageCache:
    """Features by the digest of an image's pixels, in the host's memory.

    What does not fit is dropped, least recently used first.

    Attributes:
      most_bytes: the most bytes of all features.
      bytes: those of the features that are kept.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.bytes = most_bytes, 0
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Drops all features."""
        with self._lock:
            self._kept.clear()
            self.bytes = 0

    def get(self, image: PromptImage) -> Features | None:
        """The features of an image; None if they are not kept. Waits for its pixels."""
        digest = image.digest
        with self._lock:
            if digest not in self._kept:
                return None
            self._kept.move_to_end(digest)
            return self._kept[digest]

    def put(self, image: PromptImage, features: Features) -> None:
        """Keeps the features of an image."""
        digest = image.digest
        with self._lock:
            if digest in self._kept or features.nbytes > self.most_bytes:
                return
            self._kept[digest] = features
            self.bytes += features.nbytes
            while self.bytes > self.most_bytes:
                _, dropped = self._kept.popitem(last=False)
                self.bytes -= dropped.nbytes


_caches: "weakref.WeakKeyDictionary[LoadedModel, ImageCache]" = weakref.WeakKeyDictionary()


def image_cache_of(model: LoadedModel) -> ImageCache | None:
    """What all calls of a model share; None if it was loaded without `image_cache_bytes`."""
    if not model.image_cache_bytes:
        return None
    return _caches.setdefault(model, ImageCache(model.image_cache_bytes))
