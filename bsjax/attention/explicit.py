"""Attention over the devices of a mesh with explicit axes, whose arrays say how they are sharded.

Heads stay where they are. If rows are sharded, every device is given all rows of its heads and a
share of the tiles, and rows go back to where they came from: shares have about equally many blocks,
whichever rows they are of.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from bsjax.attention.backends import GPU_KERNELS
from bsjax.errors import MaskError
from bsjax.masks.block_mask import BlockMask
from bsjax.masks.schedule import share_of_tiles

Attend = Callable[[Array, Array, Array, BlockMask, Array], tuple[Array, Array]]


def over_devices(
    attend: Attend, q: Array, k: Array, v: Array, mask: BlockMask, *, backend: str
) -> tuple[Array, Array]:
    """`attend(q, k, v, mask, mask.head_category)`, computed where the queries are.

    Args:
      attend: attention of any of the heads; rows in prompt order.
      q: queries.
      k: keys.
      v: values.
      mask: the mask.
      backend: what `attend` computes with, already resolved.

    Returns:
      The output and the log-sum-exp, with rows and heads sharded like those of `q`.

    Raises:
      MaskError: the key heads cannot be divided like the query heads.
    """
    rows, heads, _ = jax.typeof(q).sharding.spec
    shardings = [jax.typeof(array).sharding for array in (q, k, v, *jax.tree.leaves(mask))]
    if all(axis is None for sharding in shardings for axis in sharding.spec):
        return attend(q, k, v, mask, jnp.asarray(mask.head_category))
    mesh = next(sharding.mesh for sharding in shardings if not sharding.mesh.empty)
    # The reference has no tiles.
    dealt = None if backend == "reference" else rows
    sizes = {None: 1, **mesh.shape}

    def count(axes: Any) -> int:
        return math.prod(sizes[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)))

    if k.shape[1] % count(heads):
        raise MaskError(
            f"q has its heads on {count(heads)} devices, among which the {k.shape[1]} heads of k "
            "and v cannot be divided: repeat them, or shard the heads over fewer devices."
        )

    def on_device(
        q: Array, k: Array, v: Array, mask: BlockMask, head_category: Array
    ) -> tuple[Array, Array]:
        if dealt is None:
            return attend(q, k, v, mask, head_category)
        share = jax.lax.axis_index(dealt)
        mask = mask.with_schedule(share_of_tiles(mask.schedule, share, count(dealt)))
        out, lse = attend(q, k, v, mask, head_category)
        seen = ~jnp.isneginf(lse)
        # Each row is that of one device; on the others it is zeros.
        out, lse, seen = (
            jax.lax.psum_scatter(array, dealt, tiled=True)
            for array in (out, jnp.where(seen, lse, 0.0), seen.astype(jnp.int32))
        )
        return out, jnp.where(seen > 0, lse, -jnp.inf)

    def resharded(arrays: Any, specs: Any) -> Any:
        return jax.sharding.reshard(arrays, jax.tree.map(partial(NamedSharding, mesh), specs))

    of_heads = PartitionSpec(None, heads, None)
    nowhere = jax.tree.map(lambda _: PartitionSpec(), mask)
    specs = (of_heads, of_heads, of_heads, nowhere, PartitionSpec(heads))
    results = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=specs,
        out_specs=(PartitionSpec(dealt, heads, None), PartitionSpec(dealt, heads)),
        # Interpreted kernels do not pass the check, nor do those of jax-triton.
        check_vma=backend not in GPU_KERNELS,
    )(*resharded((q, k, v, mask, jnp.asarray(mask.head_category)), specs))
    return resharded(results, (PartitionSpec(rows, heads, None), PartitionSpec(rows, heads)))
