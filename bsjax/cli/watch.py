"""Notices if another process of a command ends (`jax.distributed`).

Processes wait for each other inside of compiled programs, where nothing can be raised. JAX ends a
process whose peers have gone silent, too, but with a stack trace and without the reason. Here, each
process keeps a count in the key-value store of JAX's coordination service, and a thread looks at
those of the others.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

SILENT_SECONDS = 15
"""A process whose count has stood still for this time counts as ended."""

_LOOK_AGAIN = 0.5
# Often, all processes find the same mistake: then each says so itself.
_TIME_TO_LEAVE = 3.0

_COUNTS, _REASONS = "bsjax/counts/", "bsjax/reasons/"
_FINISHED = "finished"


class Watch:
    """A thread that keeps an eye on the other processes, until one of them ends or `finish`."""

    def __init__(self, client: Any, process: int, processes: int, leave: Callable[[str], None]):
        """Begins.

        Args:
          client: JAX's client of the coordination service.
          process: which process this is.
          processes: how many there are.
          leave: called with the reason, in the thread, when another process has ended.
        """
        self._client, self._process, self._leave = client, process, leave
        self._since = {other: time.monotonic() for other in range(processes) if other != process}
        self._counts: dict[int, str] = {}
        self._stopped = threading.Event()
        self._ending = threading.Lock()
        threading.Thread(target=self._look, name="bsjax watch", daemon=True).start()

    def finish(self) -> None:
        """Tells the others that this process has nothing left to do."""
        self._stopped.set()
        self._tell(f"{_COUNTS}{self._process}", _FINISHED)

    def begin_end(self) -> None:
        """Must be called by a thread that is about to end this process: the first one may go on."""
        self._ending.acquire()
        self._stopped.set()

    def end(self, reason: str) -> None:
        """Tells the others why this process ends, and gives them time to find out."""
        self._tell(f"{_REASONS}{self._process}", reason)
        if self._process == 0:  # The coordination service ends with it, and JAX then ends them.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_TIME_TO_LEAVE + 3 * _LOOK_AGAIN)

    def reason(self) -> str | None:
        """Why another process has ended, if it says so within a moment."""
        end = time.monotonic() + _TIME_TO_LEAVE
        while time.monotonic() < end:
            reasons = self._values(_REASONS)
            for process, reason in (reasons or {}).items():
                return f"process {process}: {reason}"
            time.sleep(_LOOK_AGAIN)
        return None

    def _tell(self, key: str, value: str) -> None:
        try:
            self._client.key_value_set(key, value, allow_overwrite=True)
        except Exception:  # Without the service, JAX ends the others.
            return

    def _values(self, folder: str) -> dict[int, str] | None:
        """What the other processes have told; None if the coordination service does not answer."""
        try:
            found = self._client.key_value_dir_get(folder)
        except Exception:  # A JaxRuntimeError of one of several kinds.
            return None
        values = {int(key.rpartition("/")[2]): value for key, value in found}
        return {process: value for process, value in values.items() if process in self._since}

    def _look(self) -> None:
        count = 0
        while not self._stopped.wait(_LOOK_AGAIN):
            count += 1
            self._tell(f"{_COUNTS}{self._process}", str(count))
            if self._values(_REASONS):
                self._stopped.wait(_TIME_TO_LEAVE)
                reason = self.reason()
                if reason and not self._stopped.is_set():
                    self._leave(reason)
                return
            now = time.monotonic()
            for other, counted in (self._values(_COUNTS) or {}).items():
                if counted != self._counts.get(other) or counted == _FINISHED:
                    self._counts[other], self._since[other] = counted, now
            for other, since in self._since.items():
                if now - since > SILENT_SECONDS and not self._stopped.is_set():
                    self._leave(f"process {other} has ended, or is out of reach")
                    return
