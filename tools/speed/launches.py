"""The programs of a launch, in the order in which a GPU starts them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.masks.schedule import Schedule
from tools.speed.kernels import Costs
from tools.speed.rates import EMPTY_CYCLES


class Launch(NamedTuple):
    """Programs in the order of the grid, whose first axis runs fastest: arrays [programs].

    Attributes:
      full: full blocks of each program.
      partial: partial blocks.
      empty: whether it has no rows, and ends at once.
    """

    full: Int[np.ndarray, "programs"]
    partial: Int[np.ndarray, "programs"]
    empty: Int[np.ndarray, "programs"]

    @property
    def blocks(self) -> int:
        """Blocks of all programs."""
        return int(self.full.sum() + self.partial.sum())

    def cycles(self, costs: Costs) -> np.ndarray:
        """Cycles of each program if it is alone on its multiprocessor: float64 [programs]."""
        busy = costs.program + self.full * costs.full + self.partial * costs.partial
        return np.where(self.empty, EMPTY_CYCLES, busy)


def launch_of(schedule: Schedule, categories: Sequence[int] | np.ndarray, kv_heads: int) -> Launch:
    """The launch of the prefill kernel for a schedule.

    The grid is (heads, tiles). Query heads come first; if the schedule stacks the heads of text
    rows, key heads follow, for the tiles of the last table.

    Args:
      schedule: of NumPy arrays, with the block sizes of the kernel.
      categories: the table of each query head.
      kv_heads: number of key heads.
    """
    tables = np.asarray(categories, np.int64)
    if schedule.stacked_heads:
        last = schedule.tile_columns.shape[0] - 1
        tables = np.concatenate([tables, np.full(kv_heads, last)])
    tiles = schedule.tiles

    def in_order(field: np.ndarray) -> np.ndarray:
        return field[tables].T.ravel().astype(np.int64)

    return Launch(
        in_order(tiles.full_blocks), in_order(tiles.partial_blocks), in_order(tiles.rows) == 0
    )
