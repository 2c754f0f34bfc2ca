"""Images of prompts, group by group: from pixels to the rows of an array of features.

A group is as many consecutive images as fit into one of a few sizes. One or two programs therefore
encode the images of all prompts, and the pixels of at most two groups are on the device at a time.

On several devices, each encodes a group of its own: groups of one size run together, in *rounds*.
Of several processes, each reads the images of its own devices' groups.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt8

from bsjax.attention import block_sizes
from bsjax.masks.schedule import bucket
from bsjax.models import Architecture, ImageTextModel
from bsjax.models.cache import PADDING_ROW
from bsjax.models.collectives import (
    ALL_AXES,
    Shares,
    gathered_from_all,
    shape_of_shares,
    shared_out,
)
from bsjax.models.pixels import Pixels
from bsjax.models.sharding import device_count, sharded_shapes
from bsjax.prompts.prompt import PromptImage
from bsjax.runtime.image_cache import ImageCache
from bsjax.runtime.processes import own_devices
from bsjax.runtime.programs import Program, Programs, Stage, size_in_bytes
from bsjax.runtime.sizes import sizes_in_use
from bsjax.timing import Stopwatch

# Patches along each side of the windows of a tower, in which each window is a tile.
_WINDOW = 8


@dataclass(frozen=True, eq=False)
class ImageGroup:
    """Consecutive images of one or several prompts that go through the vision tower together.

    Attributes:
      images: the images.
      plan: the family's `vision_plan` for these images, padded; None if they have been encoded.
      first: index of the group's first token among all image tokens that run.
      padded_tokens: the same, including tokens made of padding patches.
      patches_per_token: patches that are merged into one image token.
      patch_bytes: bytes of a patch.
      features: those of each image, if they have been encoded.
    """

    images: tuple[PromptImage, ...]
    plan: Any
    first: int
    padded_tokens: int
    patches_per_token: int
    patch_bytes: int
    features: tuple[Float[np.ndarray, "_ hidden"], ...] | None = None

    @property
    def tokens(self) -> int:
        """How many image tokens the group has."""
        return sum(image.tokens for image in self.images)

    def begin_images(self) -> None:
        """Begins to read the images, unless they are being read, into the group's padded patches.

        So nothing is in memory twice: neither these patches nor those that have been read, which
        move there.
        """
        for image, place in zip(self.images, self._places, strict=True):
            image.place(place)
            image.begin()

    def pixels(self) -> Pixels:
        """The padded patches. Waits for images that are still being read.

        Raises:
          MessageError: an image cannot be read.
        """
        for image, place in zip(self.images, self._places, strict=True):
            patches = image.patches
            if patches is not place:  # An image has one place, but may be in several groups.
                place[:] = patches
        return Pixels(self._padded, self.images[0].scale)

    @cached_property
    def _padded(self) -> UInt8[np.ndarray, "padded_patches values"]:
        return np.zeros(self.shape, np.uint8)

    @cached_property
    def _places(self) -> tuple[UInt8[np.ndarray, "_ values"], ...]:
        """The part of the padded patches that each image has."""
        ends = np.cumsum([0, *(image.size for image in self.images)]).tolist()
        return tuple(self._padded[first:end] for first, end in itertools.pairwise(ends))

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the padded patches."""
        return self.padded_tokens * self.patches_per_token, self.patch_bytes

    def encoded(self) -> Float[np.ndarray, "padded_tokens hidden"]:
        """The padded features of images that have been encoded."""
        assert self.features is not None
        padded = np.zeros((self.padded_tokens, self.features[0].shape[1]), self.features[0].dtype)
        padded[: self.tokens] = np.concatenate(self.features)
        return padded

    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `encode_images` that follow `features`, with shapes for arrays."""
        rows = jax.ShapeDtypeStruct((self.padded_tokens,), np.int32)
        values = jax.ShapeDtypeStruct(self.shape, np.uint8)
        return Pixels(values, self.images[0].scale), self.plan, rows

    def rows(self, row_of: Callable[[Any], Any]) -> Int[np.ndarray, "padded_tokens"]:
        """int32: the row of features of each of the group's tokens; `PADDING_ROW` for padding.

        Args:
          row_of: maps indices among all image tokens that run to rows of the features.
        """
        rows = np.full(self.padded_tokens, PADDING_ROW, np.int32)
        rows[: self.tokens] = row_of(np.arange(self.first, self.first + self.tokens))
        return rows


def image_groups(
    architecture: Architecture,
    images: Sequence[PromptImage],
    backend: str,
    cache: ImageCache | None = None,
    *,
    mesh: Mesh | None = None,
) -> tuple[ImageGroup, ...]:
    """Divides images into groups for the vision tower, and begins to read those of this process.

    Images that have been encoded are in groups of their own.

    Args:
      architecture: architecture of the model.
      images: the images of the prompts that run, one prompt after the other.
      backend: attention backend.
      cache: images that have been encoded. Unless it is empty, waits for the pixels of images whose
        digests are not known.
      mesh: the devices; None for one.
    """
    if not images:
        return ()
    if cache:
        for image in images:
            if image.known_digest() is None:
                image.begin()
    devices = device_count(mesh)
    known = [cache.get(image) if cache else None for image in images]
    runs = [
        [index for index, _ in run]
        for _, run in itertools.groupby(enumerate(known), lambda each: each[1] is None)
    ]
    family, config, _ = architecture
    block_q, block_kv = _blocks(architecture, backend)
    grids = np.stack([image.grid_thw for image in images])
    first_token = np.cumsum([0, *(image.tokens for image in images)]).tolist()
    patches_per_token = family.patches_per_token(config)
    groups = []
    # Many prompts have images of one size, whose groups differ in their pixels only.
    plans: dict[tuple[bytes, int], Any] = {}
    counted = counted_patches(architecture, grids, backend).tolist()
    for run in runs:
        patches = [counted[index] for index in run]
        borders = group_borders(patches, sizes_in_use().patches_for(sum(patches), devices))
        for first_of_run, end_of_run, padded in borders:
            first, end = run[0] + first_of_run, run[0] + end_of_run
            features = tuple(each for each in known[first:end] if each is not None)
            plan = None
            if not features:
                shapes = grids[first:end].tobytes(), padded
                plan = plans.get(shapes)
                if plan is None:
                    plan = plans[shapes] = family.vision_plan(
                        grids[first:end], config, patches=padded, block_q=block_q, block_kv=block_kv
                    )
            group = ImageGroup(
                tuple(images[first:end]),
                plan,
                first_token[first],
                padded // patches_per_token,
                patches_per_token,
                family.patch_area(config) * family.channels(config),
                features or None,
            )
            groups.append(group)
    for group in own_groups(groups, mesh):
        group.begin_images()
    return tuple(groups)


def counted_patches(
    architecture: Architecture, grid_thw: Int[np.ndarray, "images 3"], backend: str
) -> Int[np.ndarray, "images"]:
    """How many of a group's patches each image counts as.

    A group's schedules have room for twice as many tiles as there would be if all were full. Small
    images, and those that fill their windows badly, have more tiles, so they count as more patches
    than they have: as half of those of full tiles.

    Args:
      architecture: architecture of the model.
      grid_thw: frames, rows and columns of patches of each image.
      backend: attention backend.
    """
    block_q, _ = _blocks(architecture, backend)
    frames = grid_thw[:, 0].astype(np.int64)
    windows = frames * (-(-grid_thw[:, 1:] // _WINDOW)).prod(axis=1, dtype=np.int64)
    tile_patches = np.maximum(frames * block_q, windows * _WINDOW**2)
    return np.maximum(grid_thw.prod(axis=1, dtype=np.int64), tile_patches // 2)


def _blocks(architecture: Architecture, backend: str) -> tuple[int, int]:
    """`block_sizes` of the tower."""
    family, config, dtype = architecture
    return block_sizes(backend, family.vision_head_dim(config), dtype, sparse=True)


def most_round_tokens(
    architecture: Architecture, images: Sequence[PromptImage], devices: int = 1
) -> int:
    """The most image tokens of a round, rounded up; 0 if the model reads text only.

    It is the same for nearly all prompts, because the programs of chunks depend on it.

    Args:
      architecture: architecture of the model.
      images: the images. A very large one may exceed the usual sizes.
      devices: how many groups run together.
    """
    family, config, _ = architecture
    if not family.reads_images:
        return 0
    sizes, patches_per_token = sizes_in_use(), family.patches_per_token(config)
    usual = sizes.patches_for(2**63, devices)[-1] // patches_per_token
    # Tokens made of padding are not kept. A long, narrow image has far more of them than of others.
    of_image = max((image.tokens for image in images), default=0)
    of_groups = devices * bucket(of_image, smallest=usual, steps=1)
    return max(of_groups, sizes.feature_patches // patches_per_token)


def uncut_tokens(architecture: Architecture) -> int:
    """Tokens of the smallest image, if no chunk may end inside an image; 0 otherwise.

    Args:
      architecture: architecture of the model.
    """
    family, config, _ = architecture
    visibilities = family.visibilities(config)
    if not family.reads_images or not any(each.bidirectional_images for each in visibilities):
        return 0
    return math.prod(family.smallest_grid(config)) // family.patches_per_token(config)


def group_borders(patches: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Divides images into groups.

    Groups have the largest size while enough images are left to fill it, then the smaller ones. An
    image that is larger than all sizes is a group of its own.

    Args:
      patches: how many patches each image counts as.
      sizes: sizes of groups in patches, ascending.

    Returns:
      For each group, the index of its first image, one past that of its last image, and the patches
      that it is padded to.
    """
    groups = []
    first, left = 0, sum(patches)
    while first < len(patches):
        own = patches[first]
        filled = [size for size in sizes if own <= size <= left]
        fitting = [size for size in sizes if own <= size]
        if filled:
            size = filled[-1]
        elif fitting:
            size = fitting[0]
        else:
            size = bucket(own, smallest=sizes[-1], steps=1)
        end, total = first, 0
        while end < len(patches) and total + patches[end] <= size:
            total += patches[end]
            end += 1
        groups.append((first, end, size))
        first, left = end, left - total
    return groups


