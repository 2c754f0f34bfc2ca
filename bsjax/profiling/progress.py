"""Telling how far a profiling run is."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`, with `done` 0 when a stage begins."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Tells nobody."""


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """What `progress=` means: None is a bar where stderr is a terminal, False nothing.

    Args:
      progress: None, a boolean, or what is to be called.
    """
    if callable(progress):
        yield progress
    elif progress or (progress is None and sys.stderr.isatty()):
        with Bar(console=Console(stderr=True)) as bar:
            tasks = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)

            yield show
    else:
        yield no_progress
