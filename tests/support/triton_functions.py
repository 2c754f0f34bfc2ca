"""Functions that tests run in Triton's interpreter (see `tests.support.triton_interpreter`)."""

from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from jax.sharding import NamedSharding, PartitionSpec

import bsjax
from bsjax.triton.launch import Launch, call
from bsjax.triton.predicate import sees


@triton.jit
@no_type_check
def _pairs(
    query_position,
    query_image,
    key_position,
    key_image,
    own_from,
    other_from,
    seen,
    scratch: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
):
    query = tl.arange(0, QUERIES)
    key = tl.arange(0, KEYS)
    pairs = sees(
        tl.load(query_position + query)[:, None],
        tl.load(query_image + query)[:, None],
        tl.load(key_position + key)[None, :],
        tl.load(key_image + key)[None, :],
        tl.load(own_from + key)[None, :],
        tl.load(other_from + key)[None, :],
        WINDOW,
    )
    tl.store(seen + query[:, None] * KEYS + key[None, :], pairs.to(tl.float32))


def seen_pairs(queries: tuple[np.ndarray, ...], keys: tuple[Any, ...], window: int) -> Any:
    """The kernels' predicate for every pair: 1.0 or 0.0 [queries, keys]."""
    shape = (queries[0].size, keys[0].size)
    (seen,) = call(
        _pairs,
        [*map(jnp.asarray, (*queries, *keys))],
        [jax.ShapeDtypeStruct(shape, jnp.float32)],
        {"QUERIES": shape[0], "KEYS": shape[1], "WINDOW": window},
        Launch("seen_pairs", (1,), 4, 1),
    )
    return seen


def outputs_and_gradients(
    q: Any, k: Any, v: Any, mask: Any, backend: str, mesh: tuple[int, int] | None = None
) -> Any:
    """Output and log-sum-exp of `sparse_attention`, and gradients of a weighted sum of both.

    With `mesh`, rows and heads are sharded over so many devices. If arrays have one axis more, the
    first, there is one result for each of its entries.
    """
    if mesh is not None:
        axes = ("context", "tensor")
        sharding = NamedSharding(jax.make_mesh(mesh, axes), PartitionSpec(*axes))
        q, k, v = (jax.device_put(array, sharding) for array in (q, k, v))

    def loss(q: Any, k: Any, v: Any) -> Any:
        out, lse = bsjax.sparse_attention(q, k, v, mask, backend=backend, return_lse=True)
        return (out * jnp.cos(out)).sum() + lse.sum(), (out, lse)

    gradients_of = jax.grad(loss, (0, 1, 2), has_aux=True)
    if q.ndim > 3:
        gradients_of = jax.vmap(gradients_of)
    gradients, outputs = jax.jit(gradients_of)(*map(jnp.asarray, (q, k, v)))
    return (*outputs, *gradients)
