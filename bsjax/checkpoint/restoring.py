"""Reads the weights of a converted checkpoint, one parameter at a time, into arrays on devices.

Orbax restores all arrays of a tree concurrently and holds many of them in both encoded and decoded
form: nearly twice the size of the model. The handler here replaces Orbax's own. It reads one
parameter, casts it chunk by chunk and moves it to the device before it starts on the next. On a
CPU, the model uses the array as read, without a copy. Of a parameter that is divided among devices,
a process reads the chunks that its own devices have something of, layer by layer.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from bsjax.checks import shown
from bsjax.errors import CheckpointError
from bsjax.files import read_json_object
from bsjax.models.collectives import TENSOR
from bsjax.progress import Progress, no_progress

# JAX uses arrays with this alignment in place and copies all others.
_ALIGNMENT = 64

# Seconds. A parameter of all layers of a large model is gigabytes.
_LOOK_AGAIN = 0.1

# Chunks read and decoded concurrently. More would not be faster, and each is in memory twice.
_CHUNKS_AT_ONCE = 4

# Bytes of decoded chunks that are kept while a parameter is read, beside those of one chunk. So a
# chunk that several devices have something of is read once.
_KEPT_BYTES = 2**24

CODECS: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
"""How a chunk of an array is stored. The checksum is what finds damaged weights."""


def codecs_of(inner_chunks: Sequence[int] | None) -> list[dict[str, Any]]:
    """The codecs of an array.

    Args:
      inner_chunks: the shape of Zarr's inner chunks, which are read by themselves and have their
        own checksums, although a file has many of them; None if each chunk is read as a whole.
    """
    if inner_chunks is None:
        return CODECS
    settings = {"chunk_shape": list(inner_chunks), "codecs": CODECS, "index_codecs": CODECS}
    return [{"name": "sharding_indexed", "configuration": settings}]


# The fields that the converter writes into a zarr.json. Others can change how chunks are read.
_FIELDS = {
    *("zarr_format", "node_type", "shape", "data_type", "fill_value"),
    *("chunk_grid", "chunk_key_encoding", "codecs"),
}

# Axes of the matrices of all layers.
_STACKED = 3

# Files of Orbax about the whole tree.
_METADATA = ("_METADATA", "_CHECKPOINT_METADATA")

_AGAIN = "Convert the checkpoint again."


Runs = tuple[tuple[int, int], ...]
"""Runs of entries along an axis: the first of each, and one past the last."""


class Placement(NamedTuple):
    """Where a parameter goes.

    Attributes:
      shape: its shape and dtype in the model.
      sharding: where its parts are.
      repeats: how often each block of the last axis of the stored array is repeated.
      block: entries of such a block. If it is repeated, each device has one block.
      order: int [layers, blocks], which block of the stored array is at each place, along the axis
        that is divided; None if they stay where they are.
    """

    shape: jax.ShapeDtypeStruct
    sharding: jax.sharding.Sharding
    repeats: int = 1
    block: int = 1
    order: np.ndarray | None = None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the stored array."""
        *others, last = self.shape.shape
        return (*others, last // self.repeats)

    @property
    def axis(self) -> int:
        """The axis that is divided among devices; the last one if none is."""
        spec = getattr(self.sharding, "spec", ())
        return spec.index(TENSOR) if TENSOR in spec else len(self.shape.shape) - 1

    def stored_runs(self, first: int, end: int, layer: int) -> Runs:
        """Where the entries of a part of the parameter are in the stored array, along `axis`.

        Args:
          first: of the part, the first entry along `axis`.
          end: one past the last.
          layer: the layer, which has an order of its own.
        """
        if self.order is not None:
            blocks = self.order[layer, first // self.block : end // self.block]
            ends = np.flatnonzero(np.diff(blocks) != 1) + 1
            runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(blocks, ends)]
            return tuple((start * self.block, stop * self.block) for start, stop in runs)
        if self.repeats > 1:
            start = first // self.block // self.repeats * self.block
            return ((start, start + self.block),)
        return ((first, end),)


class OneAtATime(ocp.type_handlers.NumpyHandler):
    """Restores Orbax's NumPy arrays as JAX arrays, one after the other.

    Args:
      placements: where each parameter goes, by its name.
      restored: called with the bytes of each array when it is on its devices.
      look: called now and then. What it raises ends the reading.
    """

    def __init__(
        self,
        placements: Mapping[str, Placement],
        restored: Callable[[int], None],
        look: Callable[[], None],
    ) -> None:
        super().__init__()
        self._placements = placements
        self._restored, self._look = restored, look

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> Sequence[Any]:
        """Reads the parameters, each cast to the dtype in its `RestoreArgs`.

        Raises:
          CheckpointError: a parameter's files are missing or damaged. Every chunk that is read is
            checked against its checksum.
        """
        return [self._read(info) for info in infos]

    def _read(self, info: ocp.type_handlers.ParamInfo) -> jax.Array:
        placement = self._placements[info.name]
        shape, sharding = placement.shape.shape, placement.sharding
        axis = placement.axis
        # The devices of each part, by its first entry along the axis and one past the last.
        parts: dict[tuple[int, int], list[Any]] = {}
        for device, index in sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            first, end, _ = index[axis].indices(shape[axis])
            parts.setdefault((first, end), []).append(device)
        store = self._opened(info)
        if placement.order is not None or (len(parts) > 1 and len(shape) == _STACKED):
            on_devices = self._read_layers(info, store, placement, parts)
        else:
            on_devices = []
            for part, devices in parts.items():
                array = self._read_runs(info, store, axis, placement.stored_runs(*part, 0))
                on_devices += [jax.device_put(array, device) for device in devices]
                jax.block_until_ready(on_devices)
                # Before the next part takes as much memory again.
                del array
        whole = jax.make_array_from_single_device_arrays(shape, sharding, on_devices)
        self._restored(whole.nbytes)
        return whole

    def _read_layers(
        self,
        info: ocp.type_handlers.ParamInfo,
        store: Any,
        placement: Placement,
        parts: Mapping[tuple[int, int], Sequence[Any]],
    ) -> list[jax.Array]:
        """The parts of stacked arrays, on their devices.

        Args:
          info: Orbax's description of the parameter.
          store: the stored array.
          placement: where it goes.
          parts: the devices of each part, by its first entry along `placement.axis` and one past
            the last.
        """
        axis, shape = placement.axis, placement.shape.shape
        stacked = {
            device: jnp.zeros(
                (*shape[:axis], end - first, *shape[axis + 1 :]),
                placement.shape.dtype,
                device=device,
            )
            for (first, end), devices in parts.items()
            for device in devices
        }
        for layer in range(shape[0]):
            of_this = store[layer : layer + 1]
            # Devices whose key heads are repeated have different parts of the same entries.
            devices_of: dict[Runs, list[Any]] = {}
            for part, devices in parts.items():
                devices_of.setdefault(placement.stored_runs(*part, layer), []).extend(devices)
            for runs, devices in devices_of.items():
                (array,) = self._read_runs(info, of_this, axis, runs)
                for device in devices:
                    own = jax.device_put(array, device)
                    stacked[device] = _with_layer(stacked[device], own, layer)
            jax.block_until_ready(list(stacked.values()))
        return list(stacked.values())

    def _opened(self, info: ocp.type_handlers.ParamInfo) -> Any:
        """The stored array of a parameter."""
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{info.path}/"},
            # All chunks were written, even if all zeros: a missing one means damage.
            "fill_missing_data_reads": False,
        }
        limit = {"limit": _CHUNKS_AT_ONCE}
        context = {"file_io_concurrency": limit, "data_copy_concurrency": limit}
        with _damage_named(info):
            store = tensorstore.open(spec, context=tensorstore.Context(context)).result()
            chunk: Any = store.chunk_layout.read_chunk.shape
            chunk_bytes = math.prod(chunk) * store.dtype.numpy_dtype.itemsize
            context["cache_pool"] = {"total_bytes_limit": chunk_bytes + _KEPT_BYTES}
            return tensorstore.open(spec, context=tensorstore.Context(context)).result()

    def _read_runs(
        self, info: ocp.type_handlers.ParamInfo, store: Any, axis: int, runs: Runs
    ) -> np.ndarray:
        """Some entries along an axis of a stored array, in the dtype of the model.

        Args:
          info: Orbax's description of the parameter.
          store: the stored array, or some of its layers.
          axis: the axis.
          runs: the entries.
        """
        dtype = self._placements[info.name].shape.dtype
        self._look()
        entries = sum(end - first for first, end in runs)
        array = _aligned((*store.shape[:axis], entries, *store.shape[axis + 1 :]), dtype)
        along = (slice(None),) * axis
        done = 0
        with _damage_named(info):
            reading = []
            for first, end in runs:
                place = array[(*along, slice(done, done + end - first))]
                run = tensorstore.cast(store[(*along, slice(first, end))], dtype)
                reading.append(tensorstore.array(place).write(run))
                done += end - first
            for each in reading:
                while not each.commit.done():
                    with contextlib.suppress(TimeoutError):
                        each.result(timeout=_LOOK_AGAIN)
                    self._look()
                each.result()
        # The stored values are finite; of the three dtypes only float16 has a smaller range.
        if dtype == np.float16 and not np.isfinite(array).all():
            raise CheckpointError(
                f"parameter {info.name} in {info.parent_dir} holds weights too large for float16. "
                "Load it as bfloat16 or float32."
            )
        return array


