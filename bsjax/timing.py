"""Where the time of a call goes."""

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

_IMPORTED = perf_counter()


class Stopwatch:
    """Divides time among the parts of a call: every moment counts for one part only.

    Attributes:
      seconds: by part.
    """

    def __init__(self) -> None:
        self._began = perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Counts the time inside the block for a part, which interrupts the part around it."""
        self._count()
        self._running.append(name)
        try:
            yield
        finally:
            self._count()
            self._running.pop()

    def move(self, seconds: float, before: str, after: str) -> None:
        """Counts seconds that have been counted for one part for another one."""
        self.seconds[before] -= seconds
        self.seconds[after] += seconds

    def take(self) -> defaultdict[str, float]:
        """Seconds of all parts, which then begin again at 0."""
        self._count()
        taken, self.seconds = self.seconds, defaultdict(float)
        return taken

    @property
    def age(self) -> float:
        """Seconds since this was made, whatever they count for."""
        return perf_counter() - self._began

    @property
    def total(self) -> float:
        """Seconds of all parts, the running ones included."""
        self._count()
        return sum(self.seconds.values())

    def _count(self) -> None:
        now = perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


def seconds_of_process() -> float:
    """Seconds since this process was started; where the system does not say, since this import."""
    try:
        # The 22nd field, counted behind the name, which may contain anything.
        ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
        started = int(ticks) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (AttributeError, OSError):
        return perf_counter() - _IMPORTED
