"""Which heads to make sparse first: the greedy path of the multiple-choice knapsack problem.

Every head has a few options, each of which saves some FLOPs and does some damage. Along the lower
convex hull of a head's options, damage per FLOP saved rises from one option to the next. Taking the
steps along the hulls of all heads in the order of this ratio gives nested choices from dense to
sparsest. Each choice does the least total damage for the FLOPs that it saves, even compared with
mixtures of options. This assumes that the damages of heads add up; refinement's correction in
context accounts for the cases where they do not.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int8, Int64

from bsjax.masks.categories import HeadCategory
from bsjax.profiling.groups import SPARSE_CATEGORIES


class Option(NamedTuple):
    """A category of one head, the attention FLOPs that it saves and its damage in nats."""

    category: HeadCategory
    saved: int
    damage: float


class Move(NamedTuple):
    """A step of one head from one option to a sparser one.

    Attributes:
      layer: index of the layer.
      head: index of the head in the layer.
      before: the head's category before the move.
      after: the head's category after the move.
      saved: attention FLOPs saved by the move.
      damage: damage added by the move, in nats.
    """

    layer: int
    head: int
    before: HeadCategory
    after: HeadCategory
    saved: int
    damage: float

    @property
    def slope(self) -> float:
        """Damage per FLOP saved."""
        return self.damage / self.saved


def hull(
    damage: Float64[np.ndarray, "categories"], flops: Int64[np.ndarray, "all_categories"]
) -> list[Option]:
    """A head's options on the lower convex hull, dense first.

    Args:
      damage: damage of each of `SPARSE_CATEGORIES`.
      flops: attention FLOPs of the head, by `HeadCategory`.
    """
    dense = int(flops[HeadCategory.DENSE])
    options = [
        Option(category, dense - int(flops[category]), max(float(value), 0.0))
        for category, value in zip(SPARSE_CATEGORIES, damage, strict=True)
    ]
    kept = [Option(HeadCategory.DENSE, 0, 0.0)]
    for option in sorted(options, key=lambda option: (option.saved, option.damage)):
        if option.saved <= kept[-1].saved:
            continue
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) >= _slope(kept[-2], option):
            kept.pop()
        kept.append(option)
    return kept


def moves_of(layer: int, head: int, options: list[Option]) -> list[Move]:
    """The moves along a head's hull."""
    return [
        Move(
            layer,
            head,
            before.category,
            after.category,
            after.saved - before.saved,
            after.damage - before.damage,
        )
        for before, after in zip(options, options[1:], strict=False)
    ]


def greedy_path(
    damage: Float64[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
) -> tuple[Move, ...]:
    """The moves from all heads dense to all heads sparsest, least damage per FLOP first."""
    moves = [
        move
        for layer, of_layer in enumerate(damage)
        for head, of_head in enumerate(of_layer)
        for move in moves_of(layer, head, hull(of_head, flops[layer]))
    ]
    return tuple(sorted(moves, key=lambda move: (move.slope, move.layer, move.head, move.saved)))


def apply_moves(
    moves: tuple[Move, ...] | list[Move], categories: Int8[np.ndarray, "layers heads"]
) -> Int8[np.ndarray, "layers heads"]:
    """A copy of `categories` with some moves applied."""
    result = categories.copy()
    for move in moves:
        result[move.layer, move.head] = move.after
    return result


def _slope(before: Option, after: Option) -> float:
    return (after.damage - before.damage) / (after.saved - before.saved)