@contextlib.contextmanager
def _damage_named(info: ocp.type_handlers.ParamInfo) -> Iterator[None]:
    """Errors of tensorstore say which parameter they are about."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(
            f"parameter {info.name} in {info.parent_dir} is missing or damaged. {_AGAIN} ({error})"
        ) from error


@partial(jax.jit, donate_argnums=0)
def _with_layer(stacked: jax.Array, of_layer: jax.Array, layer: Any) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, of_layer, layer, 0)


def restore_parameters(
    folder: Path,
    wanted: Mapping[tuple[str, ...], Placement],
    stored: str,
    progress: Progress = no_progress,
    look: Callable[[], None] = lambda: None,
) -> dict[tuple[str, ...], jax.Array]:
    """Reads exactly the wanted parameters.

    Args:
      folder: the Orbax checkpoint, a tree of nested dictionaries.
      wanted: where every parameter goes, by its path.
      stored: the dtype that all parameters were stored in.
      progress: called after every parameter, with the bytes in memory so far and in all.
      look: called now and then. What it raises ends the reading.

    Raises:
      CheckpointError: the checkpoint is missing or damaged, or holds other parameters or shapes.
    """
    _check_names(folder, {".".join(path) for path in wanted})
    for name in _METADATA:
        if (folder / name).exists():
            read_json_object(folder / name, error=CheckpointError)
    for path, placement in wanted.items():
        _check_array(folder, ".".join(path), placement.stored_shape, stored)
    shapes = {path: placement.shape for path, placement in wanted.items()}
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in shapes.values())
    done = 0

    def restored(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress("loading weights", done, total)

    progress("loading weights", 0, total)
    by_name = {".".join(path): placement for path, placement in wanted.items()}
    registry = ocp.type_handlers.create_type_handler_registry(
        (np.ndarray, OneAtATime(by_name, restored, look)),
        # Not used, but without it Orbax warns.
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, type_handler_registry=registry
    )
    arguments = {
        path: ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
        for path, leaf in shapes.items()
    }
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            restored = checkpointer.restore(
                folder.absolute(), ocp.args.PyTreeRestore(restore_args=nested(arguments))
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise CheckpointError(
            f"{folder} is damaged: its {_METADATA[0]} cannot be read ({error}). {_AGAIN}"
        ) from error
    arrays = _flat(restored)
    # Orbax's metadata may say that a parameter is not to be read.
    absent = [path for path in wanted if not isinstance(arrays.get(path), jax.Array)]
    if absent:
        raise CheckpointError(
            f"{folder} is damaged: its {_METADATA[0]} does not describe the parameter "
            f"{'.'.join(absent[0])}. {_AGAIN}"
        )
    return arrays


def _check_array(folder: Path, name: str, shape: tuple[int, ...], stored: str) -> None:
    """Rejects an array that is not stored as the converter stores arrays.

    Another order of bytes makes other weights of the same file, and large or compressed chunks may
    take more memory than the model.
    """
    file = folder / name / "zarr.json"
    found = read_json_object(file, error=CheckpointError)
    if found.get("shape") != list(shape):
        raise CheckpointError(
            f"{folder}: parameter {name} has shape {shown(found.get('shape'))}, but the model in "
            f"config.json needs {list(shape)}. {_AGAIN}"
        )
    if found.get("data_type") != stored:
        raise CheckpointError(
            f"{folder}: parameter {name} is stored as {shown(found.get('data_type'))}, but the "
            f"checkpoint was converted to {stored}: its zarr.json was changed. {_AGAIN}"
        )
    grid = found.get("chunk_grid")
    chunk = _chunk_shape(grid, shape)
    codecs = found.get("codecs")
    inner = None
    if chunk is not None and isinstance(codecs, list) and codecs and codecs != CODECS:
        inner = _chunk_shape(codecs[0], chunk)
    if (
        found.keys() - _FIELDS
        or chunk is None
        or codecs != codecs_of(inner)
        or any(side % part for side, part in zip(chunk, inner or chunk, strict=True))
    ):
        raise CheckpointError(
            f"{file} was changed: it does not describe an array as the converter writes it. "
            f"{_AGAIN}"
        )


def _chunk_shape(described: Any, whole: Sequence[int]) -> tuple[int, ...] | None:
    """The shape of chunks, from the description of a grid or of a codec.

    None if they are not parts of what they are chunks of, whose shape is `whole`.
    """
    settings = described.get("configuration") if isinstance(described, dict) else None
    sides = settings.get("chunk_shape") if isinstance(settings, dict) else None
    if not isinstance(sides, list) or len(sides) != len(whole):
        return None
    if not all(
        type(side) is int and 1 <= side <= most for side, most in zip(sides, whole, strict=True)
    ):
        return None
    return tuple(sides)


def _aligned(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array with JAX's alignment."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _check_names(folder: Path, wanted: set[str]) -> None:
    """Compares names before Orbax does, because its error does not say which are missing."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is missing. {_AGAIN}")
    # Orbax stores each array in a folder of its own, described by its zarr.json.
    stored = {file.parent.name for file in folder.glob("*/zarr.json")}
    for names, what in (
        (wanted - stored, "lacks"),
        (stored - wanted, "has, unlike the model in config.json,"),
    ):
        if names:
            listed = sorted(names)
            more = f" and {len(listed) - 20} more" if len(listed) > 20 else ""
            raise CheckpointError(
                f"{folder} {what} {len(listed)} parameters: "
                f"{', '.join(listed[:20])}{more}. {_AGAIN}"
            )


def nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    """Turns a dictionary of leaves by path into nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def _flat(tree: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: leaf
        for key, node in tree.items()
        for name, leaf in _flat(node, (*path, str(key))).items()
    }
