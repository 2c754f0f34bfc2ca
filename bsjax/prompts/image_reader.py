"""Threads that decode and scale images, while the first of them run through the model already."""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

from bsjax.timing import Stopwatch

_MOST_THREADS = 8

T = TypeVar("T")


class Requested(Generic[T]):
    """What an `ImageReader` has been asked for."""

    def __init__(self, reader: "ImageReader", read: Callable[[], T]) -> None:
        self._reader, self._read = reader, read
        self._future: Future[T] | None = None

    def begin(self, threads: ThreadPoolExecutor) -> None:
        """Reads in one of these threads."""
        self._future = threads.submit(self._read)

    def result(self) -> T:
        """Waits for it.

        Raises:
          BsjaxError: what reading raised.
        """
        if self._future is None:
            self._reader.start()
        assert self._future is not None
        with self._reader.stopwatch.part("images"):
            return self._future.result()


class ImageReader:
    """A few threads that read images in the order in which they are asked for.

    Nothing is read before `start`, or before a result is needed, so that a prompt that cannot run
    is refused first. Leaving the `with` block cancels what has not begun, and waits for what has.

    Attributes:
      stopwatch: counts the time that callers wait for results, for the part `images`.
    """

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self._requested: list[Requested] = []
        self._threads = ThreadPoolExecutor(_threads(), thread_name_prefix="bsjax-images")

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._threads.shutdown(cancel_futures=True)

    def request(self, read: Callable[[], T]) -> Requested[T]:
        """Asks for what `read` returns."""
        requested = Requested(self, read)
        self._requested.append(requested)
        return requested

    def start(self) -> None:
        """Begins to read what has been asked for."""
        requested, self._requested = self._requested, []
        for each in requested:
            each.begin(self._threads)


def _threads() -> int:
    """As many threads as this process has cores, up to a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_THREADS)
