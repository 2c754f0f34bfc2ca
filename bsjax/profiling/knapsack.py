"""Which heads to make sparse first, and to what: the multiple-choice knapsack's greedy path.

Every head has a few options, each saving FLOPs and doing damage. On the lower convex hull of a
head's options the damage per FLOP saved rises from one option to the next; taking the hulls' steps
of all heads in the order of that ratio gives nested sets of choices from dense to sparsest, each of
which does the least total damage for what it saves (of all mixtures of options). It takes damages
of heads to add up, which is what correcting in context is for.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int8, Int64

from bsjax.masks.categories import HeadCategory
from bsjax.profiling.groups import SPARSE_CATEGORIES


class Option(NamedTuple):
    """A category of one head: attention FLOPs it saves, and the damage it does (in nats)."""

    category: HeadCategory
    saved: int
    damage: float


class Move(NamedTuple):
    """A step of one head from one option to a sparser one.

    Attributes:
      layer: of the head.
      head: of the layer.
      before: its category before.
      after: its category after.
      saved: attention FLOPs that it saves more than before.
      damage: how much more damage it does.
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
      damage: of each of `SPARSE_CATEGORIES`.
      flops: of the head, by `HeadCategory`.
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
    """The steps along a head's hull."""
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


def path(
    damage: Float64[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
) -> tuple[Move, ...]:
    """The moves from all heads dense to the sparsest, least damage per FLOP first."""
    moves = [
        move
        for layer, of_layer in enumerate(damage)
        for head, of_head in enumerate(of_layer)
        for move in moves_of(layer, head, hull(of_head, flops[layer]))
    ]
    return tuple(sorted(moves, key=lambda move: (move.slope, move.layer, move.head, move.saved)))


def taken(
    moves: tuple[Move, ...] | list[Move], categories: Int8[np.ndarray, "layers heads"]
) -> Int8[np.ndarray, "layers heads"]:
    """The categories after some moves, from `categories` on."""
    result = categories.copy()
    for move in moves:
        result[move.layer, move.head] = move.after
    return result


def _slope(before: Option, after: Option) -> float:
    return (after.damage - before.damage) / (after.saved - before.saved)
