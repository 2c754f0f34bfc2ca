"""The block masks of several prompts in one pytree, for as many devices."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from bsjax.checks import shown
from bsjax.errors import MaskError
from bsjax.masks.block_mask import BlockMask
from bsjax.masks.schedule import stacked_arrays

_SHARED = ("number of query heads", "block_q", "block_kv", "visibility", "gradients")


def _shared(mask: BlockMask) -> tuple[Any, ...]:
    schedule = mask.schedule
    has_gradients = schedule.transposed is not None
    return (
        len(mask.categories),
        schedule.block_q,
        schedule.block_kv,
        schedule.visibility,
        has_gradients,
    )


@jax.tree_util.register_pytree_node_class
class StackedMasks:
    """The block masks of several prompts, padded to the same shapes and stacked; a pytree.

    Prompts of one batch, or shares of the queries of one prompt, can run on different devices, each
    with its own mask. See `stack_masks`.

    Attributes:
      masks: a `BlockMask` whose arrays have a leading axis.
      queries: rows that the queries of each prompt are padded to.
      keys: rows that the keys and values of each prompt are padded to.
    """

    def __init__(self, masks: BlockMask) -> None:
        self.masks = masks

    @property
    def queries(self) -> int:
        """See the class."""
        return self.masks.order.shape[-1]

    @property
    def keys(self) -> int:
        """See the class."""
        return self.masks.key_order.shape[-1]

    def __len__(self) -> int:
        """How many masks there are; inside of `jax.shard_map`, how many this device has."""
        return self.masks.order.shape[0]

    def __getitem__(self, index: Any) -> BlockMask:
        """One of the masks; the index may be traced.

        Raises:
          IndexError: the index is a Python integer, and there is no such mask.
        """
        if isinstance(index, int) and not -len(self) <= index < len(self):
            raise IndexError(f"Mask {index} does not exist: there are {len(self)}.")
        return jax.tree.map(lambda array: jnp.asarray(array)[index], self.masks)

    def specs(
        self, prompts: str | tuple[str, ...], heads: str | tuple[str, ...] | None = None
    ) -> "StackedMasks":
        """How the masks are sharded: for `jax.shard_map` or `jax.device_put`.

        Args:
          prompts: the mesh axis, or axes, that the prompts are sharded over.
          heads: the axis, or axes, that the heads are sharded over; None if they are not.

        Returns:
          A pytree like this one, of `jax.sharding.PartitionSpec`s.
        """
        specs = jax.tree.map(lambda _: PartitionSpec(prompts), self)
        specs.masks.head_category = PartitionSpec(prompts, heads)
        return specs

    def tree_flatten(self) -> tuple[tuple[BlockMask], None]:
        """For JAX."""
        return (self.masks,), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[BlockMask]) -> "StackedMasks":
        """For JAX."""
        return cls(*children)

    def __repr__(self) -> str:
        if not hasattr(self.masks.order, "shape"):
            return f"StackedMasks({self.masks})"
        return f"StackedMasks({len(self)}, queries={self.queries}, keys={self.keys})"


def stack_masks(masks: Sequence[BlockMask]) -> StackedMasks:
    """Pads block masks to the same shapes and stacks them.

    Queries, keys and values have to be padded to `queries` and `keys` rows of the result, behind
    the tokens of each prompt, with finite values. The outputs of padding queries are zeros.

    Args:
      masks: masks that were built outside of a jitted function, with the same number of heads,
        block sizes, window, `bidirectional_images` and `gradients`.

    Raises:
      MaskError: there is no mask, or they differ in these.

    Example:
      Two prompts on two devices:

      >>> masks = bsjax.stack_masks([mask_of_first, mask_of_second])
      >>> def attend(q, k, v, masks):  # of one device: q [1, masks.queries, q_heads, head_dim]
      ...     return bsjax.sparse_attention(q[0], k[0], v[0], masks[0])[None]
      >>> of_prompts = jax.P("data")
      >>> attend_all = jax.shard_map(
      ...     attend,
      ...     in_specs=(of_prompts, of_prompts, of_prompts, masks.specs("data")),
      ...     out_specs=of_prompts,
      ... )
    """
    if not isinstance(masks, list | tuple) or not masks:
        raise MaskError(
            f"masks must be a list of at least one bsjax.BlockMask, got {shown(masks)}."
        )
    for number, mask in enumerate(masks):
        if not isinstance(mask, BlockMask):
            raise MaskError(f"masks[{number}] must be a bsjax.BlockMask, got {shown(mask)}.")
        for what, own, first in zip(_SHARED, _shared(mask), _shared(masks[0]), strict=True):
            if own != first:
                raise MaskError(
                    f"Stacked masks must have the same {what}, but masks[{number}] has {own} and "
                    f"masks[0] has {first}."
                )
    queries = max(each.schedule.query_rows for each in masks)
    keys = max(each.schedule.key_rows for each in masks)
    padded = [each.padded(queries, keys) for each in masks]

    return StackedMasks(
        jax.tree.map(stacked_arrays, *(each.with_schedule(each.schedule) for each in padded))
    )
