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
"""The row of padding in any array. It is out of bounds, so that writes with `mode="drop"` leave it
out."""


def ring_rows(window: int, cache_rows: int) -> int:
    """Rows of the ring of layers with a window: all that a token sees of the tokens before it.

    Args:
      window: the tokens that a query sees, itself included.
      cache_rows: rows of a cache that keeps all tokens.
    """
    return min(max(window - 1, 1), cache_rows)


class Runs(NamedTuple):
    """Where the rows of a chunk are in a cache: a few runs of consecutive rows of the cache.

    If the cache is in packed order, a chunk has at most three: text, sinks and other image tokens.
    In prompt order it has one.

    Attributes:
      order: int32 [rows], the chunk's rows, sorted by their rows of the cache; 0 in place of
        padding, which is not written.
      first: int32 [runs], the index in `order` of each run's first row.
      cache_row: int32 [runs], the row of the cache of each run's first row.
      rows: int32 [runs], how many rows each run has; 0 for entries after the last run.
    """

    order: Any
    first: Any
    cache_row: Any
    rows: Any


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
        """A cache of zeros. Rows that no query sees must be finite: kernels multiply them by 0."""
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

    def moved(self, rows: Int[Array, "rows"]) -> "Cache":
        """The cache with each row taken from another one, layer by layer to save memory."""

        def move(layer: Array, array: Array) -> Array:
            taken = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)[rows]
            return jax.lax.dynamic_update_index_in_dim(array, taken, layer, axis=0)

        return Cache(*(jax.lax.fori_loop(0, of.shape[0], move, of) for of in self))

    def chunk_written(
        self,
        layer: Int[Array, ""],
        k: Float[Array, "rows kv_heads head_dim"],
        v: Float[Array, "rows kv_heads head_dim"],
        runs: Runs,
    ) -> "Cache":
        """The cache with the rows of a chunk written in one layer, in place if it is donated."""
        write = partial(_runs_written, layer=layer, runs=runs)
        return Cache(write(self.k, k), write(self.v, v))


def _runs_written(
    cache: Float[Array, "layers cache_rows kv_heads head_dim"],
    chunk: Float[Array, "rows kv_heads head_dim"],
    layer: Int[Array, ""],
    runs: Runs,
) -> Float[Array, "layers cache_rows kv_heads head_dim"]:
    """Writes the runs of a chunk's rows into one layer.

    The lengths of runs are data, but slices have fixed lengths. Each run is therefore written with
    a slice of as many rows as the chunk has, in which all other rows keep their values. A scatter
    would go row by row on a CPU.
    """
    cache_rows, rows = cache.shape[1], min(chunk.shape[0], cache.shape[1])
    zero = np.int32(0)
    for first, cache_row, count in zip(*runs[1:], strict=True):
        # The row of the cache that index 0 of `order` would have, if it belonged to this run.
        origin = cache_row - first
        start = jnp.clip(origin, 0, cache_rows - rows)
        index = start - origin + jnp.arange(rows, dtype=jnp.int32)
        in_run = (index >= first) & (index < first + count)
        of_chunk = chunk[jnp.asarray(runs.order).at[index].get(mode="clip")]
        old = jax.lax.dynamic_slice(cache, (layer, start, zero, zero), (1, rows, *cache.shape[2:]))
        new = jnp.where(in_run[None, :, None, None], of_chunk[None], old)
        cache = jax.lax.dynamic_update_slice(cache, new, (layer, start, zero, zero))
    return cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GlobalRows:
    """The rows of a chunk in the cache of layers that keep all tokens.

    Attributes:
      schedule: queries are the chunk's rows, keys are the rows of the cache.
      runs: where the chunk's rows are in the cache.
    """

    schedule: Schedule
    runs: Runs


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WindowRows:
    """The rows of a chunk in the cache of layers with a window: a ring of the last tokens.

    Position p is in row p modulo the number of rows. A chunk sees itself and the ring as the chunk
    before left it. `key_rows` and `ring_rows` are indices into the rows of that ring followed by
    the rows of the chunk.

    Attributes:
      schedule: queries are the chunk's rows, keys are the tokens in the window before the chunk and
        the chunk's own.
      key_rows: int32 [keys], the row of each key of the schedule; 0 for padding.
      ring_rows: int32 [ring], the row whose keys and values each row of the ring holds after the
        chunk.
    """

    schedule: Schedule
    key_rows: Any
    ring_rows: Any


CachedRows = GlobalRows | WindowRows
"""How the layers of one kind write a chunk to the cache, and what they read from it."""


class OutputRows(NamedTuple):
    """The rows of a chunk whose hidden states are needed after the last layer.

    The last layer computes keys and values of all rows of the chunk, and everything else for these
    rows only.

    Attributes:
      rows: int32 [outputs], indices of these rows in the chunk.
      schedule: queries are these rows; keys are those of the chunk's schedule for the last layer's
        kind.
    """

    rows: Any
    schedule: Schedule
