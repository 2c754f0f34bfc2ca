"""Simulates the programs of a launch on the multiprocessors of a GPU.

Programs start in order, each as soon as a slot is free. A multiprocessor has as many slots as
programs fit. Programs that share a multiprocessor slow each other down as soon as together they
need more than it has.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Simulated(NamedTuple):
    """What a simulation finds, in cycles.

    Attributes:
      end: when the last program ends.
      busy: the work of all programs that each multiprocessor ran, [multiprocessors].
    """

    end: float
    busy: np.ndarray


def simulate(
    cycles: Sequence[float] | np.ndarray,
    multiprocessors: int,
    resident: int = 1,
    crowding: float = 1.0,
) -> Simulated:
    """Runs programs greedily, in order.

    Args:
      cycles: of each program if it is alone on a multiprocessor.
      multiprocessors: how many there are.
      resident: the most programs on a multiprocessor at a time.
      crowding: how much of a multiprocessor a program needs, 0 to 1. n programs run at full speed
        while n * crowding is at most 1, and else at 1 / (n * crowding) of it.
    """
    programs = np.asarray(cycles, np.float64).tolist()
    busy = np.zeros(multiprocessors)
    if resident == 1:
        # As soon as one program ends, the next one starts there.
        ends = [(0.0, index) for index in range(multiprocessors)]
        for program in programs:
            end, index = ends[0]
            heapq.heapreplace(ends, (end + program, index))
            busy[index] += program
        return Simulated(max(ends)[0], busy)
    each = [_Multiprocessor(crowding) for _ in range(multiprocessors)]
    first = programs[: multiprocessors * resident]
    for index, program in enumerate(first):
        # One for each multiprocessor, then a second one for each.
        place = index % multiprocessors
        each[place].start(0.0, program)
        busy[place] += program
    queue = [(one.next_end(), index) for index, one in enumerate(each) if one.ends]
    heapq.heapify(queue)
    now = 0.0
    following = iter(programs[len(first) :])
    while queue:
        now, index = queue[0]
        one = each[index]
        one.finish(now)
        program = next(following, None)
        if program is not None:
            one.start(now, program)
            busy[index] += program
        if one.ends:
            heapq.heapreplace(queue, (one.next_end(), index))
        else:
            heapq.heappop(queue)
    return Simulated(now, busy)


class _Multiprocessor:
    """Its programs, whose work is counted on a clock of their own.

    That clock runs as fast as each of the programs does, so a program's end on it never changes.
    """

    def __init__(self, crowding: float) -> None:
        self._crowding = crowding
        self._time = self._work = 0.0
        self.ends: list[float] = []

    def _advance(self, now: float) -> None:
        self._work += (now - self._time) * self._speed()
        self._time = now

    def _speed(self) -> float:
        return 1 / max(1.0, len(self.ends) * self._crowding)

    def start(self, now: float, program: float) -> None:
        self._advance(now)
        heapq.heappush(self.ends, self._work + program)

    def finish(self, now: float) -> None:
        self._advance(now)
        self._work = max(self._work, heapq.heappop(self.ends))

    def next_end(self) -> float:
        return self._time + (self.ends[0] - self._work) / self._speed()
