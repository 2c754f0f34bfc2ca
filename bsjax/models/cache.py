"""The KV cache of a stack of layers, and where the rows of a chunk of a prompt are in it."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import Schedule
from bsjax.models.collectives import CONTEXT, TENSOR, devices_along, gathered, own_index, own_part

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


AnyCache = TypeVar("AnyCache", bound="Cache")


class Runs(NamedTuple):
    """Where the rows of a chunk go in a cache: a few runs of consecutive rows of the cache.

    If the cache is in packed order, a chunk of one prompt has at most three: text, sinks and other
    image tokens. In prompt order it has one. Runs have one length, which may be more than a chunk
    has rows for them.

    Attributes:
      cache_row: int32 [runs], the row of the cache that each run begins at.
      chunk_row: int32 [runs, length], the row of the chunk that goes to each row of a run;
        `PADDING_ROW` where the cache keeps what it has.
    """

    cache_row: Any
    chunk_row: Any


class Cache(NamedTuple):
    """Keys and values of the tokens so far, of one sequence or of several with equally many rows.

    Sequence number n of those with m rows each has the rows n * m to (n + 1) * m.

    On a mesh, each device along `TENSOR` has the rows of its key heads, and each device along
    `CONTEXT` has equally many rows of every sequence: the first device the first ones.

    Attributes:
      k: [layers, rows, kv_heads, head_dim], rotary embedding applied.
      v: [layers, rows, kv_heads, head_dim].
      spec: how both are divided among the devices of a mesh.
    """

    k: Float[Array, "layers rows kv_heads head_dim"]
    v: Float[Array, "layers rows kv_heads head_dim"]

    spec = PartitionSpec(None, CONTEXT, TENSOR, None)

    @classmethod
    def empty(
        cls: type[AnyCache],
        layers: int,
        rows: int,
        kv_heads: int,
        head_dim: int,
        dtype: Any,
        mesh: Mesh | None = None,
    ) -> AnyCache:
        """A cache of zeros. Rows that no query sees must be finite: kernels multiply them by 0.

        Args:
          layers: of the model.
          rows: of all sequences.
          kv_heads: of a layer.
          head_dim: channels of a head.
          dtype: of keys and values.
          mesh: the devices that it is divided among; None for the default device.
        """
        device = None if mesh is None else NamedSharding(mesh, cls.spec)
        zeros = partial(jnp.zeros, (layers, rows, kv_heads, head_dim), dtype, device=device)
        return cls(zeros(), zeros())

    def written(
        self: AnyCache,
        k: Float[Array, "layers sequences kv_heads head_dim"],
        v: Float[Array, "layers sequences kv_heads head_dim"],
        row: Int[Array, "sequences"],
    ) -> AnyCache:
        """The cache with a row of each sequence replaced, in place if the cache is donated.

        Args:
          k: keys of all layers.
          v: values of all layers.
          row: the row within each sequence. Of several, those with a negative one keep what they
            have.
        """
        sequences = row.shape[0]
        if sequences == 1 and self.devices == 1:  # A slice is updated in place on every device.
            write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=row[0], axis=1)
            return self._replace(k=write(self.k, k), v=write(self.v, v))
        rows = self.k.shape[1] // sequences
        own = row - self.first_row(sequences)
        index = own + rows * jnp.arange(sequences, dtype=row.dtype)
        index = jnp.where((row < 0) | (own < 0) | (own >= rows), PADDING_ROW, index)
        return self._replace(
            **{
                name: cache.at[:, index].set(new, mode="drop", unique_indices=True)
                for name, cache, new in (("k", self.k, k), ("v", self.v, v))
            }
        )

    @property
    def devices(self) -> int:
        """How many devices the rows are divided among, in the program that is being traced."""
        return devices_along(CONTEXT)

    def first_row(self, sequences: int) -> Any:
        """The first row of each sequence that this device has."""
        return own_index(CONTEXT) * (self.k.shape[1] // sequences) if self.devices > 1 else 0

    def all_rows(
        self, layer: Int[Array, ""], sequences: int
    ) -> tuple[Array, Array, Int[Array, ""] | None]:
        """What attention of a chunk reads: keys and values of all rows, and the layer's index.

        If rows are divided among devices, those of one layer are gathered, and there is no index.
        """
        if self.devices == 1:
            return self.k, self.v, layer

        def gather(array: Array) -> Array:
            own = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
            own = own.reshape(sequences, -1, *own.shape[1:])
            return gathered(own, CONTEXT, axis=1).reshape(-1, *own.shape[2:])

        return gather(self.k), gather(self.v), None

    def moved(self: AnyCache, rows: Int[Array, "rows"]) -> AnyCache:
        """The cache with each row taken from another one, layer by layer to save memory."""
        rows = own_part(rows, CONTEXT)

        def move(layer: Array, array: Array) -> Array:
            of_layer = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
            taken = gathered(of_layer, CONTEXT)[rows]
            return jax.lax.dynamic_update_index_in_dim(array, taken, layer, axis=0)

        return self._make(jax.lax.fori_loop(0, array.shape[0], move, array) for array in self)

    def copied(
        self: AnyCache, source: Int[Array, ""], target: Int[Array, ""], sequences: int
    ) -> AnyCache:
        """The cache with one of its `sequences` sequences copied over another one."""
        rows = self.k.shape[1] // sequences

        def copy(layer: Array, array: Array) -> Array:
            zero = jnp.zeros_like(layer)
            size = (1, rows, *array.shape[2:])
            taken = jax.lax.dynamic_slice(array, (layer, source * rows, zero, zero), size)
            return jax.lax.dynamic_update_slice(array, taken, (layer, target * rows, zero, zero))

        return self._make(
            jax.lax.fori_loop(jnp.int32(0), jnp.int32(array.shape[0]), copy, array)
            for array in self
        )

    def chunk_written(
        self: AnyCache,
        layer: Int[Array, ""],
        k: Float[Array, "rows kv_heads head_dim"],
        v: Float[Array, "rows kv_heads head_dim"],
        runs: Runs,
    ) -> AnyCache:
        """The cache with the rows of a chunk written in one layer, in place if it is donated."""
        cache_row, chunk_row = map(jnp.asarray, runs)
        # A scatter writes everything at the same time on a GPU, but row by row on a CPU.
        write = partial(
            jax.lax.platform_dependent, cpu=runs_written_in_turn, default=runs_scattered
        )
        return self._make(
            write(cache, new, layer, cache_row, chunk_row)
            for cache, new in ((self.k, k), (self.v, v))
        )


class Ring(Cache):
    """The cache of layers with a window: the last tokens of each sequence, on all devices.

    Position p is in row p modulo the number of rows of its sequence.
    """

    __slots__ = ()

    spec = PartitionSpec(None, None, TENSOR, None)

    @property
    def devices(self) -> int:
        """One: rows are not divided."""
        return 1


def runs_written_in_turn(
    cache: Float[Array, "layers cache_rows kv_heads head_dim"],
    chunk: Float[Array, "rows kv_heads head_dim"],
    layer: Int[Array, ""],
    cache_row: Int[Array, "runs"],
    chunk_row: Int[Array, "runs length"],
) -> Float[Array, "layers cache_rows kv_heads head_dim"]:
    """Writes one run after the other, each with a slice in which other rows keep their values."""
    zero = jnp.int32(0)

    def write(run: Array | int, cache: Array) -> Array:
        rows = chunk_row[run]
        start = (layer, cache_row[run], zero, zero)
        old = jax.lax.dynamic_slice(cache, start, (1, rows.shape[0], *cache.shape[2:]))
        new = chunk.at[rows].get(mode="clip")
        written = jnp.where((rows != PADDING_ROW)[None, :, None, None], new[None], old)
        return jax.lax.dynamic_update_slice(cache, written, start)

    # Not unrolled: fused with the slice of the next run, an update would not be in place.
    return jax.lax.fori_loop(jnp.int32(0), jnp.int32(cache_row.shape[0]), write, cache)


def runs_scattered(
    cache: Float[Array, "layers cache_rows kv_heads head_dim"],
    chunk: Float[Array, "rows kv_heads head_dim"],
    layer: Int[Array, ""],
    cache_row: Int[Array, "runs"],
    chunk_row: Int[Array, "runs length"],
) -> Float[Array, "layers cache_rows kv_heads head_dim"]:
    """Writes all runs with one scatter."""
    offset = jnp.arange(chunk_row.shape[1], dtype=cache_row.dtype)
    index = jnp.where(chunk_row == PADDING_ROW, PADDING_ROW, cache_row[:, None] + offset)
    new = chunk.at[chunk_row].get(mode="clip")
    return cache.at[layer, index].set(new, mode="drop", unique_indices=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class GlobalRows:
    """The rows of a chunk in the cache of layers that keep all tokens.

    On several devices, the queries are the rows of one device, and the runs are in its part of the
    cache; the rows of a chunk are those of all devices, and so are the keys.

    Attributes:
      schedule: queries are the chunk's rows, keys are the rows of the cache.
      runs: where the chunk's rows are in the cache.
      sequences: how many sequences the cache has.
    """

    schedule: Schedule
    runs: Runs
    sequences: int = field(default=1, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class WindowRows:
    """The rows of a chunk in a `Ring`.

    A chunk sees itself and the rings as the chunk before left them.

    Attributes:
      schedule: queries are the chunk's rows, keys are the tokens in the window before the chunk and
        the chunk's own.
      key_rows: int32 [keys], the row of each key of the schedule, among the rows of the cache
        followed by the rows of the chunk; 0 for padding.
      runs: where the chunk's last rows go in the cache.
    """

    schedule: Schedule
    key_rows: Any
    runs: Runs


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
