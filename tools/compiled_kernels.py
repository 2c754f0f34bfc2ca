"""Compiles the attention kernels alone, for GPUs that the machine need not have."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bsjax.gpu.configurations import KernelConfiguration, compiling_for, target_of
from bsjax.masks.launch_order import LaunchItem
from bsjax.masks.schedule import KeyRange, Parts, Schedule, Tile
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility
from bsjax.pallas.configurations import configuration, default_blocks
from bsjax.runtime.sizes import most_parts
from tools.gpu_targets import TARGETS, KernelReport, digest, kernel_reports

TOWER_HEAD_DIMS = (72, 80)
"""Channels per head of published vision towers; no language model has that many."""

CHUNK_ROWS = 4096
"""Query rows of a chunk of a prompt."""


def target_name(gpu: str) -> str:
    """The target in `bsjax.gpu.configurations` for a GPU in `gpu_targets`."""
    major, minor = TARGETS[gpu].compute_capability
    return target_of(f"{major}.{minor}")


def default_prefill(
    gpu: str, head_dim: int, dtype: str, *, sparse: bool = True
) -> KernelConfiguration:
    """The table's configuration for a GPU."""
    with compiling_for(target_name(gpu)):
        return configuration(head_dim, dtype, *default_blocks(head_dim, dtype, sparse=sparse))