def rounds(groups: Sequence[ImageGroup], devices: int) -> Iterator[Sequence[ImageGroup]]:
    """Consecutive groups that run together: of one size, at most one for each device.

    Images that have been encoded are written group by group.
    """
    first = 0
    while first < len(groups):
        size, end = groups[first].padded_tokens, first + 1
        while (
            end < min(len(groups), first + devices)
            and groups[first].features is None
            and groups[end].features is None
            and groups[end].padded_tokens == size
        ):
            end += 1
        yield groups[first:end]
        first = end


def own_groups(groups: Sequence[ImageGroup], mesh: Mesh | None) -> list[ImageGroup]:
    """The groups that the devices of this process encode.

    Args:
      groups: all groups, or those of some whole rounds.
      mesh: the devices; None for one.
    """
    own = own_devices(mesh)
    return [
        group
        for groups_of_round in rounds(groups, len(own))
        for group, is_own in zip(groups_of_round, own, strict=False)
        if is_own and group.features is None
    ]


def rounds_until(groups: Sequence[ImageGroup], image_token: int, devices: int) -> int:
    """How many groups, of whole rounds, have all image tokens before a given one.

    Args:
      groups: the groups that have not been encoded.
      image_token: index among all image tokens that run.
      devices: how many groups run together.
    """
    count = 0
    for groups_of_round in rounds(groups, devices):
        if groups_of_round[0].first >= image_token:
            break
        count += len(groups_of_round)
    return count


