"""Head dimensions that are no power of two, in pieces that are.

Triton's blocks have sides that are powers of two. Padding a head of 80 elements to 128 would spend
over a third of products, registers and shared memory on nothing; 64 + 16 spends none.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

SHORTEST_SIDE = 16
"""Triton's matrix product takes no side shorter than this."""


class Piece(NamedTuple):
    """Columns [start, start + size) of a head, of which the first `valid` are the head's own."""

    start: int
    size: int
    valid: int

    @property
    def inside(self) -> Any:
        """Mask [1, size] of the columns that belong to the head; None if all do."""
        # The elements beyond are the next head's.
        return None if self.valid == self.size else (jnp.arange(self.size) < self.valid)[None, :]


def pieces_of(head_dim: int) -> tuple[Piece, ...]:
    """Pieces that cover a head, largest first: 128; 64 + 16 for 80, and for 72."""
    pieces = []
    start = 0
    while start < head_dim:
        left = head_dim - start
        size = max(SHORTEST_SIDE, 1 << left.bit_length() - 1)
        pieces.append(Piece(start, size, min(size, left)))
        start += size
    return tuple(pieces)


def width_of(pieces: tuple[Piece, ...]) -> int:
    """Columns of all pieces together."""
    return sum(piece.size for piece in pieces)
