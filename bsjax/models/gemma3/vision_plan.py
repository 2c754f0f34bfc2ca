"""What the SigLIP tower needs to know about a prompt's images, computed on the host in NumPy.

All images have the same square grid of patches, and square blocks of patches are pooled into image
tokens. Patches are ordered block by block, so that pooling is a mean over consecutive rows. The
order does not matter to attention, because each patch has an explicit position.
"""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int
from transformers import PretrainedConfig

from bsjax.errors import CheckpointError, TemplateError
from bsjax.masks.schedule import Schedule, segment_schedule
from bsjax.models.image_rows import check_patch_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class VisionPlan:
    """Positions and schedule of the patches of all images, padded to a bucket. A pytree.

    Attributes:
      position: int32 [patches], each patch's row in the position embedding.
      schedule: each image is a segment.
    """

    position: Any
    schedule: Schedule


def grid_side(config: PretrainedConfig) -> int:
    """Number of patches along each side of an image."""
    return config.vision_config.image_size // config.vision_config.patch_size


def pooled_side(config: PretrainedConfig) -> int:
    """Number of patches along each side of a pooled block (Gemma3MultiModalProjector).

    Raises:
      CheckpointError: the config's images cannot be divided into such blocks.
    """
    side, tokens = grid_side(config), round(config.mm_tokens_per_image**0.5)
    if tokens < 1 or tokens**2 != config.mm_tokens_per_image or side % tokens:
        raise CheckpointError(
            f"The config asks for {config.mm_tokens_per_image} tokens per image (mm_tokens_per_"
            f"image) of {side} x {side} patches, which cannot be divided into that many squares."
        )
    return side // tokens


def patch_order(config: PretrainedConfig) -> Int[np.ndarray, "patches"]:
    """The row-major index of each patch of an image, block by block."""
    side, block = grid_side(config), pooled_side(config)
    index = np.arange(side**2, dtype=np.int32).reshape(side // block, block, side // block, block)
    return index.transpose(0, 2, 1, 3).reshape(-1)


def to_images(
    patches: Float32[np.ndarray, "patches patch_values"], config: PretrainedConfig
) -> Float32[np.ndarray, "images channels height width"]:
    """Puts flat patches [channels * rows * columns], in the order of `patch_order`, together."""
    side, size = grid_side(config), config.vision_config.patch_size
    channels = patches.shape[1] // size**2
    flat = np.asarray(patches).reshape(-1, side**2, patches.shape[1])
    flat = flat[:, np.argsort(patch_order(config))]
    cut = flat.reshape(-1, side, side, channels, size, size)
    return cut.transpose(0, 3, 1, 4, 2, 5).reshape(-1, channels, side * size, side * size)


def vision_plan(
    grid_thw: Int[np.ndarray, "images 3"],
    config: PretrainedConfig,
    *,
    patches: int,
    block_q: int,
    block_kv: int,
) -> VisionPlan:
    """The plan of a tower in which every patch sees its whole image; see `Family.vision_plan`.

    Args:
      grid_thw: frames, rows and columns of patches of each image; must be 1 and twice the config's
        side.
      config: configuration of the whole model.
      patches: rows to pad to, a multiple of the patches of an image token.
      block_q: query rows of an attention tile, at most.
      block_kv: keys of an attention block.

    Raises:
      TemplateError: a grid is not the config's.
      CapacityError: `patches` is too small or not a valid multiple.
    """
    side, merged = grid_side(config), pooled_side(config) ** 2
    grids = np.asarray(grid_thw, np.int64).reshape(-1, 3)
    other = np.flatnonzero((grids != (1, side, side)).any(axis=1))
    if other.size:
        raise TemplateError(
            f"Image {other[0]} has the patch grid {grids[other[0]].tolist()} (frames, rows, "
            f"columns); this model needs images of {side} x {side} patches."
        )
    needed = len(grids) * side**2
    check_patch_rows(patches, needed, merged)
    position = np.zeros(patches, np.int32)
    position[:needed] = np.tile(patch_order(config), len(grids))
    schedule = segment_schedule(
        np.full(len(grids), side**2), block_q=block_q, block_kv=block_kv, tokens=patches
    )
    return VisionPlan(position, schedule)
