"""Threads that decode and scale images, while the first of them run through the model already."""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, TypeVar

import numpy as np

from bsjax.prompts.downloads import stopping
from bsjax.timing import Stopwatch

_MOST_THREADS = 8
# Seconds between two looks for requests that have failed.
_LOOK_AGAIN = 0.05

# Lets a thread decode an image into the memory of the one before. glibc gives freed memory back to
# the system beyond twice the largest block that has been freed so far, up to 32 MiB (mallopt(3),
# M_MMAP_THRESHOLD). Each image would get its memory page by page again, in a quarter of the time
# that it takes. The block is never written to; other systems do not mind it.
np.empty(2**25 - 2**16, np.uint8)

T = TypeVar("T")


class Requested(Generic[T]):
    """What an `ImageReader` has been asked for."""

    def __init__(self, reader: "ImageReader", read: Callable[[], T]) -> None:
        self._reader = reader
        # Dropped as soon as it runs, because it holds the source of an image.
        self._read: Callable[[], T] | None = read
        self.future: Future[T] = Future()

    def begin(self, threads: ThreadPoolExecutor) -> None:
        """Reads in one of these threads, unless that has begun already."""
        read, self._read = self._read, None
        if read is None:
            return
        try:
            self.future = threads.submit(read)
        except RuntimeError:  # No thread can be started, such as when the interpreter exits.
            try:
                self.future.set_result(read())
            except BaseException as error:
                self.future.set_exception(error)

    def start(self) -> None:
        """Begins to read it, unless that has begun already."""
        self._reader.begin([self])

    def result(self) -> T:
        """Waits for it. Whatever else has been asked for is read at the same time.

        Raises:
          BsjaxError: what reading raised.
        """
        self._reader.start()
        self.start()
        with self._reader.stopwatch.part("images"):
            return self.future.result()


class ImageReader:
    """A few threads that read images in the order in which they are asked for.

    Nothing is read before `start`, or before a result is needed, so that a prompt that needs more
    positions than the model has is refused first. Leaving the `with` block cancels what has not
    begun, ends downloads, and waits for images that are being decoded.

    Attributes:
      stopwatch: counts the time that callers wait for results, for the part `images`.
    """

    def __init__(self, stopwatch: Stopwatch | None = None) -> None:
        self.stopwatch = stopwatch or Stopwatch()
        self._requested: list[Requested] = []
        self._stopped = threading.Event()
        self._threads = ThreadPoolExecutor(
            _threads(), "bsjax-images", initializer=stopping, initargs=(self._stopped,)
        )

    def __enter__(self) -> "ImageReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._requested.clear()
        self._stopped.set()
        self._threads.shutdown(cancel_futures=True)

    def request(self, read: Callable[[], T]) -> Requested[T]:
        """Asks for what `read` returns."""
        requested = Requested(self, read)
        self._requested.append(requested)
        return requested

    @property
    def requests(self) -> int:
        """How many requests have not begun."""
        return len(self._requested)

    def forget(self, requests: int) -> None:
        """Forgets the requests that have not begun, except for the first ones."""
        del self._requested[requests:]

    def start(self) -> None:
        """Begins to read what has been asked for."""
        requested, self._requested = self._requested, []
        self.begin(requested)

    def begin(self, requested: Sequence[Requested]) -> None:
        """Begins to read these."""
        for each in requested:
            each.begin(self._threads)

    def wait_for(self, wanted: Sequence[Requested], among: Sequence[Requested]) -> None:
        """Waits until some requests have been read.

        Args:
          wanted: these requests.
          among: all requests that they are among, in the order in which errors are reported.

        Raises:
          BsjaxError: what the first request of `among` that has failed raised.
        """
        self.begin(wanted)
        with self.stopwatch.part("images"):
            waiting = {each.future for each in wanted}
            while waiting:
                _, waiting = wait(waiting, timeout=_LOOK_AGAIN, return_when=FIRST_COMPLETED)
                for each in among:
                    if each.future.done() and each.future.exception() is not None:
                        each.future.result()


def _threads() -> int:
    """As many threads as this process has cores, up to a few."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores or 1, _MOST_THREADS)