def encode_images(
    module: ImageTextModel,
    features: Float[Array, "rows hidden"],
    pixels: Pixels,
    plan: Any,
    image_rows: Int[Array, "merged"],
    backend: str,
) -> Float[Array, "rows hidden"]:
    """Encodes a group of images and writes their features into rows of an array.

    Donate `features` so that they are updated in place. On several devices, each has a group of its
    own, and the features of all.

    Args:
      module: the model.
      features: features of other images, or embeddings of a prompt.
      pixels: patches of the images, padded.
      plan: from the family's `vision_plan`.
      image_rows: the row of `features` for each image token; `PADDING_ROW` for tokens made of
        padding.
      backend: attention backend.
    """
    encoded = gathered_from_all(module.encode_images(pixels, plan, backend=backend))
    image_rows = gathered_from_all(image_rows)
    return features.at[image_rows].set(encoded.astype(features.dtype), mode="drop")


def write_features(
    module: ImageTextModel,
    features: Float[Array, "rows hidden"],
    encoded: Float[Array, "merged hidden"],
    image_rows: Int[Array, "merged"],
) -> Float[Array, "rows hidden"]:
    """Writes features of images that have been encoded, as `encode_images` does."""
    del module
    return features.at[image_rows].set(encoded, mode="drop")


def read_features(
    module: ImageTextModel, features: Float[Array, "rows hidden"], image_rows: Int[Array, "merged"]
) -> Float[Array, "merged hidden"]:
    """The features of a group. Rows for padding tokens hold arbitrary values."""
    del module
    return features.at[image_rows].get(mode="clip")


