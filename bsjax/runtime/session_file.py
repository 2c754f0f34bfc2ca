"""A session as a file: the caches of its conversations, kept across processes.

The file is in safetensors format. It holds the rows of the caches that are in use, the tokens, and
what they depend on: the checkpoint, the profile's categories and sinks, and the dtype. Key heads
are in the checkpoint's order, each once, on whatever devices they have been.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import shown, whole_number
from bsjax.errors import SessionError
from bsjax.masks.template import Template
from bsjax.models.sharding import sharded_shapes
from bsjax.profiles.profile import Profile
from bsjax.runtime.kept_cache import MOST_CONVERSATIONS, KeptCache, KeptConversation
from bsjax.runtime.processes import fetched, spans_processes
from bsjax.runtime.reuse import CachedTokens
from bsjax.runtime.sizes import cache_rows
from bsjax.unfinished import atomic_replacement, held

_FORMAT = "bsjax session 5"

_DTYPES = {"int32": "I32", "bool": "BOOL", "uint8": "U8"}
"""What safetensors calls the dtypes of the arrays in a session."""

Heads = Int[np.ndarray, "_ _"]
"""The checkpoint's key head at each place [layers, heads] of an array of the cache."""


@dataclass(frozen=True, eq=False)
class SavedSession:
    """What a file holds.

    Attributes:
      max_tokens: the most tokens of a prompt and its answer.
      most: the most conversations.
      conversations: the conversations, least recently used first.
    """

    max_tokens: int
    most: int
    conversations: list[KeptConversation]


def write_session(
    path: str | os.PathLike[str],
    model: LoadedModel,
    profile: Profile | None,
    kept: KeptCache,
) -> None:
    """Writes a file completely or not at all.

    Raises:
      SessionError: it cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    described: dict[str, Any] = {"max_tokens": kept.max_tokens, "most": kept.most}
    described["conversations"] = []
    heads = _heads_of_leaves(model)
    for number, (tokens, prompt_tokens, cache) in enumerate(kept.conversations):
        used = tokens.token_ids.size
        arrays[f"{number}.token_ids"] = tokens.token_ids
        arrays[f"{number}.image"] = tokens.template.image
        arrays[f"{number}.sink"] = tokens.template.sink
        for index, leaf in enumerate(jax.tree.leaves(cache)):
            # Also of a ring: before it is full, its last rows are not in use.
            rows = np.ascontiguousarray(_as_stored(fetched(leaf)[:, :used], heads[index]))
            arrays[f"{number}.cache.{index}"] = rows.view(np.uint8)
        described["conversations"].append(
            {
                "images": tokens.images,
                "span_starts": tokens.span_starts,
                "prompt_tokens": prompt_tokens,
            }
        )
    header = {
        "format": _FORMAT,
        "depends_on": _depends_on(model, profile),
        "session": described,
        "sha256": content_digest(arrays, described),
    }
    if spans_processes(model.mesh) and jax.process_index() > 0:
        return  # The first process writes what all of them have gathered.
    try:
        with atomic_replacement(Path(path)) as temporary:
            with open(temporary, "xb", opener=_private) as file, held(temporary):
                write_arrays(file, arrays, {"bsjax": json.dumps(header)})
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise SessionError(f"The session cannot be written to {path}: {error}.") from error


def _private(path: str, flags: int) -> int:
    """Creates a file that only this user can read."""
    return os.open(path, flags, 0o600)


def write_arrays(file: BinaryIO, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes arrays in safetensors format, one after the other.

    The library's `save_file` copies all of them first, and writes them to a temporary file with a
    name of its own, which nobody removes if the process is killed.
    """
    # The format asks for this order, in which all arrays are aligned.
    names = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in names:
        array = arrays[name]
        start, end = end, end + array.nbytes
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        file.write(np.ascontiguousarray(arrays[name]).view(np.uint8).data)


