"""Qwen2.5-VL's window order (transformers: get_vision_window_index), computed on the host."""

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.masks.schedule import segment_schedule
from bsjax.models.qwen2_vl.vision_plan import (
    VisionPlan,
    checked_grids,
    frame_lengths,
    patch_positions,
)

_SMALLEST_BLOCK = 16


def vision_plan(
    grid_thw: Int[np.ndarray, "images 3"],
    config: PretrainedConfig,
    *,
    patches: int,
    block_q: int,
    block_kv: int,
) -> VisionPlan:
    """The plan of a tower that runs patches window by window.

    Windows never span images, so images stay contiguous in window order. Attention within windows
    uses blocks no larger than a window, because the rest of a larger block would be empty.

    Args:
      grid_thw: frames, rows and columns of patches of each image.
      config: configuration of the whole model.
      patches: rows to pad to, a multiple of `spatial_merge_size ** 2`.
      block_q: query rows of an attention tile, at most.
      block_kv: keys of an attention block, at most.

    Raises:
      TemplateError: a grid's sides are not multiples of `spatial_merge_size`, or not positive.
      CapacityError: `patches` is too small, or not a multiple of `spatial_merge_size ** 2`.
    """
    vision = config.vision_config
    merge = vision.spatial_merge_size
    grids = checked_grids(grid_thw, merge, patches)
    side = vision.window_size // merge // vision.patch_size
    merged_order, window_tokens = window_order(grids // (1, merge, merge), side)

    unit = merge**2
    merged_rows = np.arange(patches // unit, dtype=np.int32)
    merged_rows[: merged_order.size] = merged_order
    order = (merged_rows[:, None] * unit + np.arange(unit, dtype=np.int32)).reshape(-1)

    largest = max(1 << (side**2 * unit - 1).bit_length(), _SMALLEST_BLOCK)
    return VisionPlan(
        positions=patch_positions(grids, merge, patches)[order],
        schedule=segment_schedule(
            frame_lengths(grids), block_q=block_q, block_kv=block_kv, tokens=patches
        ),
        window_schedule=segment_schedule(
            window_tokens * unit,
            block_q=min(block_q, largest),
            block_kv=min(block_kv, largest),
            tokens=patches,
        ),
        order=order,
        merged_row=np.argsort(merged_rows).astype(np.int32),
    )


def window_order(
    merged_grids: Int[np.ndarray, "images 3"], side: int
) -> tuple[Int[np.ndarray, "image_tokens"], Int[np.ndarray, "windows"]]:
    """Image tokens sorted by window, and the number of tokens in each window.

    Args:
      merged_grids: frames, rows and columns of each image, in merged patches.
      side: rows and columns of a window, in merged patches. Windows at an image's right and lower
        edge may be smaller.
    """
    windows: list[np.ndarray] = []
    count = 0
    for grid in merged_grids.tolist():
        frame, row, column = np.indices(grid)
        windows_down, windows_across = -(-grid[1] // side), -(-grid[2] // side)
        window = (frame * windows_down + row // side) * windows_across + column // side
        windows.append(count + window.reshape(-1))
        count += grid[0] * windows_down * windows_across
    window_of_token = np.concatenate(windows) if windows else np.zeros(0, np.int64)
    order = np.argsort(window_of_token, kind="stable").astype(np.int32)
    return order, np.bincount(window_of_token, minlength=count)