class ImageEncoder:
    """The stages that run the vision tower.

    Attributes:
      stages: one for each size of group, and two more if images are kept.
    """

    def __init__(
        self,
        programs: Programs,
        groups: Sequence[ImageGroup],
        features: jax.ShapeDtypeStruct | None,
        row_of: Callable[[Any], Any],
        backend: str,
        *,
        cache: ImageCache | None = None,
        other_bytes: int = 0,
    ) -> None:
        """Compiles the programs that are needed.

        Args:
          programs: the programs of the model.
          groups: the groups.
          features: shape of the array that the features are written to; None if the model reads no
            images.
          row_of: maps indices among all image tokens that run to rows of that array.
          backend: attention backend.
          cache: keeps the features of images that are encoded; None keeps none.
          other_bytes: bytes on the device while images are encoded, such as the cache, in addition
            to the weights and to what the programs take.
        """
        self._row_of, self._cache = row_of, cache
        self._put, self._mesh = programs.put, programs.mesh
        self._devices = device_count(programs.mesh)
        self._programs: dict[tuple[Callable[..., Any], int], Program] = {}
        copied = [0]
        for group in groups:
            size = group.padded_tokens
            *_, rows = arguments = group.arguments()
            if group.features is None:
                arguments = [shape_of_shares(each, self._devices, ALL_AXES) for each in arguments]
                self._programs[encode_images, size] = programs.get(
                    encode_images, (features, *arguments), static=(backend,), donate=(0,)
                )
                copied.append(size_in_bytes(sharded_shapes(arguments[0], programs.mesh)))
            if cache is not None and features is not None:
                encoded = jax.ShapeDtypeStruct((size, features.shape[1]), features.dtype)
                self._programs[write_features, size] = programs.get(
                    write_features, (features, encoded, rows), donate=(0,)
                )
                self._programs[read_features, size] = programs.get(read_features, (features, rows))
        # While one round is encoded, the pixels of the next are copied to the devices.
        more = max(copied) if len(list(rounds(groups, self._devices))) > 1 else 0
        self.stages = [
            Stage("vision", program, other_bytes + more) for program in self._programs.values()
        ]

    def encode(
        self,
        features: jax.Array,
        groups: Sequence[ImageGroup],
        stopwatch: Stopwatch | None = None,
    ) -> jax.Array:
        """Encodes groups and returns the features with theirs written; donates `features`.

        Args:
          features: shaped as the encoder was told.
          groups: some of the groups that the encoder was made for.
          stopwatch: counts the parts `transfer` and `vision`. While it waits for pixels that are
            still being read, the device encodes the group before.
        """
        stopwatch = stopwatch or Stopwatch()
        fresh: list[tuple[ImageGroup, jax.Array]] = []
        with stopwatch.part("vision"):
            for groups_of_round in rounds(groups, self._devices):
                with stopwatch.part("transfer"):
                    pixels = self._pixels(groups_of_round)
                program, *others = self._arguments(groups_of_round)
                # Waits for the round before, so that no more than two rounds' pixels are on the
                # devices.
                jax.block_until_ready(features)
                with stopwatch.part("transfer"):
                    jax.block_until_ready(pixels)
                features = program(features, pixels, *others)
                if self._cache is not None:
                    for group in groups_of_round:
                        if group.features is None:
                            read = self._programs[read_features, group.padded_tokens]
                            fresh.append((group, read(features, group.rows(self._row_of))))
            for group, encoded in fresh:
                self._keep(group, np.asarray(encoded))
        return features

    def _pixels(self, groups: Sequence[ImageGroup]) -> Any:
        """The pixels of a round, or its features if it has been encoded, on the devices.

        Of several processes, each has the pixels of its own devices' groups.
        """
        first = groups[0]
        if first.features:
            return self._put(first.encoded())
        if self._mesh is None or self._devices == 1:
            return self._put(first.pixels())
        empty = np.zeros(first.shape, np.uint8)

        def of_device(index: Any) -> UInt8[np.ndarray, "1 patches values"]:
            number = index[0].start
            # Devices without a group encode nothing that anybody reads.
            values = groups[number].pixels().values if number < len(groups) else empty
            return values[None]

        shape = (self._devices, *first.shape)
        sharding = NamedSharding(self._mesh, PartitionSpec(ALL_AXES))
        values = jax.make_array_from_callback(shape, sharding, of_device)
        scale = shared_out([first.images[0].scale] * self._devices, ALL_AXES)
        return Shares(Pixels(values, scale.stacked), ALL_AXES)

    def _arguments(self, groups: Sequence[ImageGroup]) -> tuple[Any, ...]:
        """The program of a round, and its arguments after `features` and the pixels."""
        size = groups[0].padded_tokens
        rows = [group.rows(self._row_of) for group in groups]
        if groups[0].features:
            return self._programs[write_features, size], *rows
        plans = [group.plan for group in groups]
        missing = self._devices - len(groups)
        plans += plans[-1:] * missing
        rows += [np.full_like(rows[-1], PADDING_ROW)] * missing
        return (
            self._programs[encode_images, size],
            *(shared_out(values, ALL_AXES) for values in (plans, rows)),
        )

    def _keep(self, group: ImageGroup, encoded: Float[np.ndarray, "tokens hidden"]) -> None:
        assert self._cache is not None
        end = 0
        for image in group.images:
            first, end = end, end + image.tokens
            self._cache.put(image, encoded[first:end].copy())
