"""Checks of programs compiled for GPUs that need not be repeated while the programs stay the same.

CONTRIBUTING.md says how to record them anew.
"""

import hashlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest

from tests.support.pallas import HAS_PALLAS
from tests.support.paths import ROOT
from tools import memory_table
from tools.gpu_targets import digest

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


class Uncompiled(NamedTuple):
    """Stands for a compiled program, of which only the results' shapes are known."""

    out_info: Any

    def memory_analysis(self) -> None:
        return None


def check_of_published_model(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any]
) -> ProgramCheck:
    """The check of all programs that a call compiles with `tools.memory_table`."""
    if not HAS_PALLAS:
        pytest.skip("The goals are those of programs with Pallas kernels.")
    digests = [str(sorted(memory_table.GOALS.items()))]

    def lowered(function: Any, arguments: tuple[Any, ...], target: str) -> Uncompiled:
        digests.append(digest(function, arguments, target))
        return Uncompiled(jax.eval_shape(function, *arguments))

    with monkeypatch.context() as patched:
        patched.setattr(memory_table, "compile_for", lowered)
        call()
    assert len(digests) > 3
    return ProgramCheck.of("published model", *digests)
