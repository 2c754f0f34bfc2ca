"""Writes files completely or not at all, and removes what killed processes left behind.

An incomplete file or folder has its process's number in its name and is locked by that process. If
the process is killed, the next run's `remove_leftovers` removes it.
"""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows lacks these locks, so nothing is removed there.
    fcntl = None

_STARTED = time.time()


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all: an earlier file stays until the new one is there.

    Raises:
      OSError: it cannot be written.
    """
    with atomic_replacement(path) as temporary:
        with open(temporary, "x", encoding="utf-8") as file, held(temporary):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def write_figure(figure: Any, path: Path, dpi: int) -> None:
    """Writes a figure of matplotlib completely or not at all, in the format of the name's suffix.

    Raises:
      OSError: it cannot be written.
      ValueError: the name has no suffix, or one that is not a format of matplotlib.
    """
    if not path.suffix:
        raise ValueError("end its name with the format, such as .png, .pdf or .svg.")
    with atomic_replacement(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format=path.suffix[1:].lower())


@contextlib.contextmanager
def atomic_replacement(path: Path) -> Iterator[Path]:
    """Yields a temporary path in the same folder, and renames it to `path` if the block succeeds.

    If the block raises, the temporary file is removed. Temporary files that killed processes left
    for the same `path` are removed too.

    Raises:
      OSError: the file cannot be renamed, or `path` is a device, a pipe or a folder.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        # Renaming would put an ordinary file in the place of /dev/null.
        raise OSError("it exists and is not an ordinary file")
    before, after = f".{path.name}.", ".tmp"
    remove_leftovers(path.absolute().parent, before, after)
    temporary = path.with_name(f"{before}{os.getpid()}{after}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:  # Interrupts leave nothing behind either.
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Locks a temporary file or folder while this process fills it, so that no other removes it.

    The lock ends with the process, however it ends.

    Raises:
      OSError: the path cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _try_lock(descriptor)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path, before: str, after: str = "") -> list[Path]:
    """Removes temporary files and folders of processes that ended before they were complete.

    Their names are `before`, the number of the process, `after`. They are kept while a process with
    that number runs (it may be another one by now; a later call removes them then), and while they
    are locked, on whatever machine.

    Returns:
      What was removed.
    """
    removed = []
    for path in _temporaries(folder, before, after):
        number = int(path.name[len(before) : len(path.name) - len(after)])
        with contextlib.suppress(OSError):
            # This process may have the number of an earlier one that was killed.
            ours = number == os.getpid() and os.stat(path).st_mtime < _STARTED
            if _runs(number) and not ours:
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if not _try_lock(descriptor):
                    continue
                if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
            finally:
                os.close(descriptor)
    return removed


def _temporaries(folder: Path, before: str, after: str) -> list[Path]:
    with contextlib.suppress(OSError):
        names = [
            name
            for name in os.listdir(folder)
            if name.startswith(before)
            and name.endswith(after)
            # Not a glob pattern: the name may contain its special characters.
            and name[len(before) : len(name) - len(after)].isdecimal()
        ]
        return [folder / name for name in sorted(names) if fcntl is not None]
    return []


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # Another user's, or not a valid process number.
        return True
    return True


def _try_lock(descriptor: int) -> bool:
    """Locks a file or folder; False if another process has locked it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # A file system without locks: rely on the number of the process alone.
        return True
    return True
