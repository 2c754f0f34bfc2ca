"""Divides the channels of a head into one or two blocks, whose sides are powers of two."""

from typing import NamedTuple

from bsjax.gpu.pieces import SHORTEST_SIDE


class HeadBlocks(NamedTuple):
    """The blocks of a head: 128 for 128 channels, 64 + 16 for 80 and for 72."""

    first: int
    """Channels of the first block; some are padding if there is no second one."""
    second: int
    """Channels of the second block, padding included; 0 if there is none."""

    @property
    def width(self) -> int:
        """The channels of both blocks."""
        return self.first + self.second


def head_blocks(head_dim: int) -> HeadBlocks:
    """The blocks with the least padding; one block rather than two of the same width."""
    whole = power_of_two(head_dim)
    if whole == head_dim or whole <= SHORTEST_SIDE:
        return HeadBlocks(whole, 0)
    divided = HeadBlocks(whole // 2, power_of_two(head_dim - whole // 2))
    return divided if divided.width < whole else HeadBlocks(whole, 0)


def power_of_two(least: int) -> int:
    """The smallest power of two, `SHORTEST_SIDE` or more, that is at least `least`."""
    return max(SHORTEST_SIDE, 1 << (least - 1).bit_length())
