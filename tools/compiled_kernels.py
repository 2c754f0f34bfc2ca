"""Compiles the attention kernels alone, for GPUs that the machine need not have."""

import jax
import jax.numpy as jnp

from bsjax.masks.schedule import KeyRange, Schedule, Tile
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility
from bsjax.pallas.configurations import (
    KernelConfiguration,
    compiling_for,
    configuration,
    default_blocks,
    target_of,
)
from bsjax.pallas.decode import decode_attention
from bsjax.pallas.prefill import prefill_attention
from tools.gpu_targets import TARGETS, KernelReport, kernel_reports


def target_name(gpu: str) -> str:
    """The target in `bsjax.pallas.configurations` for a GPU in `gpu_targets`."""
    major, minor = TARGETS[gpu].compute_capability
    return target_of(f"{major}.{minor}")


def default_prefill(
    gpu: str, head_dim: int, dtype: str, *, sparse: bool = True
) -> KernelConfiguration:
    """The table's configuration for a GPU."""
    with compiling_for(target_name(gpu)):
        return configuration(head_dim, dtype, *default_blocks(head_dim, dtype, sparse=sparse))


def compile_prefill(
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
) -> KernelReport:
    """Compiles the prefill kernel and returns the report on it.

    Args:
      gpu: a key of `gpu_targets.TARGETS`.
      head_dim: channels per head.
      dtype: dtype of queries, keys and values.
      chosen: the kernel configuration; by default the table's for the block sizes.
      blocks: (block_q, block_kv) of the schedule; by default those of `chosen`, or the table's.
      sparse: whether to take the table's block sizes for sparse or for dense launches.
      tokens: number of rows of the schedule.
      q_heads: number of query heads.
      kv_heads: number of key-value heads.
      return_lse: whether the kernel writes the log-sum-exp.
      visibility: visibility of the schedule.
    """
    with compiling_for(target_name(gpu)):
        if blocks is None:
            blocks = chosen[:2] if chosen else default_blocks(head_dim, dtype, sparse=sparse)
        block_q, block_kv = blocks
        running = chosen or configuration(head_dim, dtype, block_q, block_kv)
        tiles = 2 * tokens // block_q
        integers = jax.ShapeDtypeStruct((tokens,), jnp.int32)
        info = TokenInfo(integers, integers, jax.ShapeDtypeStruct((tokens,), jnp.bool_), integers)
        schedule = Schedule(
            queries=info,
            keys=info,
            groups=jax.ShapeDtypeStruct((4,), jnp.int32),
            tile_columns=jax.ShapeDtypeStruct((4, tiles, len(Tile._fields)), jnp.int32),
            range_columns=jax.ShapeDtypeStruct((4, 4 * tiles, len(KeyRange._fields)), jnp.int32),
            block_q=block_q,
            block_kv=block_kv,
            visibility=visibility,
        )

        def attend(q, k, v, schedule, head_category):
            return prefill_attention(
                q,
                k,
                v,
                schedule,
                head_category,
                scale=head_dim**-0.5,
                return_lse=return_lse,
                configuration=running,
            )

        q = jax.ShapeDtypeStruct((tokens, q_heads, head_dim), dtype)
        k = jax.ShapeDtypeStruct((tokens, kv_heads, head_dim), dtype)
        head_category = jax.ShapeDtypeStruct((q_heads,), jnp.int32)
        report = kernel_reports(attend, (q, k, k, schedule, head_category), gpu)[
            "prefill_attention"
        ]
    programs_per_tile = block_q // running.block_q
    assert report.grid == (q_heads, tiles * programs_per_tile, 1), "heads must run fastest"
    return report


def compile_decode(
    gpu: str,
    head_dim: int,
    dtype: str,
    *,
    layers: int = 28,
    rows: int = 36_864,
    q_heads: int = 28,
    kv_heads: int = 4,
) -> dict[str, KernelReport]:
    """Compiles decode attention; returns the reports on its kernels, `decode_attention` and
    `combine_splits`, by name.

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
        return decode_attention(*arrays, scale=head_dim**-0.5)

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    cache, own = shape(layers, 1, rows, kv_heads, head_dim), shape(1, kv_heads, head_dim)
    number, lengths = shape(dtype=jnp.int32), shape(1, dtype=jnp.int32)
    arguments = (shape(1, q_heads, head_dim), cache, cache, number, lengths, own, own)
    return kernel_reports(attend, arguments, gpu)
