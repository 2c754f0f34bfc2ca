"""Writes parameters to an Orbax checkpoint while they are read, and publishes it when complete.

Orbax saves trees of arrays that are all in memory, but programs can register handlers for other
types of leaves. Here the leaves are `StreamedParameter`s, which know their shape and produce their
contents piece by piece. Their handler writes the same Zarr arrays that Orbax writes for NumPy
arrays, so the result is an ordinary Orbax checkpoint:

    tree = orbax.checkpoint.PyTreeCheckpointer().restore(folder / "parameters")

returns a nested dictionary of NumPy arrays without using bsjax. Every chunk has a CRC-32C
checksum, which is verified when the chunk is read.
"""

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from bsjax.checkpoint.loading import UNFINISHED
from bsjax.checkpoint.restoring import codecs_of, nested
from bsjax.errors import CheckpointError
from bsjax.unfinished import held, remove_leftovers

# Space that the file system may need in addition to the sizes of the files.
_SPARE_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class StreamedParameter:
    """A leaf of the saved tree, whose contents are produced while it is written.

    Attributes:
      shape: the parameter's shape.
      dtype: the parameter's dtype.
      chunks: the shape of the chunks that it is stored in: a file each.
      inner_chunks: the shape of the chunks within them that are read by themselves; None if there
        are none.
      pieces: a function that starts reading and yields the index and contents of each piece. Pieces
        consist of whole chunks.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...]
    inner_chunks: tuple[int, ...] | None
    pieces: Callable[[], Iterator[tuple[tuple[Any, ...], np.ndarray]]]


class StreamedParameterHandler(ocp.type_handlers.NumpyHandler):
    """Saves a `StreamedParameter` in the way that Orbax saves the NumPy array it describes."""

    async def serialize(
        self,
        values: Sequence[StreamedParameter],
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        """Writes all parameters, one after the other, before it returns."""
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            _write(value, Path(info.path))
        return []


def _write(parameter: StreamedParameter, folder: Path) -> None:
    opening = tensorstore.open(
        {
            "driver": "zarr3",
            # All files are flushed together, once, before they are published.
            "kvstore": {"driver": "file", "path": f"{folder}/", "file_io_sync": False},
            "metadata": {
                "shape": parameter.shape,
                "data_type": parameter.dtype.name,
                "chunk_grid": {
                    "name": "regular",
                    "configuration": {"chunk_shape": parameter.chunks},
                },
                "codecs": codecs_of(parameter.inner_chunks),
            },
            "create": True,
            # Even chunks of zeros are written, so that a missing chunk always means damage.
            "store_data_equal_to_fill_value": True,
        }
    )
    store = _finished(opening, folder)
    pending = None
    try:
        for index, piece in parameter.pieces():
            # This piece was read while the previous one was written: at most two are in memory.
            if pending is not None:
                _finished(pending, folder)
            pending = store[index].write(piece, can_reference_source_data_indefinitely=True)
    finally:
        # Also after an error or an interrupt, because clean-up must not race with a write.
        if pending is not None:
            _finished(pending, folder)


def _finished(future: Any, folder: Path) -> Any:
    """The result of a storage operation.

    Raises:
      CheckpointError: it failed: the disk is full, or files may not become that large.
    """
    try:
        return future.result()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot write {folder.name}: {error}") from error


def write_parameters(folder: Path, parameters: dict[tuple[str, ...], StreamedParameter]) -> None:
    """Writes an Orbax checkpoint of nested dictionaries.

    Args:
      folder: the folder to write; must not exist.
      parameters: the leaves by path.

    Raises:
      CheckpointError: a parameter could not be read.
    """
    registry = ocp.type_handlers.create_type_handler_registry(
        (StreamedParameter, StreamedParameterHandler()),
        # Not used, but without it Orbax warns.
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(nested(parameters)))


def check_destination(destination: Path) -> None:
    """Rejects a destination that exists, unless it is an empty folder.

    Raises:
      CheckpointError: the destination is a file, a link or a folder that is not empty; its parent
        is not a folder; or its name marks an unfinished conversion.
    """
    try:
        destination.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        # A name with a null character or half of a surrogate pair is a ValueError.
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{destination} cannot be written: {reason}.") from error
    if destination.is_symlink() or destination.is_file():
        raise CheckpointError(f"{destination} exists and is not a folder. Choose another name.")
    if destination.is_dir() and any(destination.iterdir()):
        raise CheckpointError(
            f"{destination} exists and is not empty. Choose another name or remove it first: "
            "nothing is ever overwritten."
        )
    if UNFINISHED in destination.name:
        raise CheckpointError(
            f"a name with {UNFINISHED!r} in it marks an unfinished conversion. Choose another name."
        )


def check_disk_space(destination: Path, needed: int) -> None:
    """Rejects a conversion that does not fit on the disk.

    Raises:
      CheckpointError: the file system of `destination` has less than `needed` bytes free.
    """
    existing = next(folder for folder in destination.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"{destination} needs {needed / 1e9:.2f} GB, but {existing} has only "
            f"{free / 1e9:.2f} GB free. Make room or choose a destination on another disk."
        )


def remove_unfinished(destination: Path) -> list[Path]:
    """Removes the temporary folders of conversions to `destination` that were killed.

    Returns:
      The folders removed.
    """
    return remove_leftovers(destination.absolute().parent, f"{destination.name}{UNFINISHED}")


@contextlib.contextmanager
def publish(destination: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to `destination` if the block succeeds.

    Everything is flushed to the disk before the folder is renamed. If the block raises (also on
    Ctrl-C or SIGTERM), the temporary folder is removed. If the process is killed, the folder stays,
    under a name that shows what it is and that `bsjax.load` rejects, until the next conversion to
    `destination` removes it.

    Raises:
      CheckpointError: the disk is full or not writable, or someone else created `destination`.
    """
    parent = destination.absolute().parent
    temporary = parent / f"{destination.name}{UNFINISHED}{os.getpid()}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise CheckpointError(f"cannot create {temporary}: {error.strerror}") from error
    with _stopped_by_signals(), held(temporary):
        try:
            yield temporary
            _flush(temporary)
            check_stopped()
            # Replaces only an empty folder: if another process has put something there in the
            # meantime, this fails.
            temporary.rename(destination.absolute())
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise CheckpointError(_explain(error, destination)) from error
            raise
    _flush_entry(parent)


