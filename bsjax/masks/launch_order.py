"""Where the tiles of several tables stand, so that a launch starts the longest ones first.

Kernels start their programs entry by entry: the first entry of every head's table, then the second
of every head's. If each table simply began with its longest tile, the short tiles of sparse heads
would start between the long ones of text rows and of dense heads, and the last of the long ones
when little else is left: multiprocessors would wait for them. A table may have entries without
rows, whose programs end at once, and which are launched anyway, since all tables have as many
entries as the longest may need. So tables wait with entries without rows until the others are down
to tiles of their own length:

    entry        0   1   2   3   4   5   6   7
    DENSE       90  89  88   .   .   .   .   .      blocks of each tile
    SINK         .   .   .   .   .   9   9   8
    text rows    .   .   .  40  40   9   .   .
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

# How much longer than the shortest of them tiles may be that start together. The first of these
# with which the entries suffice; with the last one, all tables begin with their longest tile.
_RATIOS = (1.05, 1.1, 1.25, 1.5, 2.0, 4.0, np.inf)


def launch_entries(blocks: Sequence[Int[np.ndarray, "_"]], room: int) -> list[Int[np.ndarray, "_"]]:
    """The entry in which each tile of each table stands.

    Args:
      blocks: the blocks of each table's tiles, most blocks first.
      room: how many entries a table has, enough for all tiles of any of them.

    Returns:
      The entries of each table's tiles, ascending.
    """
    most = max((int(each[0]) for each in blocks if each.size), default=0) or 1
    entries: list[np.ndarray] = []
    for ratio in _RATIOS:
        # Tiles without blocks come after all others.
        lengths = [np.log(most / np.maximum(each, 0.5)) / np.log(ratio) for each in blocks]
        classes = [each.astype(np.int64) for each in lengths]
        count = 1 + max((int(each[-1]) for each in classes if each.size), default=0)
        of_class = np.array([np.bincount(each, minlength=count) for each in classes])
        first = np.cumsum(of_class.max(axis=0, initial=0)) - of_class.max(axis=0, initial=0)
        entries = [
            first[each] + np.arange(each.size) - (np.cumsum(own) - own)[each]
            for each, own in zip(classes, of_class, strict=True)
        ]
        if max((int(each[-1]) for each in entries if each.size), default=0) < room:
            break
    return entries
