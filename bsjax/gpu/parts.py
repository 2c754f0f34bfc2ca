"""Combines the parts of tiles that a schedule splits along the keys."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bsjax.masks.schedule import Parts


def combined_parts(
    out: Float[Array, "queries q_heads head_dim"],
    lse: Float[Array, "queries q_heads"],
    part_out: Float[Array, "parts kv_heads block_q head_dim"],
    part_lse: Float[Array, "parts kv_heads block_q"],
    parts: Parts,
    stacked_heads: int,
) -> tuple[Float[Array, "queries q_heads head_dim"], Float[Array, "queries q_heads"]]:
    """The outputs with the rows of split tiles, from the outputs of their parts.

    Args:
      out: the output of the kernel, in which the rows of split tiles are undefined.
      lse: its natural log-sum-exp, float32.
      part_out: the output of each part, float32; its rows are pairs of a query row and a head.
      part_lse: its natural log-sum-exp, float32.
      parts: which tile each part belongs to.
      stacked_heads: how many query heads share a key head.

    Returns:
      The output and its log-sum-exp.
    """
    count, kv_heads, block_q, _ = part_out.shape
    over_tiles = functools.partial(
        jax.ops.segment_sum, segment_ids=parts.tile, num_segments=count, indices_are_sorted=True
    )
    greatest = jax.ops.segment_max(part_lse, parts.tile, count, indices_are_sorted=True)
    # Finite even where no key is seen, so that no infinities are subtracted.
    greatest = jnp.maximum(greatest, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(part_lse - greatest[jnp.minimum(parts.tile, count - 1)])
    total = over_tiles(weights)
    seen = total > 0
    divisor = jnp.where(seen, total, 1.0)
    of_tile = over_tiles(weights[..., None] * part_out) / divisor[..., None]
    lse_of_tile = jnp.where(seen, greatest + jnp.log(divisor), -jnp.inf)

    # Each tile's first row and rows, from any of its parts. Out of bounds: dropped.
    first_row, rows = (
        jnp.full(count, value, jnp.int32).at[parts.tile].set(field, mode="drop")
        for value, field in ((out.shape[0], parts.first_row), (0, parts.rows))
    )
    index = jnp.arange(block_q, dtype=jnp.int32)
    row = first_row[:, None] + index // stacked_heads
    row = jnp.where(index // stacked_heads < rows[:, None], row, out.shape[0])[:, None, :]
    head = jnp.arange(kv_heads, dtype=jnp.int32)[:, None] * stacked_heads + index % stacked_heads
    return (
        out.at[row, head].set(of_tile.astype(out.dtype), mode="drop"),
        lse.at[row, head].set(lse_of_tile, mode="drop"),
    )
