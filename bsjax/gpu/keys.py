"""The keys of a schedule as kernels read them: in whole blocks, with what the predicate needs."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.masks.schedule import Schedule
from bsjax.masks.visibility import KeyVisibility, TokenInfo, key_visibility


class BlockKeys(NamedTuple):
    """Keys and values of at least one block."""

    k: Float[Array, "layers keys kv_heads head_dim"]
    v: Float[Array, "layers keys kv_heads head_dim"]
    visibility: KeyVisibility
    """For each key: position and image, int32 [1, keys], and from which query position on each
    table's queries see it, [tables, keys]."""

    @property
    def rows(self) -> int:
        """Keys of a layer, padding included."""
        return self.k.shape[1]


def block_keys(
    k: Float[Array, "layers keys kv_heads head_dim"],
    v: Float[Array, "layers keys kv_heads head_dim"],
    schedule: Schedule,
    block_kv: int,
) -> BlockKeys:
    """The keys and values that a schedule's queries see, padded if they are fewer than one block.

    Args:
      k: keys.
      v: values.
      schedule: the schedule, for all keys of a layer.
      block_kv: keys of a block. Kernels read blocks whole.
    """
    groups = jnp.asarray(schedule.groups)[:, None]
    info = TokenInfo(*(jnp.asarray(field)[None, :] for field in schedule.keys))
    visibility = key_visibility(info, groups, schedule.visibility)
    missing = max(0, block_kv - k.shape[1])
    if missing:
        k, v = (jnp.pad(array, ((0, 0), (0, missing), (0, 0), (0, 0))) for array in (k, v))
        visibility = KeyVisibility(
            *(jnp.pad(field, ((0, 0), (0, missing))) for field in visibility)
        )
    return BlockKeys(k, v, visibility)
