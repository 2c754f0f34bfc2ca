"""Gradients of attention on GPUs, in Triton: what goes into the kernels and what comes out."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.gpu.configurations import KernelConfiguration
from bsjax.gpu.keys import block_keys
from bsjax.masks.schedule import Schedule
from bsjax.masks.visibility import KeyVisibility
from bsjax.triton.backward_kernels import key_gradients, query_gradients
from bsjax.triton.gradient_configurations import gradient_configuration
from bsjax.triton.heads import head_blocks
from bsjax.triton.launch import Launch, call
from bsjax.triton.product import precision_of


def attention_gradients(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "layers keys kv_heads head_dim"],
    v: Float[Array, "layers keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    layer: Any,
    out: Float[Array, "queries q_heads head_dim"],
    lse: Float[Array, "queries q_heads"],
    out_gradient: Float[Array, "queries q_heads head_dim"],
    lse_gradient: Float[Array, "queries q_heads"],
    *,
    scale: float,
    of_queries: KernelConfiguration | None = None,
    of_keys: KernelConfiguration | None = None,
) -> tuple[Array, Array, Array]:
    """The gradients of q, k and v, for NVIDIA GPUs.

    The same function of its arguments as `bsjax.attention.xla.attention_gradients`. Memory is
    linear in the numbers of queries and keys.

    Args:
      q: queries of `prefill_attention`.
      k: its keys.
      v: its values.
      schedule: its schedule, with a transposed schedule and without split tiles.
      head_category: the table of the schedule that each query head uses.
      layer: int32, the layer whose keys and values are read; may be traced.
      out: its output.
      lse: its log-sum-exp.
      out_gradient: gradient of the output.
      lse_gradient: gradient of the log-sum-exp.
      scale: factor applied to the scores, above 0.
      of_queries: how to compile the kernel of the gradients of queries, for tuning.
      of_keys: how to compile the kernel of the gradients of keys and values.

    Returns:
      In the dtype of `q`. Float32 inputs are multiplied in float32.
    """
    rows, q_heads, head_dim = q.shape
    layers, key_rows, kv_heads, _ = k.shape
    transposed = schedule.transposed
    windowed = schedule.visibility.window is not None
    of_queries = of_queries or gradient_configuration(
        "queries", head_dim, q.dtype, schedule.block_q, schedule.block_kv, windowed=windowed
    )
    of_keys = of_keys or gradient_configuration(
        "keys", head_dim, q.dtype, transposed.block_q, transposed.block_kv, windowed=windowed
    )
    # The log-sum-exp of a row that saw nothing is a constant: its gradient is ignored.
    saw = ~jnp.isneginf(lse)
    delta = (out.astype(jnp.float32) * out_gradient.astype(jnp.float32)).sum(axis=-1)
    offset = (jnp.where(saw, lse_gradient, 0.0) - delta).T
    lse = jnp.where(saw, lse * math.log2(math.e), jnp.inf).T
    out_gradient = out_gradient.astype(q.dtype)

    keys = block_keys(k, v, schedule, of_queries.block_kv)
    # Position and image are repeated for every table, so that one address serves all four arrays in
    # the loop over query heads.
    visibility = KeyVisibility(*jnp.broadcast_arrays(*keys.visibility))
    position, image = jnp.asarray(schedule.queries.position), jnp.asarray(schedule.queries.image)
    # Blocks are read whole: rows that are fewer than one block are padded.
    missing_rows = max(0, of_keys.block_q - rows)
    padded_q, out_gradient, position, image = (
        _padded(array, missing_rows, 0) for array in (q, out_gradient, position, image)
    )
    lse, offset = (_padded(array, missing_rows, 1) for array in (lse, offset))
    padded_rows = rows + missing_rows

    def run(
        kernel: Any,
        name: str,
        grid: tuple[int, int],
        columns: tuple[Any, ...],
        sizes: tuple[int, ...],
        outputs: list[jax.ShapeDtypeStruct],
        chosen: KernelConfiguration,
        constants: dict[str, Any],
    ) -> list[Array]:
        blocks = head_blocks(head_dim)
        return call(
            kernel,
            [
                padded_q,
                keys.k,
                keys.v,
                out_gradient,
                lse,
                offset,
                position,
                image,
                visibility.position,
                visibility.image,
                visibility.own_from,
                visibility.other_from,
                jnp.asarray(layer, jnp.int32).reshape(1),
                jnp.asarray(head_category, jnp.int32),
                *columns,
                padded_rows,
                keys.rows,
                *sizes,
            ],
            outputs,
            {
                "HEAD_DIM": head_dim,
                "FIRST": blocks.first,
                "SECOND": blocks.second,
                "Q_HEADS": q_heads,
                "KV_HEADS": kv_heads,
                "BLOCK_Q": chosen.block_q,
                "BLOCK_KV": chosen.block_kv,
                "WINDOW": schedule.visibility.window or 0,
                "SCALE": scale,
                "TO_LOG2": scale * math.log2(math.e),
                "PRECISION": precision_of(q.dtype),
                **constants,
            },
            Launch(name, grid, chosen.num_warps, chosen.num_stages),
        )

    tables, tiles = schedule.tile_columns.shape[:2]
    heads, entries = schedule.grid(q_heads, kv_heads)
    # Without stacked heads, the kernel does not read it.
    launch = 0 if schedule.launch_columns is None else jnp.asarray(schedule.launch_columns)
    programs = schedule.block_q // of_queries.block_q
    (q_gradient,) = run(
        query_gradients,
        "query_gradients",
        (heads, entries * programs),
        (launch, *map(jnp.asarray, (schedule.tile_columns, schedule.range_columns))),
        (tiles, schedule.range_columns.shape[1]),
        [jax.ShapeDtypeStruct(padded_q.shape, q.dtype)],
        of_queries,
        {
            "STACKED": bool(schedule.stacked_heads),
            "TABLES": tables,
            "PROGRAMS_PER_TILE": programs,
            "STEPS_PER_BLOCK": schedule.block_kv // of_queries.block_kv,
            "WIDE": keys.rows * kv_heads * head_dim >= 2**31,
        },
    )
    entries = transposed.tile_columns.shape[1]
    programs = transposed.block_kv // of_keys.block_kv
    of_entries = run(
        key_gradients,
        "key_gradients",
        (kv_heads, entries * programs),
        tuple(map(jnp.asarray, (transposed.tile_columns, transposed.range_columns))),
        (entries,),
        [jax.ShapeDtypeStruct((entries, transposed.block_kv, kv_heads, head_dim), jnp.float32)] * 2,
        of_keys,
        {
            "PROGRAMS_PER_TILE": programs,
            "STEPS_PER_BLOCK": transposed.block_q // of_keys.block_q,
            "WIDE": padded_rows * q_heads * head_dim >= 2**31,
            "KV_WIDE": keys.rows * kv_heads * head_dim >= 2**31,
        },
    )
    # Each entry's rows in k; out of bounds, hence dropped, where it has none.
    of_block = jnp.arange(transposed.block_kv, dtype=jnp.int32)
    tile = jax.tree.map(lambda column: column[0, :, None], transposed.tiles)
    key = jnp.where(of_block < tile.keys, tile.first_key + of_block, key_rows)

    def of_layer(array: Array) -> Array:
        summed = jnp.zeros(k.shape[1:], jnp.float32).at[key].add(array, mode="drop")
        summed = summed.astype(k.dtype)
        return summed[None] if layers == 1 else jnp.zeros_like(k).at[layer].set(summed)

    k_gradient, v_gradient = map(of_layer, of_entries)
    return q_gradient[:rows], k_gradient, v_gradient


def _padded(array: Array, missing: int, axis: int) -> Array:
    if not missing:
        return array
    return jnp.pad(array, [(0, missing if each == axis else 0) for each in range(array.ndim)])
