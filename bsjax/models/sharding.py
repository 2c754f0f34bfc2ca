"""Where the parts of a model are on the devices of a mesh.

A mesh has the axis `tensor`: each of its devices has some of the heads, of the inner channels of
the MLPs and of the vocabulary. Parameters say so with names of logical axes
(`bsjax.models.parameters`). Everything else, such as hidden states, is on all devices.

Linear layers, attention and the lookup of embeddings are divided here, with `jax.shard_map`. Only
the output projection is left to XLA.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig

from bsjax.checks import shown, whole_number
from bsjax.errors import CheckpointError
from bsjax.models.cache import Cache

TENSOR = "tensor"
"""The mesh axis of heads, MLP channels and vocabulary."""

Q_HEADS, KV_HEADS, MLP, VOCABULARY = "q_heads", "kv_heads", "mlp", "vocabulary"
"""Logical axes of parameters that are divided among the devices of the axis `TENSOR`."""

OF_CACHE = PartitionSpec(None, None, TENSOR, None)
"""Arrays [layers, rows, kv_heads, head_dim]."""

OF_HEADS = PartitionSpec(None, TENSOR, None)
"""Arrays [rows, heads, head_dim]."""

OF_HEAD = PartitionSpec(TENSOR)
"""Arrays [heads]."""

OF_OUTPUTS = PartitionSpec(None, TENSOR)
"""Matrices [inputs, outputs] of linear layers whose outputs are divided, and rows of them."""

OF_INPUTS = PartitionSpec(TENSOR, None)
"""Matrices [inputs, outputs] of linear layers whose inputs are divided."""


def mesh(tensor: int, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `bsjax.load`, so that a model runs on several devices.

    Args:
      tensor: how many devices the model is divided among.
      devices: JAX's devices; by default the first ones of this process.

    Raises:
      CheckpointError: there are fewer devices.

    Example:
      >>> model = bsjax.load("checkpoints/qwen2.5-vl-72b", mesh=bsjax.mesh(tensor=8))
    """
    tensor = whole_number("tensor", tensor, least=1, error=CheckpointError)
    devices = jax.local_devices() if devices is None else list(devices)
    if len(devices) < tensor:
        raise CheckpointError(
            f"A mesh of {tensor} devices was asked for: there are {len(devices)}."
        )
    return Mesh(np.array(devices[:tensor]), (TENSOR,), axis_types=(AxisType.Auto,))


def checked_mesh(given: Any) -> Mesh | None:
    """The argument `mesh` of `load`.

    Raises:
      CheckpointError: it is not a mesh with the axis `TENSOR` alone.
    """
    if given is None:
        return None
    if not isinstance(given, Mesh) or given.axis_names != (TENSOR,):
        raise CheckpointError(
            f'mesh must be a jax.sharding.Mesh with the axis "{TENSOR}" alone, such as '
            f"bsjax.mesh(tensor=4), got {shown(given)}."
        )
    if any(device.process_index != jax.process_index() for device in given.devices.flat):
        raise CheckpointError("mesh has devices of other processes, which bsjax cannot use yet.")
    # Explicit axes would need a sharding of every intermediate result.
    return Mesh(given.devices, given.axis_names, axis_types=(AxisType.Auto,))


