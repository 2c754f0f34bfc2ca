"""Several processes, each with some of the devices of a mesh (`jax.distributed`).

All processes make the same calls with the same arguments. What a call decides on the host must
therefore be the same everywhere, and what it returns is.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from bsjax.errors import GenerationError

_MIB = 2**20


def spans_processes(mesh: Mesh | None) -> bool:
    """Whether some devices of a mesh belong to other processes."""
    return mesh is not None and mesh.is_multi_process


def own_devices(mesh: Mesh | None) -> list[bool]:
    """Which devices of a mesh are this process's, in the order of `Shares` along all axes."""
    if mesh is None:
        return [True]
    return [device.process_index == jax.process_index() for device in mesh.devices.flat]


def check_alike(given: Mapping[str, bytes]) -> None:
    """Rejects a call for which processes were given different things.

    Args:
      given: what must be the same, by its name in messages.

    Raises:
      GenerationError: in all processes. The message names the process and what differs.
    """
    digests = [hashlib.sha256(each).digest()[:8] for each in given.values()]
    own = np.frombuffer(b"".join(digests), np.int32).reshape(len(given), 2)
    gathered = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, *own.shape)
    for process, others in enumerate(gathered):
        differing = [
            name
            for name, *each in zip(given, others, gathered[0], strict=True)
            if not np.array_equal(*each)
        ]
        if differing:
            raise GenerationError(
                f"Process {process} has another {differing[0]} than process 0: start all of them "
                "with the same arguments, files and checkpoint."
            )


def placed(tree: Any, shapes: Any) -> Any:
    """Arguments of a program whose devices belong to several processes.

    Args:
      tree: arrays of the host, which are the same in all processes, and of devices.
      shapes: their shapes, with shardings.
    """

    def place(leaf: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if isinstance(leaf, jax.Array):
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(shape.shape, shape.sharding, lambda part: array[part])

    return jax.tree.map(place, tree, shapes)


def fetched(array: jax.Array) -> np.ndarray:
    """The whole array, on the host of every process."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def least_of_all(size: int | None, mesh: Mesh | None) -> int | None:
    """The least of the bytes that all processes name; None if one of them names none.

    Args:
      size: what this process names.
      mesh: the devices. If all are this process's, the others are not asked.
    """
    if not spans_processes(mesh):
        return size
    return from_mib(multihost_utils.process_allgather(in_mib(size)))


def argument_of_least(argument: int, size: int) -> int:
    """The argument of the process that names the least size, in bytes."""
    named = multihost_utils.process_allgather(np.asarray([argument, in_mib(size)], np.int32))
    arguments, sizes = np.asarray(named).reshape(-1, 2).T
    return int(arguments[np.argmin(sizes)])


def in_mib(size: int | None) -> np.int32:
    """Bytes in MiB, rounded down, because devices have no larger integers; -1 for None."""
    return np.int32(-1 if size is None else min(size // _MIB, 2**31 - 1))


def from_mib(sizes: np.ndarray) -> int | None:
    """The least of several sizes in MiB, in bytes; None if one is negative."""
    least = int(np.min(sizes))
    return None if least < 0 else least * _MIB
