"""What the devices of a mesh tell each other while a program runs.

A program for a mesh runs on every device (`jax.shard_map`), with the device's parts of parameters,
cache and rows. The functions here are where devices need something of each other; between them,
code is the same as for one device. Where there is no mesh, each gives back what one device has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import stacked_arrays

TENSOR = "tensor"
"""The mesh axis of heads, MLP channels and vocabulary."""

CONTEXT = "context"
"""The mesh axis of rows: those of chunks, and those of the cache."""

ALL_AXES = (CONTEXT, TENSOR)
"""All axes: each device has something else."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Shares:
    """Values of which each device has its own: arrays with a leading axis, one entry for each.

    Programs are given their own entry (`own`), without that axis.

    Attributes:
      stacked: a pytree of arrays.
      axes: the mesh axes whose devices have different entries.
    """

    stacked: Any
    axes: tuple[str, ...] = field(default=(CONTEXT,), metadata={"static": True})

    @property
    def spec(self) -> PartitionSpec:
        """How each array is divided."""
        return PartitionSpec(self.axes)

    @property
    def own(self) -> Any:
        """The entry of this device, inside of a program."""
        return jax.tree.map(lambda array: array[0], self.stacked)


def is_shares(node: Any) -> bool:
    """For `jax.tree.map`."""
    return isinstance(node, Shares)


def shared_out(values: Sequence[Any], axes: tuple[str, ...] = (CONTEXT,)) -> Any:
    """One value for each device, as `Shares`; the value itself if there is only one.

    Args:
      values: pytrees of NumPy arrays, of one structure and, but for the tables of schedules, of
        the same shapes.
      axes: the mesh axes whose devices have different values.
    """
    if len(values) == 1:
        return values[0]
    return Shares(jax.tree.map(stacked_arrays, *values), axes)


def shape_of_shares(value: Any, devices: int, axes: tuple[str, ...]) -> Any:
    """The shapes of what `shared_out` makes of values of this shape, one for each device."""
    if devices == 1:
        return value

    def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((devices, *leaf.shape), leaf.dtype)

    return Shares(jax.tree.map(stacked, value), axes)


def devices_along(axis: str) -> int:
    """How many devices of the mesh have different values of an axis; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def own_index(axis: str) -> Any:
    """The index of this device among those along an axis."""
    return jax.lax.axis_index(axis) if devices_along(axis) > 1 else 0


def summed(array: Array, axis: str) -> Array:
    """The sum of what the devices along an axis have."""
    return jax.lax.psum(array, axis) if devices_along(axis) > 1 else array


def gathered(array: Array, mesh_axis: str, axis: int = 0) -> Array:
    """What the devices along a mesh axis have, one after the other along an axis of the array."""
    if devices_along(mesh_axis) == 1:
        return array
    return jax.lax.all_gather(array, mesh_axis, axis=axis, tiled=True)


def gathered_from_all(array: Array) -> Array:
    """What all devices of the mesh have, one after the other along the first axis."""
    for axis in reversed(ALL_AXES):
        array = gathered(array, axis)
    return array


def of_first_context(array: Array) -> Array:
    """What the first device along `CONTEXT` has, on all of them.

    Devices that compute the same need not round alike. What a loop depends on must be the same.
    """
    if devices_along(CONTEXT) == 1:
        return array
    return jax.lax.psum(jnp.where(own_index(CONTEXT) == 0, array, jnp.zeros_like(array)), CONTEXT)


def own_part(array: Array, mesh_axis: str, axis: int = 0) -> Array:
    """This device's part of an array that all devices have: the inverse of `gathered`."""
    devices = devices_along(mesh_axis)
    if devices == 1:
        return array
    size = array.shape[axis] // devices
    return jax.lax.dynamic_slice_in_dim(array, own_index(mesh_axis) * size, size, axis)


def rows_of_all(
    array: Float[Array, "rows *axes"], rows: Int[Array, "taken"]
) -> Float[Array, "taken *axes"]:
    """Some of the rows of all devices along `CONTEXT`, on each of them.

    Args:
      array: the rows of this device.
      rows: which rows, counted over the devices one after the other.
    """
    if devices_along(CONTEXT) == 1:
        return array[rows]
    own = rows - own_index(CONTEXT) * array.shape[0]
    is_own = (own >= 0) & (own < array.shape[0])
    is_own = is_own.reshape(-1, *(1,) * (array.ndim - 1))
    taken = jnp.where(is_own, array.at[own].get(mode="clip"), 0)
    return summed(taken, CONTEXT)


def embedded(table: nnx.Embed, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
    """`table(token_ids)`; each device along `TENSOR` has a part of the table."""
    if devices_along(TENSOR) == 1:
        return table(token_ids)
    embedding = table.embedding[...]
    own = token_ids - own_index(TENSOR) * embedding.shape[0]
    is_own = (own >= 0) & (own < embedding.shape[0])
    rows = embedding.at[own].get(mode="clip")
    return summed(jnp.where(is_own[:, None], rows, 0), TENSOR)