def _explain(error: BaseException, destination: Path) -> str:
    number = getattr(error, "errno", None)
    if number in (errno.EEXIST, errno.ENOTEMPTY):
        return f"{destination} was created by another process in the meantime, and was left alone."
    if number in (errno.EXDEV, errno.EBUSY):
        return (
            f"{destination} is a mount point, and a finished checkpoint cannot be moved onto one. "
            "Choose a folder inside it."
        )
    return f"cannot write {destination}: {error}"


def _flush(folder: Path) -> None:
    """Flushes every file and folder under `folder` to the disk."""
    for parent, _, files in os.walk(folder, topdown=False):
        for name in files:
            _flush_entry(Path(parent, name))
        _flush_entry(Path(parent))


def _flush_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Stop:
    """The signal that asked a conversion to stop, if any.

    The handler raises an exception, like Python's own handlers. But an exception raised while a
    callback of a library or of the garbage collector runs is printed and dropped. The signal is
    therefore also remembered, and checked during the conversion and before publishing the result.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        # Only the first signal raises: it starts the clean-up, which must not be interrupted.
        if self.number is None:
            self.number = number
            self.check()

    def check(self) -> None:
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.number is not None:
            raise SystemExit(128 + self.number)


_stop = _Stop()


def check_stopped() -> None:
    """Raises the exception for SIGINT or SIGTERM if one of them arrived during the conversion."""
    _stop.check()


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Turns SIGINT and SIGTERM into exceptions inside the block, so that clean-up runs."""
    _stop.number = None
    before = {}
    # Only the main thread receives signals.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            # A process that ignores them (nohup, a background job) continues to do so.
            if signal.getsignal(number) is not signal.SIG_IGN:
                before[number] = signal.signal(number, _stop.handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
