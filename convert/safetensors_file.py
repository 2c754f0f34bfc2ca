"""Reads safetensors files piece by piece, without mapping them into memory.

The `safetensors` package maps a whole file into memory and copies tensors out of it. Mapped pages
count towards a process's resident memory, so a converter would need as much memory as the size of
the checkpoint. Here, bytes are read directly into the final array, any range of rows at a time.

The format is https://github.com/huggingface/safetensors#format: eight bytes with the header's
length, a JSON header with each tensor's dtype, shape and byte range, then the tensors' bytes,
row-major and little-endian. The package itself says whether a header is valid.
"""

import dataclasses
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from bsjax.checks import shown
from bsjax.errors import CheckpointError
from bsjax.files import check_file, parse_json

FLOAT_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Supported dtypes of source tensors. Others (integers, float8) belong to quantised checkpoints,
whose tensors need further ones to give the weights."""

# Published checkpoints have headers of up to a few hundred kilobytes; the format allows 100 MB.
_LONGEST_HEADER = 16 * 2**20


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
    """Reads the header of `file`, once the safetensors library has found it valid.

    Returns:
      The tensors by name. Their byte ranges cover the file and match their shapes.

    Raises:
      CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    check_file(file, error=CheckpointError)
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if _LONGEST_HEADER < length <= file.stat().st_size:
                raise CheckpointError(
                    f"{file} has a header of {length:,} bytes, more than the {_LONGEST_HEADER:,} "
                    "that are read: it does not belong to a model."
                )
            # Maps the file into memory, checks its header, and reads nothing else.
            with safe_open(file, framework="numpy") as checked:
                names = set(checked.keys())
            content = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is not a valid safetensors file ({error}): it is truncated, damaged or "
            "another file. Download it again."
        ) from error
    # The library takes the last of two tensors with one name, and does not say so.
    header = parse_json(content, f"the header of {file}", error=CheckpointError, strict=True)
    header.pop("__metadata__", None)
    if header.keys() != names:
        raise CheckpointError(f"{file} changed while it was read. Convert it again.")
    for name, entry in header.items():
        # The library checks the product of the sizes, which is 0 for a tensor without elements.
        # NumPy checks that of the others, in bytes of at most 8 a value.
        if math.prod(max(size, 1) for size in entry["shape"]) * 8 >= 2**63:
            raise CheckpointError(
                f"the tensor {name} in {file} has the shape {shown(entry['shape'])}: no array can "
                "have it."
            )
    return {
        name: TensorEntry(
            name,
            file,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


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
