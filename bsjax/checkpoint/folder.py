"""The files of a checkpoint's folder, checked before anything opens them."""

from pathlib import Path
from typing import Any

from bsjax.checks import shown
from bsjax.errors import CheckpointError
from bsjax.files import JSON_BYTES, check_file

PARAMETERS = "parameters"
"""The folder of the weights in a converted checkpoint."""

_READ_AS_TEXT = ("*.json", "*.txt", "*.jinja", "*.model", "LICENSE*", "additional_chat_templates/*")
_READ_IN_PIECES = ("*.safetensors", f"{PARAMETERS}/**/*")


def folder_path(path: Any) -> Path:
    """The path of a folder that a user names; `~` is the user's home.

    Raises:
      CheckpointError: it is not a path, in the home of an unknown user, or not in UTF-8.
    """
    try:
        folder = Path(path).expanduser()
        # The libraries that read and write weights take no other names.
        str(folder.absolute()).encode()
    except (TypeError, RuntimeError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{shown(path)} is not the path of a folder: {error}.") from error
    return folder


def files_read(folder: Path) -> dict[Path, int | None]:
    """The files that bsjax or transformers may open in a checkpoint, converted or not.

    Returns:
      The largest size in bytes that each file may have; None for any size.
    """
    limits: dict[Path, int | None] = {}
    for patterns, limit in ((_READ_AS_TEXT, JSON_BYTES), (_READ_IN_PIECES, None)):
        for pattern in patterns:
            limits |= {file: limit for file in folder.glob(pattern) if not file.is_dir()}
    return limits


def check_folder(folder: Path) -> None:
    """Rejects a checkpoint with files that are not ordinary files, or are too large to read.

    Raises:
      CheckpointError: names the file.
    """
    for file, limit in files_read(folder).items():
        check_file(file, error=CheckpointError, limit=limit)
