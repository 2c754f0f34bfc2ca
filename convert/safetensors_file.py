"""Reads safetensors files piece by piece, without mapping them into memory.

The `safetensors` package maps a whole file into memory and copies tensors out of it. Mapped pages
count towards a process's resident memory, so a converter would need as much memory as the size of
the checkpoint. Here, bytes are read directly into the final array, any range of rows at a time.

The format is https://github.com/huggingface/safetensors#format: eight bytes with the header's
length, a JSON header with each tensor's dtype, shape and byte range, then the tensors' bytes,
row-major and little-endian.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np

from bsjax.errors import CheckpointError

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Supported dtypes of source tensors. Others (integers, float8) belong to quantised checkpoints,
whose tensors need further ones to give the weights."""

# The format's own limit, so that a damaged length cannot make us allocate gigabytes.
_LONGEST_HEADER = 100_000_000

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorEntry:
    """Where a tensor is stored.

    Attributes:
      key: its name in the file.
      file: the safetensors file.
      dtype: safetensors' name for the dtype, such as "BF16".
      shape: its shape.
      start: byte offset of its first element from the start of the file.
      size: its length in bytes.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Reads and checks the header of `file`.

    Returns:
      The tensors by name. Their byte ranges are inside the file and match their shapes.

    Raises:
      CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    try:
        length = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or header_length > min(_LONGEST_HEADER, length - 8):
                raise CheckpointError(
                    f"{file} is {length} bytes long, too short for its own header: it is truncated "
                    "or not a safetensors file. Download it again."
                )
            header = json.loads(stream.read(header_length))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(
            f"{file} has no readable safetensors header ({error}): it is damaged or not a "
            "safetensors file. Download it again."
        ) from error

    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a header that is not a JSON object: it is damaged.")
    entries = {
        key: _entry(key, value, file, 8 + header_length)
        for key, value in header.items()
        if key != "__metadata__"
    }
    end = max((entry.start + entry.size for entry in entries.values()), default=8 + header_length)
    if end > length:
        cut = [entry.key for entry in entries.values() if entry.start + entry.size > length]
        raise CheckpointError(
            f"{file} is truncated: its header describes {end} bytes, but the file has {length}. "
            f"{len(cut)} tensors are cut off, such as {cut[0]}. Download it again."
        )
    return entries


def _entry(key: str, value: object, file: Path, data_start: int) -> TensorEntry:
    """Checks one tensor's entry in the header."""
    try:
        if not isinstance(value, dict):
            raise TypeError("not an object")
        dtype = str(value["dtype"])
        shape = tuple(int(axis) for axis in value["shape"])
        start, end = (int(offset) for offset in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} has a damaged header entry for tensor {key}: {value!r}"
        ) from error
    expected = math.prod(shape) * _BITS[dtype] // 8 if dtype in _BITS else end - start
    if start < 0 or min(shape, default=0) < 0 or end - start != expected:
        raise CheckpointError(
            f"{file} has a damaged header: tensor {key}, {dtype} {list(shape)}, needs {expected} "
            f"bytes but has {end - start}."
        )
    return TensorEntry(key, file, dtype, shape, data_start + start, expected)


class TensorReader:
    """Reads tensors, or ranges of their rows. Keeps the last file open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._stream = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the open file, if any."""
        if self._stream is not None:
            self._stream.close()
        self._path = self._stream = None

    def read(self, entry: TensorEntry, rows: slice | None = None) -> np.ndarray:
        """Reads a tensor, or the range `rows` of its first axis (both ends given, step 1).

        Returns:
          A new array of the tensor's own dtype.

        Raises:
          CheckpointError: the file changed since its header was read, or cannot be read.
        """
        start, shape = entry.start, entry.shape
        if rows is not None:
            start += rows.start * (entry.size // shape[0])
            shape = (rows.stop - rows.start, *shape[1:])
        array = np.empty(shape, FLOAT_DTYPES[entry.dtype])
        # Viewed as bytes, because bfloat16 does not support the buffer protocol.
        target = array.reshape(-1).view(np.uint8).data
        try:
            if self._path != entry.file:
                self.close()
                self._stream = entry.file.open("rb", buffering=0)
                self._path = entry.file
            assert self._stream is not None
            self._stream.seek(start)
            done = 0
            while done < len(target):
                count = self._stream.readinto(target[done:])
                if not count:
                    raise CheckpointError(
                        f"{entry.file} ended inside tensor {entry.key}: it was changed or cut "
                        "while it was being read."
                    )
                done += count
        except OSError as error:
            raise CheckpointError(
                f"cannot read tensor {entry.key} from {entry.file}: {os.strerror(error.errno or 0)}"
            ) from error
        return array
