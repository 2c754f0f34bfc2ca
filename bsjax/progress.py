"""Shows how far something is that takes long, on a terminal only."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`; `done` is 0 when a stage begins."""


def no_progress(stage: str, done: int, total: int) -> None:
    """Shows nothing."""


@contextmanager
def reporting(progress: Progress | bool | None, *, in_bytes: bool = False) -> Iterator[Progress]:
    """Yields the function to report progress to, for a `progress=` argument.

    Args:
      progress: None for a bar if stderr is a terminal, True for a bar, False for nothing, or the
        function itself.
      in_bytes: whether bytes are counted. The bar then shows sizes, and leaves a terminal at the
        end.
    """
    if callable(progress):
        yield progress
    elif progress or (progress is None and sys.stderr is not None and sys.stderr.isatty()):
        # Not imported where nothing is shown.
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = Bar.get_default_columns()
        if in_bytes:
            text = TextColumn("{task.description}")
            columns = (text, BarColumn(), DownloadColumn(), TimeRemainingColumn())
        console = Console(stderr=True)
        transient = in_bytes and console.is_terminal
        # Others may print while something is read in the background.
        with Bar(*columns, console=console, transient=transient, redirect_stdout=False) as bar:
            tasks = {}

            def show(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(stage, total=total)
                bar.update(tasks[stage], completed=done, total=total)

            yield show
    else:
        yield no_progress


@contextmanager
def counting(stage: str, done: int, total: int) -> Iterator[Callable[[int, str], None]]:
    """Shows how many of several things are done, on a terminal only.

    Args:
      stage: what is done.
      done: how many are done at the beginning.
      total: how many there are.

    Yields:
      A function to be called with how many are done, and with a note that is shown beside it.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda done, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(stage, completed=done, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)
