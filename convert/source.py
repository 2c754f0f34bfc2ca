"""Locates a Hugging Face checkpoint: a local folder, or a hub id to download."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from bsjax.checkpoint.folder import check_folder, files_read, folder_path
from bsjax.checkpoint.loading import HUB_ID
from bsjax.errors import CheckpointError
from bsjax.files import read_json_object
from convert.safetensors_file import TensorEntry, read_header

DOWNLOAD_PATTERNS = ["*.safetensors", "*.json", "*.txt", "*.jinja", "LICENSE*"]
"""Files to download from the hub. Pickled weights are not among them."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Hugging Face checkpoint on this machine.

    Attributes:
      folder: where its files are.
      name: the path or hub id that the user gave.
      revision: the hub's commit, None for a local folder.
      config: the contents of config.json.
      tensors: every tensor of every shard, by its key in the file.
    """

    folder: Path
    name: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]


def open_source(source: str | Path, revision: str | None = None) -> Source:
    """Locates a Hugging Face checkpoint, downloads it if necessary, and indexes its tensors.

    Args:
      source: a local folder or a hub id such as "Qwen/Qwen2-VL-2B-Instruct".
      revision: the hub's branch, tag or commit. Only for a hub id.

    Raises:
      CheckpointError: the checkpoint does not exist, cannot be fetched or is pickled, or a file is
        missing or damaged.
    """
    # Unlike the methods of Path, these do not raise for a name that no path can have.
    local = folder_path(source)
    if os.path.isdir(local):
        if revision is not None:
            raise CheckpointError(f"{local} is a local folder: a revision is for hub ids only.")
        folder, commit = local, None
    elif os.path.exists(local):
        raise CheckpointError(f"{local} is a file. Give the folder that holds config.json.")
    else:
        folder = _fetch(str(source), revision)
        # A snapshot's folder is named after its commit.
        commit = folder.name
    check_folder(folder)
    _check_links(folder)
    config = _read_config(folder)
    return Source(folder, str(source), commit, config, _index(folder))


def _fetch(name: str, revision: str | None) -> Path:
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"there is no folder {name}.")
    # Imported here, because a local conversion does not need the hub's client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = f"there is no folder {name} here, and the Hugging Face hub "
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOAD_PATTERNS))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{missing}requires you to accept the licence of {name} first: open "
            f"https://huggingface.co/{name} and then log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{missing}has no revision {revision!r} of {name}.") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{missing}has no public checkpoint of that name. Check the spelling; for a private "
            "one log in with `hf auth login`."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{missing}cannot be reached, nor is {name} in its local cache. Connect to the "
            "internet, or download the checkpoint elsewhere and give its folder."
        ) from error
    except Exception as error:
        # The client also raises the errors of its HTTP library, which differ between versions.
        raise CheckpointError(f"{missing}did not deliver {name}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if (folder / "bsjax.json").is_file():
        raise CheckpointError(f"{folder} is a converted checkpoint already: bsjax.load reads it.")
    config = read_json_object(file, error=CheckpointError)
    if "model_type" not in config:
        raise CheckpointError(
            f"{file} has no model_type: it is not the config of a transformers checkpoint."
        )
    return config


def _check_links(folder: Path) -> None:
    """Rejects links out of the folder, through which its author could have any file copied.

    A snapshot in the hub's cache consists of links to files in the cache's `blobs` folder.
    """
    own = folder.resolve()
    allowed = [own]
    if own.parent.name == "snapshots":
        allowed.append(own.parent.parent / "blobs")
    for file in files_read(folder):
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{file} is a link to {target}, which is not in the checkpoint's folder: links are "
                "followed only inside it and inside the hub's cache. Put the file itself there."
            )


def _index(folder: Path) -> dict[str, TensorEntry]:
    """The tensors of all shards, in the order in which transformers looks for weights."""
    single, index = folder / "model.safetensors", folder / _INDEX
    if single.is_file():
        return read_header(single)
    if index.is_file():
        return _sharded(folder, index)

    weights = sorted(file.name for file in folder.glob("*.safetensors"))
    if weights:
        raise CheckpointError(
            f"{folder} holds {len(weights)} safetensors files ({weights[0]}, ...) but neither "
            f"model.safetensors nor {_INDEX}, which says what belongs to the model."
        )
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds pickled weights only ({pickles[0]}): unpickling runs whatever code "
            "the file contains, so they are refused. Use a revision with safetensors, or load the "
            "weights with transformers in a sandbox: its save_pretrained writes safetensors."
        )
    raise CheckpointError(f"{folder} holds no weights: neither model.safetensors nor {_INDEX}.")


def _sharded(folder: Path, index: Path) -> dict[str, TensorEntry]:
    weight_map = read_json_object(index, error=CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it is damaged.")
    shards = sorted(set(map(str, weight_map.values())))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{index} names {outside[0]!r}, which is not a file of its folder.")
    # Unlike the method of Path, this does not raise for a name that no path can have.
    missing = [shard for shard in shards if not os.path.isfile(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(shards)} shards: {join_names(missing)}. "
            "Download them again."
        )
    tensors: dict[str, TensorEntry] = {}
    for shard in shards:
        entries = read_header(folder / shard)
        twice = sorted(entries.keys() & tensors.keys())
        if twice:
            raise CheckpointError(
                f"{join_names(twice)} is in both {tensors[twice[0]].file.name} and {shard}."
            )
        tensors |= entries
    absent = sorted(key for key in weight_map if key not in tensors)
    if absent:
        raise CheckpointError(
            f"{index} lists tensors that their shards do not hold: {join_names(absent)}."
        )
    return tensors


def join_names(names: list[str], limit: int = 20) -> str:
    """Joins names for a message: at most `limit` names, then the number of omitted ones."""
    listed = ", ".join(names[:limit])
    return listed if len(names) <= limit else f"{listed} and {len(names) - limit} more"