class PrefillKernel(NamedTuple):
    """A prefill kernel and the GPU that it is for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    gpu: str
    grid: tuple[int, int, int]

    def digest(self) -> str:
        """SHA-256 of everything that determines the compiled kernel."""
        return digest(self.function, self.arguments, self.gpu)

    def report(self) -> KernelReport:
        """Compiles the kernel and returns the report on it."""
        report = kernel_reports(self.function, self.arguments, self.gpu)["prefill_attention"]
        assert report.grid == self.grid, "heads must run fastest"
        return report


def compile_prefill(*arguments: Any, **options: Any) -> KernelReport:
    """Compiles the prefill kernel and returns the report on it; see `prefill_kernel`."""
    return prefill_kernel(*arguments, **options).report()


def prefill_kernel(
    gpu: str,
    head_dim: int,
    dtype: str,
    *,
    chosen: KernelConfiguration | None = None,
    blocks: tuple[int, int] | None = None,
    sparse: bool = True,
    tokens: int = 36_000,
    q_heads: int = 28,
    kv_heads: int = 4,
    return_lse: bool = False,
    visibility: Visibility = CAUSAL,
    whole: bool | None = None,
) -> PrefillKernel:
    """The prefill kernel, to be compiled.

    Args:
      gpu: a key of `gpu_targets.TARGETS`.
      head_dim: channels per head.
      dtype: dtype of queries, keys and values.
      chosen: the kernel configuration; by default the table's for the block sizes.
      blocks: (block_q, block_kv) of the schedule; by default those of `chosen`, or the table's.
      sparse: whether to take the table's block sizes for sparse or for dense launches.
      tokens: number of key rows.
      q_heads: number of query heads.
      kv_heads: number of key-value heads.
      return_lse: whether the kernel writes the log-sum-exp.
      visibility: visibility of the schedule.
      whole: whether all rows are queries, as in vision towers, or else a chunk of them, whose text
        rows stack the heads of a group, against the cache of several layers, as in language models.
        By default as in the models that have this head dimension.
    """
    whole = head_dim in TOWER_HEAD_DIMS if whole is None else whole
    chunk = None if whole else CHUNK_ROWS
    with compiling_for(target_name(gpu)):
        if blocks is None:
            blocks = chosen[:2] if chosen else default_blocks(head_dim, dtype, sparse=sparse)
        block_q, block_kv = blocks
        running = chosen or configuration(head_dim, dtype, block_q, block_kv)
        queries = tokens if chunk is None else chunk
        tables = 4 if chunk is None else 5
        parts = 0 if chunk is None else most_parts("pallas", dtype)
        tiles = 2 * queries // block_q
        stacked_heads = 0 if chunk is None else q_heads // kv_heads

        def info(rows: int) -> TokenInfo:
            integers = jax.ShapeDtypeStruct((rows,), jnp.int32)
            return TokenInfo(integers, integers, jax.ShapeDtypeStruct((rows,), jnp.bool_), integers)

        schedule = Schedule(
            queries=info(queries),
            keys=info(tokens),
            groups=jax.ShapeDtypeStruct((tables,), jnp.int32),
            tile_columns=jax.ShapeDtypeStruct((tables, tiles, len(Tile._fields)), jnp.int32),
            range_columns=jax.ShapeDtypeStruct(
                (tables, 4 * tiles, len(KeyRange._fields)), jnp.int32
            ),
            block_q=block_q,
            block_kv=block_kv,
            visibility=visibility,
            parts=Parts(*[jax.ShapeDtypeStruct((parts,), jnp.int32)] * 3) if parts else None,
            stacked_heads=stacked_heads,
            launch_columns=jax.ShapeDtypeStruct(
                (stacked_heads * tiles, len(LaunchItem._fields)), jnp.int32
            )
            if stacked_heads
            else None,
        )

        def attend(q, k, v, schedule, head_category, layer=None):
            # Here, because a JAX may have no Pallas for Triton.
            from bsjax.pallas.prefill import prefill_attention

            return prefill_attention(
                q,
                k,
                v,
                schedule,
                head_category,
                layer,
                scale=head_dim**-0.5,
                return_lse=return_lse,
                configuration=running,
            )

        layers = () if chunk is None else (2,)
        q = jax.ShapeDtypeStruct((queries, q_heads, head_dim), dtype)
        k = jax.ShapeDtypeStruct((*layers, tokens, kv_heads, head_dim), dtype)
        head_category = jax.ShapeDtypeStruct((q_heads,), jnp.int32)
        layer = () if chunk is None else (jax.ShapeDtypeStruct((), jnp.int32),)
    programs_per_tile = block_q // running.block_q
    heads, entries = schedule.grid(q_heads, kv_heads)
    return PrefillKernel(
        attend,
        (q, k, k, schedule, head_category, *layer),
        gpu,
        (heads, entries * programs_per_tile, 1),
    )


class DecodeKernel(NamedTuple):
    """Decode attention and the GPU that it is for."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    gpu: str

    def digest(self) -> str:
        """SHA-256 of everything that determines the compiled kernels."""
        return digest(self.function, self.arguments, self.gpu)

    def reports(self) -> dict[str, KernelReport]:
        """Compiles the kernels; the reports on `decode_attention` and `combine_splits`, by name."""
        return kernel_reports(self.function, self.arguments, self.gpu)


def compile_decode(*arguments: Any, **options: Any) -> dict[str, KernelReport]:
    """Compiles decode attention; returns the reports on its kernels. See `decode_kernel`."""
    return decode_kernel(*arguments, **options).reports()


def decode_kernel(
    gpu: str,
    head_dim: int,
    dtype: str,
    *,
    layers: int = 28,
    rows: int = 36_864,
    q_heads: int = 28,
    kv_heads: int = 4,
) -> DecodeKernel:
    """Decode attention, to be compiled.

    Args:
      gpu: a key of `gpu_targets.TARGETS`.
      head_dim: channels per head.
      dtype: dtype of queries and cache.
      layers: number of layers of the cache.
      rows: number of rows of the cache.
      q_heads: number of query heads.
      kv_heads: number of key-value heads.
    """

    def attend(*arrays):
        from bsjax.pallas.decode import decode_attention

        return decode_attention(*arrays, scale=head_dim**-0.5)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache, own = shape(layers, 1, rows, kv_heads, head_dim), shape(1, kv_heads, head_dim)
    number, lengths = shape(dtype=jnp.int32), shape(1, dtype=jnp.int32)
    arguments = (shape(1, q_heads, head_dim), cache, cache, number, lengths, own, own)
    return DecodeKernel(attend, arguments, gpu)
