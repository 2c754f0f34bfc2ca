"""The predicted time of one layer's attention, and what of it is lost to what."""

from typing import NamedTuple

import numpy as np

from tools.speed.kernels import Kernel, costs_of
from tools.speed.launches import Launch
from tools.speed.rates import EMPTY_CYCLES, rates_of
from tools.speed.simulation import simulate


class Prediction(NamedTuple):
    """Seconds of one launch or of several, one after the other. All but `useful` is lost.

    Attributes:
      useful: visible pairs, at the rate of the loop over full blocks, on all multiprocessors.
      unseen: pairs that are computed and not visible: in partial blocks, and in rows that a tile
        does not have.
      predicate: what a partial block takes longer than a full one.
      tiles: beginning and end of each tile's program.
      empty: programs without rows.
      tails: waiting for a program that is longer than all work divided by all slots.
      order: what the launch takes longer than with its longest programs first.
      waves: all other waiting at the end, until the last program ends.
    """

    useful: float
    unseen: float
    predicate: float
    tiles: float
    empty: float
    tails: float
    order: float
    waves: float

    @property
    def seconds(self) -> float:
        """Of everything."""
        return sum(self)

    def __add__(self, other: tuple) -> "Prediction":
        """One after the other."""
        return Prediction(*(one + two for one, two in zip(self, other, strict=True)))


NOTHING = Prediction(*[0.0] * len(Prediction._fields))

LOSSES = Prediction._fields[1:]


def predict(launch: Launch, pairs: float, kernel: Kernel, gpu: str, group: int) -> Prediction:
    """Predicts one launch.

    Args:
      launch: its programs.
      pairs: the visible pairs of a query and a key, in all heads.
      kernel: the kernel that it runs.
      gpu: one that `rates.rates_of` knows.
      group: query heads that share a key head.
    """
    rates, costs = rates_of(gpu), costs_of(kernel, gpu, group)
    cycles = launch.cycles(costs)
    multiprocessors = rates.multiprocessors

    def end(programs: np.ndarray) -> float:
        return simulate(programs, multiprocessors, costs.resident, costs.crowding).end

    per_cycle = multiprocessors * costs.speed
    blocks, partial = launch.blocks, int(launch.partial.sum())
    useful = pairs / (kernel.chosen.block_q * kernel.chosen.block_kv) * costs.full
    empty = int(launch.empty.sum())
    work = cycles.sum() / per_cycle
    longest = float(cycles.max(initial=0.0))
    actual, sorted_end = end(cycles), end(-np.sort(-cycles))
    best = max(work, longest)
    losses = Prediction(
        useful / per_cycle,
        (blocks * costs.full - useful) / per_cycle,
        partial * (costs.partial - costs.full) / per_cycle,
        (cycles.size - empty) * costs.program / per_cycle,
        empty * EMPTY_CYCLES / per_cycle,
        best - work,
        actual - sorted_end,
        sorted_end - best,
    )
    return Prediction(*(part / rates.clock for part in losses))
