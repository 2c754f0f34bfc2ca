"""Reads the weights of a converted checkpoint, one parameter at a time, into arrays on devices.

Orbax restores all arrays of a tree concurrently and holds many of them in both encoded and decoded
form: nearly twice the size of the model. The handler here replaces Orbax's own. It reads one
parameter, casts it chunk by chunk and moves it to the device before it starts on the next. On a
CPU, the model uses the array as read, without a copy. A parameter that is divided among devices is
read layer by layer, and each device is given its part of the layer.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
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

CODECS: list[dict[str, Any]] = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]
"""How a chunk of an array is stored. The checksum is what finds damaged weights."""

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

    def stored(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """Which part of the stored array is this part of the parameter."""
        if self.repeats == 1:
            return index
        *others, last = index
        first = (last.start or 0) // self.block // self.repeats * self.block
        return (*others, slice(first, first + self.block))

    def ordered(self, of_layer: np.ndarray, layer: int) -> np.ndarray:
        """The array of a layer with its blocks in the order that the model has them in."""
        if self.order is None:
            return of_layer
        axis = self.sharding.spec.index(TENSOR) - 1  # pyright: ignore[reportAttributeAccessIssue]
        shape = of_layer.shape
        blocks = of_layer.reshape(*shape[:axis], -1, self.block, *shape[axis + 1 :])
        return np.take(blocks, self.order[layer], axis=axis).reshape(shape)


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
        limit = {"limit": _CHUNKS_AT_ONCE}
        self._context = tensorstore.Context(
            {"file_io_concurrency": limit, "data_copy_concurrency": limit}
        )

    async def deserialize(
        self,
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.RestoreArgs] | None = None,
    ) -> Sequence[Any]:
        """Reads the parameters, each cast to the dtype in its `RestoreArgs`.

        Raises:
          CheckpointError: a parameter's files are missing or damaged. Every chunk is checked
            against its checksum.
        """
        return [self._read(info) for info in infos]

    def _read(self, info: ocp.type_handlers.ParamInfo) -> jax.Array:
        placement = self._placements[info.name]
        shape, sharding = placement.shape.shape, placement.sharding
        of_devices = sharding.addressable_devices_indices_map(shape)
        parts: dict[tuple[Any, ...], list[Any]] = {}
        for device, index in of_devices.items():
            assert index is not None
            slices = zip(index, shape, strict=True)
            bounds = tuple(axis.indices(size)[:2] for axis, size in slices)
            parts.setdefault(bounds, []).append(device)
        if placement.order is not None or (len(parts) > 1 and len(shape) == _STACKED):
            on_devices = self._read_layers(info, placement, parts)
        else:
            on_devices = []
            for bounds, devices in parts.items():
                part = placement.stored(tuple(slice(*axis) for axis in bounds))
                array = self._read_part(info, part, placement.shape.dtype)
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
        placement: Placement,
        parts: Mapping[tuple[Any, ...], Sequence[Any]],
    ) -> list[jax.Array]:
        """The parts of stacked arrays, on their devices.

        Each layer is stored in chunks of its own and read once, for all parts.

        Args:
          info: Orbax's description of the parameter.
          placement: where it goes.
          parts: the devices of each part, by the bounds of its slices.
        """
        layers, *of_layer = placement.stored_shape
        whole = tuple(slice(0, size) for size in of_layer)
        indices = {
            device: placement.stored(tuple(slice(*axis) for axis in bounds))[1:]
            for bounds, devices in parts.items()
            for device in devices
        }
        stacked = {
            device: jnp.zeros(
                (layers, *(end - start for start, end in bounds[1:])),
                placement.shape.dtype,
                device=device,
            )
            for bounds, devices in parts.items()
            for device in devices
        }
        for layer in range(layers):
            of_this = slice(layer, layer + 1)
            (array,) = self._read_part(info, (of_this, *whole), placement.shape.dtype)
            array = placement.ordered(array, layer)
            for device, index in indices.items():
                own = jax.device_put(np.ascontiguousarray(array[index]), device)
                stacked[device] = _with_layer(stacked[device], own, layer)
            jax.block_until_ready(list(stacked.values()))
        return list(stacked.values())

    def _read_part(
        self, info: ocp.type_handlers.ParamInfo, part: tuple[slice, ...], dtype: np.dtype
    ) -> np.ndarray:
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": f"{info.path}/"},
            # All chunks were written, even if all zeros: a missing one means damage.
            "fill_missing_data_reads": False,
        }
        self._look()
        try:
            store = tensorstore.open(spec, context=self._context).result()[part]
            array = _aligned(store.shape, dtype)
            reading = tensorstore.array(array).write(tensorstore.cast(store, dtype))
            while not reading.commit.done():
                with contextlib.suppress(TimeoutError):
                    reading.result(timeout=_LOOK_AGAIN)
                self._look()
            reading.result()
        except ValueError as error:
            raise CheckpointError(
                f"parameter {info.name} in {info.parent_dir} is missing or damaged. {_AGAIN} "
                f"({error})"
            ) from error
        # The stored values are finite; of the three dtypes only float16 has a smaller range.
        if dtype == np.float16 and not np.isfinite(array).all():
            raise CheckpointError(
                f"parameter {info.name} in {info.parent_dir} holds weights too large for float16. "
                "Load it as bfloat16 or float32."
            )
        return array


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
    chunks = found.get("chunk_grid")
    sides = chunks.get("configuration") if isinstance(chunks, dict) else None
    sides = sides.get("chunk_shape") if isinstance(sides, dict) else None
    if (
        found.keys() - _FIELDS
        or found.get("codecs") != CODECS
        or not isinstance(sides, list)
        or len(sides) != len(shape)
        or not all(
            type(side) is int and 1 <= side <= most for side, most in zip(sides, shape, strict=True)
        )
    ):
        raise CheckpointError(
            f"{file} was changed: it does not describe an array as the converter writes it. "
            f"{_AGAIN}"
        )


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
