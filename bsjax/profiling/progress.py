"""Progress of a profiling run."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bar

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `done` is 0 when a stage begins."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def reporting(progress: Progress | bool | None) -> Iterator[Progress]:
    """Yields the function to report progress to, for a `progress=` argument.

    Args:
      progress: None for a bar if stderr is a terminal, True for a bar, False for nothing, or the
        function itself.
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
