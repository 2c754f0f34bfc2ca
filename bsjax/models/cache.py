"""The KV cache of a stack of layers, and where the rows of a chunk of a prompt are in it."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import Schedule

PADDING_ROW = np.iinfo(np.int32).max
"""The row of padding in any array: out of bounds, so that what is written there is dropped."""


class Cache(NamedTuple):
    """Keys and values of the tokens so far.

    Attributes:
      k: [layers, rows, kv_heads, head_dim], rotary embedding applied.
      v: [layers, rows, kv_heads, head_dim].
    """

    k: Float[Array, "layers rows kv_heads head_dim"]
    v: Float[Array, "layers rows kv_heads head_dim"]

    @classmethod
    def empty(cls, layers: int, rows: int, kv_heads: int, head_dim: int, dtype: Any) -> "Cache":
        """A cache of zeros, because kernels also multiply rows that no query sees, by 0."""
        zeros = partial(jnp.zeros, (layers, rows, kv_heads, head_dim), dtype)
        return cls(zeros(), zeros())

    def written(
        self,
        k: Float[Array, "layers 1 kv_heads head_dim"],
        v: Float[Array, "layers 1 kv_heads head_dim"],
        row: Int[Array, ""],
    ) -> "Cache":
        """The cache with one row of every layer replaced, in place if the cache is donated."""
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=1)
        return Cache(write(self.k, k), write(self.v, v))


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GlobalRows:
    """The rows of a chunk in the cache of layers that keep all tokens.

    Attributes:
      schedule: queries are the chunk's rows, keys the rows of the cache.
      rows: int32 [rows], the row of the cache for each row of the chunk; `PADDING_ROW` for padding.
    """

    schedule: Schedule
    rows: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WindowRows:
    """The rows of a chunk in the cache of layers with a window: a ring of the last tokens.

    Position p is in row p modulo the number of rows. A chunk sees the ring as it was, and itself.

    Attributes:
      schedule: queries are the chunk's rows, keys the tokens of the window before it and its own.
      key_rows: int32 [keys], where each key is: in the ring, or behind it in the chunk.
      ring_rows: int32 [ring], where each new row of the ring is, counted in the same way.
    """

    schedule: Schedule
    key_rows: Any
    ring_rows: Any


CachedRows = GlobalRows | WindowRows
"""How the layers of one kind write and read a chunk."""
