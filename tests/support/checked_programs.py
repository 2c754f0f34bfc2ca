"""Checks of programs compiled for GPUs that need not be repeated while the programs stay the same.

CONTRIBUTING.md says how to record them anew.
"""

import hashlib
import os
from typing import NamedTuple

from tests.support.paths import ROOT

_FILE = ROOT / "tests" / "support" / "checked_programs.txt"
_RECORD = "RECORD_PROGRAMS" in os.environ


class ProgramCheck(NamedTuple):
    """A check of one or several programs."""

    name: str
    key: str

    @classmethod
    def of(cls, name: str, *determining: str) -> "ProgramCheck":
        """The check of this name.

        Args:
          name: as it is in the file, for readers.
          determining: digests of the programs, and whatever else the result depends on.
        """
        return cls(name, hashlib.sha256(" ".join(determining).encode()).hexdigest())

    @property
    def has_passed(self) -> bool:
        """Whether it passed when checks were recorded."""
        return not _RECORD and self.key in _FILE.read_text()

    def passed(self) -> None:
        """Records that it has passed, if checks are being recorded."""
        if _RECORD:
            with _FILE.open("a") as file:
                file.write(f"{self.key} {self.name}\n")
