"""The programs of a launch, in the order in which a GPU starts them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.masks.launch_order import LaunchItem
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

    The grid is (query heads, tiles) or, if heads are stacked, (key heads, items of the launch
    list).

    Args:
      schedule: of NumPy arrays, with the block sizes of the kernel.
      categories: the table of each query head.
      kv_heads: number of key heads.
    """
    of_heads, tiles = np.asarray(categories, np.int64), schedule.tiles
    if schedule.launch_columns is None:
        table, tile = of_heads, np.arange(schedule.tile_columns.shape[1])[:, None]
        is_launched = np.ones(1, bool)
    else:
        item = LaunchItem(*(field[:, None] for field in schedule.launch))
        group = of_heads.size // kv_heads
        of_item = of_heads[np.arange(kv_heads) * group + np.maximum(item.head, 0)]
        table = np.where(item.head < 0, schedule.tile_columns.shape[0] - 1, of_item)
        tile, is_launched = item.tile, item.heads > 0

    def in_order(field: np.ndarray) -> np.ndarray:
        return np.where(is_launched, field[table, tile], 0).ravel().astype(np.int64)

    return Launch(
        in_order(tiles.full_blocks), in_order(tiles.partial_blocks), in_order(tiles.rows) == 0
    )
