"""Prefill attention on GPUs, in Triton: what goes into the kernel and what comes out."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.gpu.configurations import KernelConfiguration
from bsjax.gpu.keys import block_keys
from bsjax.gpu.parts import combined_parts
from bsjax.masks.schedule import Schedule
from bsjax.triton import configurations
from bsjax.triton.heads import head_blocks
from bsjax.triton.launch import Launch, call
from bsjax.triton.prefill_kernel import attend_tile
from bsjax.triton.product import precision_of


def prefill_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "*layers keys kv_heads head_dim"],
    v: Float[Array, "*layers keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    layer: Int[Array, ""] | None = None,
    *,
    scale: float,
    configuration: KernelConfiguration | None = None,
) -> tuple[Float[Array, "queries q_heads head_dim"], Float[Array, "queries q_heads"]]:
    """Block-sparse attention to the keys of one layer, for NVIDIA GPUs.

    The same function of its arguments as `bsjax.pallas.prefill.prefill_attention`.

    Args:
      q: queries, rows in the order of the schedule; bfloat16, float16 or float32.
      k: keys, in the dtype of `q`. Query head h reads key head h // (q_heads // kv_heads). All must
        be finite, even in padding rows and where no query sees them.
      v: values, of the shape and dtype of `k`; all finite.
      schedule: which blocks to visit. Both block sizes are powers of two, 16 or more.
      head_category: int32, the table of the schedule that each query head uses.
      layer: the layer whose keys and values are read; None if there is no axis of layers.
      scale: factor applied to the scores, above 0.
      configuration: how to compile, for tuning; its block sizes must divide those of the schedule.
        By default the result of `configurations.configuration`.

    Returns:
      The output in the dtype of `q`, and the natural log-sum-exp of every row's scores, float32
      [queries, q_heads]. A row that sees no key, such as a padding row, yields zeros and -inf. Sums
      are in float32; float32 inputs are multiplied in float32, not in TF32.

    Raises:
      BackendError: the kernel does not support the block sizes, head dimension or dtype.
    """
    if layer is None:
        k, v, layer = k[None], v[None], jnp.int32(0)
    rows, q_heads, head_dim = q.shape
    _, key_rows, kv_heads, _ = k.shape
    configuration = configurations.checked_configuration(
        head_dim, q.dtype, schedule.block_q, schedule.block_kv, configuration
    )
    blocks = head_blocks(head_dim)
    programs_per_tile = schedule.block_q // configuration.block_q

    keys = block_keys(k, v, schedule, configuration.block_kv)
    visibility = keys.visibility

    tables, tiles = schedule.tile_columns.shape[:2]
    heads, entries = schedule.grid(q_heads, kv_heads)
    # Without stacked heads, the kernel does not read it.
    launch = 0 if schedule.launch_columns is None else jnp.asarray(schedule.launch_columns)
    outputs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((rows, q_heads), jnp.float32),
    ]
    parts = schedule.parts
    if parts is not None:
        shape = (parts.count, kv_heads, schedule.block_q)
        outputs += [
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ]
    out, lse, *of_parts = call(
        attend_tile,
        [
            q,
            keys.k,
            keys.v,
            jnp.asarray(schedule.queries.position),
            jnp.asarray(schedule.queries.image),
            visibility.position[0],
            visibility.image[0],
            visibility.own_from,
            visibility.other_from,
            jnp.asarray(layer, jnp.int32).reshape(1),
            jnp.asarray(head_category, jnp.int32),
            launch,
            jnp.asarray(schedule.tile_columns),
            jnp.asarray(schedule.range_columns),
            keys.rows,
            tiles,
            schedule.range_columns.shape[1],
        ],
        outputs,
        {
            "HEAD_DIM": head_dim,
            "FIRST": blocks.first,
            "SECOND": blocks.second,
            "Q_HEADS": q_heads,
            "KV_HEADS": kv_heads,
            "STACKED": bool(schedule.stacked_heads),
            "TABLES": tables,
            "PARTS": parts is not None,
            "BLOCK_Q": configuration.block_q,
            "BLOCK_KV": configuration.block_kv,
            "PROGRAMS_PER_TILE": programs_per_tile,
            "STEPS_PER_BLOCK": schedule.block_kv // configuration.block_kv,
            "WINDOW": schedule.visibility.window or 0,
            "TO_LOG2": scale * math.log2(math.e),
            "PRECISION": precision_of(q.dtype),
            "WIDE": keys.rows * kv_heads * head_dim >= 2**31,
        },
        Launch(
            "prefill_attention",
            (heads, entries * programs_per_tile),
            configuration.num_warps,
            configuration.num_stages,
        ),
    )
    if parts is not None:
        part_out, part_lse = of_parts
        return combined_parts(out, lse, part_out, part_lse, parts, schedule.stacked_heads)
    return out, lse
