"""Where the parts of a model are on the devices of a mesh.

A mesh has two axes. Along `tensor`, each device has some of the heads, of the inner channels of the
MLPs and of the vocabulary: parameters name these axes (`bsjax.models.parameters`). Along `context`,
each device has some of the rows of a chunk and of the cache. The vision tower is on all devices.

Programs run on every device with what it has (`bsjax.models.collectives`).
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from transformers import PretrainedConfig

from bsjax.checks import shown, whole_number
from bsjax.errors import CheckpointError
from bsjax.models.cache import Cache
from bsjax.models.collectives import CONTEXT, TENSOR, Shares, is_shares

Q_HEADS, KV_HEADS, MLP, VOCABULARY = "q_heads", "kv_heads", "mlp", "vocabulary"
"""Logical axes of parameters that are divided among the devices of the axis `TENSOR`."""


MOST_CONTEXT = 64
"""The most devices that rows are divided among."""


def mesh(tensor: int = 1, context: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `bsjax.load`, so that a model runs on `context * tensor` devices.

    Args:
      tensor: how many devices the weights are divided among. Each layer adds up hidden states over
        them twice, so they should be connected well.
      context: how many devices, or groups of `tensor` devices, the rows of a prompt and of its
        cache are divided among: a power of two. Each has all of the weights.
      devices: JAX's devices; by default the first ones.

    Raises:
      CheckpointError: there are fewer devices, or a number is out of range.

    Example:
      >>> model = bsjax.load("checkpoints/qwen2.5-vl-72b", mesh=bsjax.mesh(tensor=8))
    """
    tensor = whole_number("tensor", tensor, least=1, error=CheckpointError)
    context = whole_number("context", context, least=1, error=CheckpointError)
    _check_context(context)
    devices = jax.devices() if devices is None else list(devices)
    count = context * tensor
    if len(devices) < count:
        raise CheckpointError(f"A mesh of {count} devices was asked for: there are {len(devices)}.")
    return _with_both_axes(np.array(devices[:count]).reshape(context, tensor))


def _check_context(context: int) -> None:
    # Lengths of caches are multiples of a power of two.
    if context & (context - 1) or context > MOST_CONTEXT:
        raise CheckpointError(
            f"The rows of a prompt cannot be divided among {context} devices: context must be a "
            f"power of two up to {MOST_CONTEXT}."
        )


def _with_both_axes(devices: np.ndarray) -> Mesh:
    # Explicit axes would need a sharding of every intermediate result.
    return Mesh(devices, (CONTEXT, TENSOR), axis_types=(AxisType.Auto, AxisType.Auto))


def checked_mesh(given: Any) -> Mesh | None:
    """The argument `mesh` of `load`, with both axes, in the order of `bsjax.mesh`.

    Raises:
      CheckpointError: it is not a mesh with the axes `CONTEXT` and `TENSOR`, or with one of them.
    """
    if given is None:
        return None
    names = given.axis_names if isinstance(given, Mesh) else ()
    if not names or not set(names) <= {CONTEXT, TENSOR}:
        raise CheckpointError(
            f'mesh must be a jax.sharding.Mesh with the axes "{CONTEXT}" and "{TENSOR}", or with '
            f"one of them, such as bsjax.mesh(tensor=4), got {shown(given)}."
        )
    _check_context(given.shape.get(CONTEXT, 1))
    in_order = given.devices.T if names == (TENSOR, CONTEXT) else given.devices
    return _with_both_axes(in_order.reshape(given.shape.get(CONTEXT, 1), -1))


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
    *others, last = (count for count in range(1, devices) if divides(text, count))
    return f"{', '.join(map(str, others))} or {last} devices" if others else "one device"


def divides(text: PretrainedConfig, devices: int) -> bool:
    """Whether a model with this text config can be divided among so many devices of `TENSOR`."""
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


def replicated(mesh: Mesh | None) -> NamedSharding | None:
    """Where arrays are that all devices of a mesh have; None, for the default device, without."""
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def specs_of(tree: Any) -> Any:
    """How the arguments or results of a program are divided among the devices of a mesh.

    Parts of caches and `Shares` are where their types say; everything else is on all devices.
    """

    def of_node(node: Any) -> Any:
        spec = node.spec if isinstance(node, Cache | Shares) else PartitionSpec()
        return jax.tree.map(lambda _: spec, node)

    return jax.tree.map(of_node, tree, is_leaf=lambda node: isinstance(node, Cache | Shares))


def device_count(mesh: Mesh | None) -> int:
    """How many devices a mesh has; 1 without a mesh."""
    return 1 if mesh is None else mesh.size


def size_along(mesh: Mesh | None, axis: str) -> int:
    """How many devices a mesh has along an axis; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[axis]


def on_every_device(
    function: Callable[..., Any], mesh: Mesh, arguments: tuple[Any, ...]
) -> Callable[..., Any]:
    """A function of whole arrays that calls `function`, on every device, with what the device has.

    Args:
      function: its results are divided as `specs_of` says.
      mesh: the devices.
      arguments: shapes of the arguments, with their shardings.
    """

    def on_device(*arguments: Any) -> Any:
        own = jax.tree.map(
            lambda node: node.own if is_shares(node) else node, arguments, is_leaf=is_shares
        )
        return function(*own)

    # Only the structure of the results is needed: outside of the mesh, their shapes mean nothing.
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
    results = jax.eval_shape(on_device, *shapes)
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=jax.tree.map(lambda leaf: leaf.sharding.spec, arguments),
        out_specs=specs_of(results),
        # Kernels that are interpreted on a CPU do not pass the check.
        check_vma=False,
    )


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

    return jax.tree.map(place, tree, specs_of(tree))


class WeightBytes(NamedTuple):
    """Bytes of a model's weights on each device.

    Attributes:
      all: of all weights.
      divided: of those that are divided along `TENSOR`: all but the vision tower's.
    """

    all: int
    divided: int

    @classmethod
    def of(cls, parameters: Any) -> "WeightBytes":
        """Those of a model's parameters: an `nnx.State` of arrays, or of shapes."""
        sizes = [
            (path[0] in ("language_model", "lm_head"), bytes_on_a_device(leaf.get_value()))
            for path, leaf in nnx.to_flat_state(parameters)
        ]
        return cls(
            sum(size for _, size in sizes), sum(size for is_divided, size in sizes if is_divided)
        )

    def on(self, times: int | float) -> float:
        """All weights on each device if they are divided among so many times as many devices."""
        return self.all - self.divided + self.divided / times


def bytes_on_a_device(leaf: Any) -> int:
    """The bytes of an array, or of its shape, on each of the devices that it is on."""
    shape, sharding = leaf.shape, getattr(leaf, "sharding", None)
    if isinstance(sharding, NamedSharding):
        shape = sharding.shard_shape(shape)
    return math.prod(shape) * leaf.dtype.itemsize
