"""What the vision towers need to know about a prompt's images, computed on the host in NumPy."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.errors import TemplateError
from bsjax.masks.schedule import Schedule, segment_schedule
from bsjax.models.image_rows import check_patch_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class VisionPlan:
    """Positions and schedules of the patches of all images, padded to a bucket. A pytree.

    Rows are patches in the tower's order: the image processor's (Qwen2-VL), or window by window
    (Qwen2.5-VL).

    Attributes:
      positions: int32 [patches, 2], row and column of each patch in its image.
      schedule: each frame of each image is a segment.
      window_schedule: each window is a segment; None for a tower without windows.
      order: int32 [patches], the patch in each row; None for the image processor's order.
      merged_row: int32 [patches / merge ** 2], the merged row of each image token; None for the
        image processor's order.
    """

    positions: Any
    schedule: Schedule
    window_schedule: Schedule | None = None
    order: Any = None
    merged_row: Any = None


def vision_plan(
    grid_thw: Int[np.ndarray, "images 3"],
    config: PretrainedConfig,
    *,
    patches: int,
    block_q: int,
    block_kv: int,
) -> VisionPlan:
    """The plan of a tower in which every block attends to whole images (Qwen2-VL).

    Args:
      grid_thw: frames, rows and columns of patches of each image.
      config: configuration of the whole model.
      patches: rows to pad to, a multiple of `spatial_merge_size ** 2`.
      block_q: query rows of an attention tile, at most.
      block_kv: keys of an attention block.

    Raises:
      TemplateError: a grid's sides are not multiples of `spatial_merge_size`, or not positive.
      CapacityError: `patches` is too small, or not a multiple of `spatial_merge_size ** 2`.
    """
    merge = config.vision_config.spatial_merge_size
    grids = checked_grids(grid_thw, merge, patches)
    return VisionPlan(
        positions=patch_positions(grids, merge, patches),
        schedule=segment_schedule(
            frame_lengths(grids), block_q=block_q, block_kv=block_kv, tokens=patches
        ),
    )


def checked_grids(grid_thw: np.ndarray, merge: int, patches: int) -> Int[np.ndarray, "images 3"]:
    """The grids as int64, after checking that they can be merged and fit into `patches` rows.

    Raises:
      TemplateError: as for `vision_plan`.
      CapacityError: as for `vision_plan`.
    """
    grids = np.asarray(grid_thw, np.int64).reshape(-1, 3)
    bad = (grids < 1).any(axis=1) | (grids[:, 1:] % merge).any(axis=1)
    if bad.any():
        number = int(np.flatnonzero(bad)[0])
        raise TemplateError(
            f"Image {number} has the patch grid {grids[number].tolist()} (frames, rows, columns); "
            f"rows and columns must be positive multiples of {merge}, as they are in the image "
            "processor's output."
        )
    check_patch_rows(patches, int(grids.prod(axis=1).sum()), merge**2)
    return grids


def frame_lengths(grids: Int[np.ndarray, "images 3"]) -> Int[np.ndarray, "frames"]:
    """Number of patches of every frame of every image."""
    return np.repeat(grids[:, 1] * grids[:, 2], grids[:, 0])


def patch_positions(
    grids: Int[np.ndarray, "images 3"], merge: int, patches: int
) -> Int[np.ndarray, "patches 2"]:
    """Row and column of every patch, in the image processor's order; zeros for padding.

    In that order, the patches that are merged into one token are consecutive (transformers:
    get_vision_position_ids).
    """
    positions = np.zeros((patches, 2), np.int32)
    first = 0
    for frames, rows, columns in grids.tolist():
        in_image = np.indices((rows, columns), np.int32)
        blocks = in_image.reshape(2, rows // merge, merge, columns // merge, merge)
        of_frame = blocks.transpose(1, 3, 2, 4, 0).reshape(-1, 2)
        positions[first : first + frames * len(of_frame)] = np.tile(of_frame, (frames, 1))
        first += frames * len(of_frame)
    return positions
