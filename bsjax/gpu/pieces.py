"""Splits heads whose size is not a power of two into pieces whose sizes are.

The sides of Triton's blocks are powers of two. Padding a head of 80 elements to 128 would waste
over a third of the products, registers and shared memory; 64 + 16 wastes nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

SHORTEST_SIDE = 16
"""Triton's matrix products have no sides shorter than this."""


class Piece(NamedTuple):
    """Columns [start, start + size) of a head; the first `valid` of them belong to the head."""

    start: int
    size: int
    valid: int

    @property
    def inside(self) -> Array | None:
        """Mask [1, size] of the columns that belong to the head; None if all do."""
        # The other columns belong to the next head.
        if self.valid == self.size:
            return None
        return (jnp.arange(self.size, dtype=jnp.int32) < self.valid)[None, :]


def pieces_of(head_dim: int) -> tuple[Piece, ...]:
    """The pieces that cover a head, largest first: 128 for 128; 64 + 16 for 80 and for 72."""
    pieces = []
    start = 0
    while start < head_dim:
        left = head_dim - start
        size = max(SHORTEST_SIDE, 1 << left.bit_length() - 1)
        pieces.append(Piece(start, size, min(size, left)))
        start += size
    return tuple(pieces)


def width_of(pieces: tuple[Piece, ...]) -> int:
    """How many columns all pieces have together."""
    return sum(piece.size for piece in pieces)
