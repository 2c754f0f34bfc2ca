"""Writes files that are never half there, and removes what killed processes left behind.

What is not complete has a name with the number of its process in it, and is locked by that process.
If the process is killed, `remove_leftovers` of the next run removes it.
"""

import contextlib
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # There are no such locks on Windows: nothing is removed there.
    fcntl = None

_STARTED = time.time()


def write_text(path: Path, text: str) -> None:
    """Writes a file completely or not at all: an earlier file stays until the new one is there.

    Raises:
      OSError: it cannot be written.
    """
    with written_beside(path) as temporary:
        with open(temporary, "x", encoding="utf-8") as file, held(temporary):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, and renames it to `path` if the block succeeds.

    If the block raises, the temporary file is removed. Also removes those that other processes left
    behind for the same `path`.

    Raises:
      OSError: the file cannot be renamed.
    """
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
            # This process may have the number of one that was killed before it started.
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
            # A pattern would give a meaning to characters of the name.
            and name[len(before) : len(name) - len(after)].isdecimal()
        ]
        return [folder / name for name in sorted(names) if fcntl is not None]
    return []


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # It is someone else's, or no number of a process.
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
    except OSError:  # A file system without locks: the number of the process has to do.
        return True
    return True