def key_head_repeats(config: PretrainedConfig, devices: int) -> int:
    """How often each key head has to be repeated, so that every device has one.

    Args:
      config: configuration of the whole model.
      devices: how many devices the model is divided among.

    Raises:
      CheckpointError: heads, MLP or vocabulary cannot be divided.
    """
    text = config.get_text_config()
    for what, size in (
        ("query heads", text.num_attention_heads),
        ("MLP channels", text.intermediate_size),
        ("entries of the vocabulary", text.vocab_size),
    ):
        if size % devices:
            raise CheckpointError(
                f"The model has {size} {what}, which cannot be divided among {devices} devices: "
                f"use {_fewer(text, devices)}."
            )
    kv_heads = text.num_key_value_heads
    if kv_heads % devices and devices % kv_heads:
        raise CheckpointError(
            f"The model has {kv_heads} key heads, which can neither be divided among {devices} "
            f"devices nor be repeated for them: use {_fewer(text, devices)}."
        )
    return max(1, devices // kv_heads)


def with_repeated_key_heads(config: PretrainedConfig, repeats: int) -> PretrainedConfig:
    """The configuration of the model in which each key head is repeated; a copy."""
    config = copy.deepcopy(config)
    config.get_text_config().num_key_value_heads *= repeats
    return config


def _fewer(text: PretrainedConfig, devices: int) -> str:
    """The smaller numbers of devices that the model can be divided among, in words."""
    *others, last = (count for count in range(1, devices) if _divides(text, count))
    return f"{', '.join(map(str, others))} or {last} devices" if others else "one device"


def _divides(text: PretrainedConfig, devices: int) -> bool:
    sizes = text.num_attention_heads, text.intermediate_size, text.vocab_size
    kv_heads = text.num_key_value_heads
    return not any(size % devices for size in sizes) and (
        kv_heads % devices == 0 or devices % kv_heads == 0
    )


def spec_of(axes: Sequence[str | None]) -> PartitionSpec:
    """How a parameter with these logical axes is divided."""
    return PartitionSpec(*(TENSOR if axis is not None else None for axis in axes))


def mesh_of(parameters: Any) -> Mesh | None:
    """The mesh that a model's parameters are on; None if they are on one device, or are shapes."""
    for leaf in jax.tree.leaves(parameters):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def cache_sharding(parameter: Any) -> NamedSharding | None:
    """Where the caches of a model with this parameter are; None if it is on one device."""
    devices = mesh_of(parameter)
    return None if devices is None else NamedSharding(devices, OF_CACHE)


def sharded_shapes(tree: Any, mesh: Mesh | None) -> Any:
    """The shapes of a tree with the shardings that they have between programs.

    Args:
      tree: arguments or results of programs.
      mesh: the devices; None for one.
    """
    if mesh is None:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)

    def place(leaf: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    return _by_cache(place, tree)


def constrained(tree: Any, mesh: Mesh | None) -> Any:
    """The arrays of a tree, inside of a program, with the shardings that `sharded_shapes` gives."""
    if mesh is None:
        return tree

    def constrain(leaf: Any, spec: PartitionSpec) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    return _by_cache(constrain, tree)


def _by_cache(function: Callable[[Any, PartitionSpec], Any], tree: Any) -> Any:
    def apply(node: Any) -> Any:
        spec = OF_CACHE if isinstance(node, Cache) else PartitionSpec()
        return jax.tree.map(lambda leaf: function(leaf, spec), node)

    return jax.tree.map(apply, tree, is_leaf=lambda node: isinstance(node, Cache))


def on_all_devices(array: jax.Array) -> jax.Array:
    """The array with a copy of it on every device of the mesh, if there is one."""
    if not on_a_mesh():
        return array
    return jax.lax.with_sharding_constraint(array, PartitionSpec())


def on_a_mesh() -> bool:
    """Whether the program that is being traced is for the devices of a mesh."""
    return TENSOR in jax.sharding.get_abstract_mesh().axis_names


def on_each_device(
    function: Callable[..., Any], in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """The function of what each device has, if a program is for a mesh; else the function itself.

    Args:
      function: what to compute, such as attention of any of the heads.
      in_specs: as for `jax.shard_map`.
      out_specs: as for `jax.shard_map`.
    """
    if not on_a_mesh():
        return function
    return jax.shard_map(
        function,
        in_specs=in_specs,
        out_specs=out_specs,
        # Kernels that are interpreted on a CPU do not pass the check.
        check_vma=False,
    )


def embedded(table: nnx.Embed, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
    """`table(token_ids)`, without a copy of the table on every device."""

    def own_rows(table: Array, token_ids: Array) -> Array:
        row = token_ids - table.shape[0] * jax.lax.axis_index(TENSOR)
        is_own = (row >= 0) & (row < table.shape[0])
        rows = table.at[row].get(mode="clip")
        return jax.lax.psum(jnp.where(is_own[:, None], rows, 0), TENSOR)

    if not on_a_mesh():
        return table(token_ids)
    everywhere = PartitionSpec()
    lookup = on_each_device(own_rows, (PartitionSpec(TENSOR, None), everywhere), everywhere)
    return lookup(table.embedding[...], token_ids)


def bytes_on_a_device(leaf: Any) -> int:
    """The bytes of an array, or of its shape, on each of the devices that it is on."""
    shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize
