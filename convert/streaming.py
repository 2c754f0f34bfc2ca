"""Reads a parameter piece by piece: checks, hashes, casts and transforms it.

A piece is a whole parameter if it is small, one layer of a stacked parameter, or a block of rows of
another large one. Two pieces are in memory at a time: one being read and one being written.
"""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from bsjax.errors import CheckpointError
from bsjax.models.parameters import TRANSFORMS
from convert.plan import PlannedParameter
from convert.safetensors_file import TensorEntry, TensorReader

PIECE_BYTES = 64 * 2**20
"""Parameters up to this size are one piece; larger ones are cut into pieces of about this size."""

MOST_INNER_CHUNKS, LEAST_INNER_BYTES = 64, 2**18
"""An axis that is divided among devices is stored in up to so many inner chunks, of which each has
at least so many bytes. Processes read those that their devices need."""

# Values are checked in blocks that fit into the processor's cache, so that checking is limited only
# by the speed of memory.
_CHECKED_AT_ONCE = 2**18

# Transforms that work row by row, and the axis of the rows in their result.
_ROW_AXIS = {"copy": 0, "transpose": -1}

# The bits of the exponent. If all are set, the value is infinite or NaN.
_EXPONENT = {"float32": (np.uint32, 0x7F800000), "float16": (np.uint16, 0x7C00),
             "bfloat16": (np.uint16, 0x7F80)}  # fmt: skip

Index = tuple[Any, ...]