def read_session(
    path: str | os.PathLike[str], model: LoadedModel, profile: Profile | None
) -> SavedSession:
    """Reads a file, and checks that it is whole and belongs to the model and the profile.

    Raises:
      SessionError: the file is missing, damaged, or of another model, profile or dtype.
    """
    if not os.path.isfile(path):
        raise SessionError(f"There is no session file {path}.")
    try:
        with safe_open(path, "numpy") as file:
            header = json.loads((file.metadata() or {}).get("bsjax", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != _FORMAT:
            raise SessionError(
                f"{path} is not a session of this version of bsjax: its format is "
                f"{shown(header.get('format'))}, not {_FORMAT!r}."
            )
        depends_on, described = header["depends_on"], header["session"]
        whole = header["sha256"] == content_digest(arrays, described)
    except SessionError:
        raise
    except (SafetensorError, OSError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise SessionError(
            f"{path} is damaged, or not a session ({error}): begin a new one."
        ) from error
    if not whole:
        raise SessionError(
            f"{path} is damaged, as its checksum does not match: begin a new session."
        )
    for name, wanted in _depends_on(model, profile).items():
        if depends_on.get(name) != wanted:
            raise SessionError(
                f"{path} was saved with another {name}. Load it with the one that it was saved "
                "with, or begin a new session."
            )
    try:
        return _restored(arrays, described, model)
    except (LookupError, TypeError, ValueError) as error:
        raise SessionError(
            f"{path} is damaged, or not a session ({error}): begin a new one."
        ) from error


def _restored(
    arrays: dict[str, np.ndarray], described: dict[str, Any], model: LoadedModel
) -> SavedSession:
    """The session in a file.

    Raises:
      LookupError, TypeError, ValueError: the file does not hold what `write_session` writes.
    """
    limit = model.config.get_text_config().max_position_embeddings
    max_tokens = whole_number(
        "max_tokens", described["max_tokens"], least=2, most=limit, error=SessionError
    )
    most = whole_number(
        "conversations", described["most"], least=1, most=MOST_CONVERSATIONS, error=SessionError
    )
    of_each = described["conversations"]
    if not isinstance(of_each, list) or len(of_each) > most:
        raise ValueError("it has too many conversations")
    language_model = model.module.language_model
    shapes = jax.eval_shape(partial(language_model.empty_cache, cache_rows(max_tokens)))
    shapes = sharded_shapes(shapes, language_model.mesh)
    conversations = [
        _conversation(arrays, f"{number}.", each, max_tokens, shapes, _heads_of_leaves(model))
        for number, each in enumerate(of_each)
    ]
    return SavedSession(max_tokens, most, conversations)


def _conversation(
    arrays: dict[str, np.ndarray],
    prefix: str,
    described: dict[str, Any],
    max_tokens: int,
    shapes: Any,
    heads: Sequence[Heads],
) -> KeptConversation:
    """One conversation, whose arrays have names that begin with `prefix`.

    Raises:
      LookupError, TypeError, ValueError: as for `_restored`.
    """
    template = Template(arrays[f"{prefix}image"], arrays[f"{prefix}sink"])
    token_ids, images = arrays[f"{prefix}token_ids"], tuple(described["images"])
    span_starts, prompt_tokens = tuple(described["span_starts"]), described["prompt_tokens"]
    if not (
        token_ids.dtype == np.int32
        and token_ids.shape == (template.tokens,)
        and 0 < template.tokens <= max_tokens
        and len(images) == template.num_images
        and span_starts[:1] == (0,)
        and all(type(start) is int for start in (*span_starts, prompt_tokens))
        and all(np.diff((*span_starts, template.tokens)) > 0)
        and 0 < prompt_tokens <= template.tokens
    ):
        raise ValueError("its tokens do not match")
    leaves, structure = jax.tree.flatten(shapes)
    filled = []
    for index, leaf in enumerate(leaves):
        rows = arrays[f"{prefix}cache.{index}"].view(leaf.dtype)
        used = min(template.tokens, leaf.shape[1])
        stored_heads = int(heads[index].max()) + 1
        if rows.shape != (leaf.shape[0], used, stored_heads, leaf.shape[3]):
            raise ValueError("its cache does not match its tokens")
        filled.append(_padded(_as_in_model(rows, heads[index]), leaf.shape, leaf.sharding))
    tokens = CachedTokens(token_ids, images, template, span_starts)
    return KeptConversation(tokens, prompt_tokens, jax.tree.unflatten(structure, filled))


def _heads_of_leaves(model: LoadedModel) -> list[Heads]:
    """The checkpoint's key head at each place of the model, for each array of its cache."""
    text = model.config.get_text_config()
    kinds = np.asarray(model.family.layer_kinds(model.config))
    order = np.tile(np.arange(text.num_key_value_heads), (kinds.size, 1))
    repeats = model.module.language_model.kv_heads // text.num_key_value_heads
    # Key heads that are repeated stay in their order.
    if model.head_order is not None and repeats == 1:
        order = model.head_order.kv_heads
    heads = np.repeat(order, repeats, axis=1)
    # Each kind of layers has an array of keys and one of values.
    return [heads[kinds == kind] for kind in np.unique(kinds) for _ in range(2)]


def _as_stored(rows: np.ndarray, heads: Heads) -> np.ndarray:
    """The rows of a cache [layers, used, heads, head_dim] with the checkpoint's key heads."""
    repeats = heads.shape[1] // (int(heads.max()) + 1)
    first_places = np.argsort(heads, axis=1, kind="stable")[:, ::repeats]
    return _taken(rows, first_places)


def _as_in_model(rows: np.ndarray, heads: Heads) -> np.ndarray:
    """The inverse of `_as_stored`."""
    return _taken(rows, heads)


def _taken(rows: np.ndarray, places: Heads) -> np.ndarray:
    """The rows of a cache with the heads of each layer taken from these places."""
    if np.array_equal(places, np.tile(np.arange(rows.shape[2]), (len(places), 1))):
        return rows
    return np.take_along_axis(rows, places[:, None, :, None], axis=2)


def _padded(
    rows: np.ndarray, shape: tuple[int, ...], where: jax.sharding.Sharding | None
) -> jax.Array:
    """An array of a cache with these rows, followed by zeros.

    Args:
      rows: [layers, used, kv_heads, head_dim].
      shape: of the array.
      where: where it is; None for the default device.
    """
    used = rows.shape[1]
    if where is None:
        return jnp.zeros(shape, rows.dtype).at[:, :used].set(rows)

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        layers, of_device, heads, _ = index or (slice(None),) * 4
        first, end, _ = of_device.indices(shape[1])
        own = rows[layers, first:end, heads]
        padded = np.zeros((own.shape[0], end - first, *own.shape[2:]), rows.dtype)
        padded[:, : own.shape[1]] = own
        return padded

    return jax.make_array_from_callback(shape, where, part)


def _depends_on(model: LoadedModel, profile: Profile | None) -> dict[str, str]:
    """What keys and values depend on, other than the tokens."""
    if profile is None:
        of_profile = "dense"
    else:
        digest = hashlib.sha256(np.ascontiguousarray(profile.categories, np.int8).tobytes())
        digest.update(repr(profile.sinks).encode())
        of_profile = digest.hexdigest()
    return {
        "checkpoint": model.fingerprint,
        "settings": _settings_digest(model),
        "profile": of_profile,
        "dtype": str(model.dtype),
    }


def _settings_digest(model: LoadedModel) -> str:
    """SHA-256 of the checkpoint's config and image settings, which its weights do not determine."""
    settings = [model.config.to_dict()]
    if model.image_processor is not None:
        settings.append(model.image_processor.to_dict())
    for each in settings:
        # Where a checkpoint came from makes no difference.
        for name in ("_name_or_path", "transformers_version"):
            each.pop(name, None)
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def content_digest(arrays: dict[str, np.ndarray], described: dict[str, Any]) -> str:
    """SHA-256 of all arrays and of what describes them."""
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()
