"""The queries, keys and values on which attention implementations are compared."""

from dataclasses import dataclass

import jax

from benchmarks.workloads import Workload


@dataclass(frozen=True, eq=False)
class Arrays:
    """Inputs of a workload: q [tokens, q_heads, head_dim], k and v [tokens, kv_heads, head_dim]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array


def random_arrays(workload: Workload) -> Arrays:
    """Normally distributed inputs in the shape's dtype."""
    shape = workload.shape
    keys = jax.random.split(jax.random.key(0), 3)
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads)
    return Arrays(
        *(
            jax.random.normal(key, (workload.tokens, count, shape.head_dim), shape.dtype)
            for key, count in zip(keys, heads, strict=True)
        )
    )
