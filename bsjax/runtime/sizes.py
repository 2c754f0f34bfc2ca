"""The few sizes that programs are compiled for: chunks, caches and groups of images.

Every size that varies with the prompt is rounded up to one of these, so that a handful of programs
serves all prompts.
"""

from typing import Any, NamedTuple

import numpy as np

from bsjax.attention import GPU_KERNELS
from bsjax.gpu.configurations import compiles_for_gpus
from bsjax.masks.schedule import bucket


class Sizes(NamedTuple):
    """Sizes for one kind of device, ascending; each is a multiple of the one before.

    Attributes:
      chunks: rows of a chunk of a prompt.
      patches: patches of a group of images.
      feature_patches: patches of the largest image whose features have room in the array that all
        prompts have, if that is more than a group's. A larger image needs programs of its own.
      devices: how many devices the rows of a chunk are divided among.
    """

    chunks: tuple[int, ...]
    patches: tuple[int, ...]
    feature_patches: int = 0
    devices: int = 1

    def on_devices(self, devices: int) -> "Sizes":
        """The sizes if the rows of a chunk are divided among devices.

        Every chunk gathers the whole cache in every layer. Few large chunks therefore take less
        time than many small ones, so a device has up to four times as many rows as on its own.
        """
        if devices == 1:
            return self
        largest = self.chunks[-1] * devices
        largest = max(largest, min(4 * largest, _MOST_SHARED_ROWS))
        sizes = [self.chunks[0] * devices]
        while 2 * sizes[-1] <= largest:
            sizes.append(2 * sizes[-1])
        return self._replace(chunks=tuple(sizes), devices=devices)

    def patches_for(self, patches: int, devices: int) -> tuple[int, ...]:
        """The sizes of groups of images, if each device has a group of its own.

        All groups that run together have as many patches as a group on one device, and no group
        has more than it takes for every device to have some of the images.

        Args:
          patches: of all images.
          devices: how many groups run together.
        """
        smallest, largest = self.patches[0], max(self.patches[-1] // devices, self.patches[0])
        return (smallest,) if patches <= smallest * devices else tuple({smallest: 0, largest: 0})

    def chunks_for(self, cache_rows: int, uncut_tokens: int = 0) -> tuple[int, ...]:
        """The few sizes of chunks for a prompt whose cache has `cache_rows` rows.

        They are the smallest size, and the largest that is at most half as long as the cache:
        prompts with a cache of this length would seldom fill a larger chunk. Where images are not
        cut, the smallest that holds one comes between them, for images that follow in later turns.
        On several devices, the largest may be as long as the cache, and between them are sizes
        each a quarter of the next, for the end of a prompt.

        Args:
          cache_rows: rows of the cache of one sequence.
          uncut_tokens: tokens of the smallest image, if no chunk may end inside an image.
        """
        most = cache_rows if self.devices > 1 else cache_rows // 2
        fitting = [rows for rows in self.chunks if rows <= most]
        holding = [rows for rows in fitting if rows >= uncut_tokens]
        sizes = {self.chunks[0], *fitting[-1:], *holding[:1]}
        quarter = max(sizes) // 4
        while self.devices > 1 and quarter > self.chunks[0]:
            sizes.add(quarter)
            quarter //= 4
        return tuple(sorted(sizes))


# More rows would not be worth their memory: every device has an array of image features with room
# for the largest chunk.
_MOST_SHARED_ROWS = 2**17

# Photos and screenshots often have more patches than a group. With room for 8192 tokens of one, all
# prompts of that length share the programs of their chunks.
_ON_CPU = Sizes(chunks=(128, 512, 2048), patches=(1024, 8192), feature_patches=4 * 8192)
# A chunk must keep the matrix units busy for longer than it takes to read the weights.
_ON_GPU = Sizes(chunks=(512, 4096), patches=(4096, 65536))


def sizes_in_use() -> Sizes:
    """The sizes for the devices that programs are compiled for."""
    return _ON_GPU if compiles_for_gpus() else _ON_CPU


_IMAGES = 48
_TOKENS_OF_IMAGES = 128


def most_images(rows: int, devices: int = 1) -> int:
    """The most images in a chunk. Its schedule has room for the tiles of that many.

    Args:
      rows: rows of the chunk.
      devices: how many devices they are divided among.
    """
    return max(devices * _IMAGES, rows // _TOKENS_OF_IMAGES)


MOST_PROMPTS = 16
"""The most prompts that a chunk has tokens of."""

_MOST_PARTS = 64


def most_parts(backend: str, dtype: Any) -> int:
    """The most parts, all together, that the long tiles of a chunk's text rows are split into.

    It is 0, which splits none, except for the GPU kernels in 16 bits. Only on a GPU does a launch
    wait for its longest tiles; and in float32, which is for comparisons, the kernels have no
    registers to spare.
    """
    return _MOST_PARTS if backend in GPU_KERNELS and np.dtype(dtype).itemsize == 2 else 0


# Short caches have one of few lengths. Longer ones are rounded up by at most a quarter.
_SHORT_CACHES = (2048, 8192)


def cache_rows(tokens: int) -> int:
    """The number of rows of a cache for `tokens` tokens, prompt and answer included."""
    for rows in _SHORT_CACHES:
        if tokens <= rows:
            return rows
    return bucket(tokens, smallest=_SHORT_CACHES[-1], steps=4)


_MOST_SEQUENCES_ON_CPU = 32
_MOST_SEQUENCES_ON_GPU = 64


def most_sequences() -> int:
    """The most sequences of a cache: the most answers that are generated together."""
    return _MOST_SEQUENCES_ON_GPU if compiles_for_gpus() else _MOST_SEQUENCES_ON_CPU