class Fingerprint:
    """SHA-256 of a checkpoint's weights in the source files.

    It covers each tensor's canonical key, dtype, shape and bytes, in the order of the family's
    table. It does not depend on how the checkpoint is sharded, on the layout of its keys, or on the
    dtype that it is converted to.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        # Hashing takes as long as everything else done to a block, and releases Python's GIL.
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def begin(self, canonical_key: str, entry: TensorEntry) -> None:
        """Starts the next tensor."""
        self._submit(f"{canonical_key} {entry.dtype} {list(entry.shape)}\n".encode())

    def update(self, block: np.ndarray) -> None:
        """Adds the next bytes of the current tensor. `block` must not be changed afterwards."""
        self._submit(block.reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """The digest so far: 64 hexadecimal digits."""
        self._wait()
        return self._hash.hexdigest()

    def _submit(self, content: bytes | memoryview) -> None:
        # At most one block is pending, so that blocks do not pile up in memory.
        self._wait()
        self._pending = self._thread.submit(self._hash.update, content)

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def chunk_shape(parameter: PlannedParameter) -> tuple[int, ...]:
    """The shape of a parameter's chunks, the units that are read from and written to storage.

    Each piece consists of whole chunks. Otherwise, writing a piece would first read back part of
    the previous piece.
    """
    if parameter.nbytes <= PIECE_BYTES:
        return parameter.shape
    if parameter.rule.layers is not None:
        return (1, *parameter.shape[1:])
    axis = _ROW_AXIS.get(parameter.rule.transform)
    if axis is None:
        return parameter.shape
    rows = _rows_per_piece(parameter)
    if axis == 0:
        return (rows, *parameter.shape[1:])
    return (*parameter.shape[:-1], rows)


def inner_chunk_shape(parameter: PlannedParameter) -> tuple[int, ...] | None:
    """The shape of a parameter's inner chunks, the units that are read: chunks have several.

    None if each device needs the whole parameter, or if it is small.
    """
    axis, count = parameter.divided_axis, _inner_chunks(parameter)
    if axis is None or not count:
        return None
    shape = list(parameter.shape)
    shape[axis] //= count
    if parameter.rule.layers is not None:
        shape[0] = 1
    return tuple(shape)


def _inner_chunks(parameter: PlannedParameter) -> int:
    """How many inner chunks there are along the divided axis; 0 if there are none."""
    axis = parameter.divided_axis
    if axis is None:
        return 0
    nbytes = parameter.nbytes // (parameter.rule.layers or 1)
    counts = [
        count
        for count in range(1, MOST_INNER_CHUNKS + 1)
        if parameter.shape[axis] % (count * parameter.unit) == 0
        and nbytes >= count * LEAST_INNER_BYTES
        # Pieces of one tensor consist of whole inner chunks.
        and (parameter.rule.layers is not None or nbytes <= count * PIECE_BYTES)
    ]
    return max(counts, default=0)


def _rows_per_piece(parameter: PlannedParameter) -> int:
    rows = parameter.tensors[0].shape[0]
    per_piece = max(1, min(rows, PIECE_BYTES * rows // parameter.nbytes))
    count = _inner_chunks(parameter)
    return per_piece // (rows // count) * (rows // count) if count else per_piece


def pieces(
    parameter: PlannedParameter,
    reader: TensorReader,
    fingerprint: Fingerprint,
    progress: Callable[[int], None],
) -> Iterator[tuple[Index, np.ndarray]]:
    """Yields (index into the parameter, contiguous array of the stored dtype) for each piece.

    Args:
      parameter: the parameter to read.
      reader: reads the tensors.
      fingerprint: updated with every byte read.
      progress: called with the number of source bytes after each read.

    Raises:
      CheckpointError: a tensor cannot be read, or holds NaN or infinity before or after the cast.
    """
    rule, dtype = parameter.rule, parameter.dtype
    transform = TRANSFORMS[rule.transform]

    def read(entry: TensorEntry, rows: slice | None = None) -> np.ndarray:
        block = reader.read(entry, rows)
        fingerprint.update(block)
        check_finite(block, entry)
        if block.dtype != dtype:
            block = cast(block, dtype, entry)
        progress(entry.size if rows is None else entry.size // entry.shape[0] * len(block))
        return transform(block)

    if parameter.nbytes <= PIECE_BYTES and rule.layers is not None:
        stack = np.empty(parameter.shape, dtype)
        for layer, (key, entry) in enumerate(zip(rule.sources, parameter.tensors, strict=True)):
            fingerprint.begin(key, entry)
            stack[layer] = read(entry)
        yield (slice(None),), stack
        return
    for layer, (key, entry) in enumerate(zip(rule.sources, parameter.tensors, strict=True)):
        fingerprint.begin(key, entry)
        if rule.layers is not None:
            yield (layer,), contiguous(read(entry))
            continue
        axis = _ROW_AXIS.get(rule.transform)
        if axis is None or parameter.nbytes <= PIECE_BYTES:
            yield (slice(None),), contiguous(read(entry))
            continue
        step = _rows_per_piece(parameter)
        for start in range(0, entry.shape[0], step):
            rows = slice(start, min(start + step, entry.shape[0]))
            index = (rows,) if axis == 0 else (Ellipsis, rows)
            yield index, contiguous(read(entry, rows))


def check_finite(array: np.ndarray, entry: TensorEntry, why: str = "") -> None:
    """Raises CheckpointError if `array`, part of tensor `entry`, holds NaN or infinity."""
    unsigned, exponent = _EXPONENT[array.dtype.name]
    bits = array.reshape(-1).view(unsigned)
    for start in range(0, bits.size, _CHECKED_AT_ONCE):
        block = bits[start : start + _CHECKED_AT_ONCE] & unsigned(exponent)
        if block.max() == exponent:
            bad = np.flatnonzero(block == exponent)[0] + start
            raise CheckpointError(
                f"tensor {entry.key} in {entry.file.name} holds {array.reshape(-1)[bad]}{why}: "
                "a model with such a weight computes only NaN. "
                + ("Convert to bfloat16 or float32." if why else "Download the file again.")
            )


def cast(array: np.ndarray, dtype: np.dtype, entry: TensorEntry) -> np.ndarray:
    """Rounds to another dtype, and rejects weights that are too large for it."""
    with np.errstate(over="ignore"):
        result = array.astype(dtype)
    check_finite(result, entry, f" once it is rounded to {dtype.name}")
    return result


def contiguous(array: np.ndarray) -> np.ndarray:
    """Makes an array contiguous. Copies matrices in strips, several times as fast as NumPy does."""
    if array.flags.c_contiguous:
        return array
    if array.ndim != 2:
        return np.ascontiguousarray(array)
    result = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 32):
        result[:, start : start + 32] = array[:, start : start + 32]
    return result
