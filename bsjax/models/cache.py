"""The KV cache of a stack of layers."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Cache(NamedTuple):
    """Keys and values of the tokens so far: prefill's rows in their order, then decoded tokens.

    Attributes:
      k: [layers, cache_length, kv_heads, head_dim], rotary embedding applied.
      v: [layers, cache_length, kv_heads, head_dim].
    """

    k: Float[Array, "layers cache_length kv_heads head_dim"]
    v: Float[Array, "layers cache_length kv_heads head_dim"]

    def written(
        self,
        k: Float[Array, "layers 1 kv_heads head_dim"],
        v: Float[Array, "layers 1 kv_heads head_dim"],
        row: Int[Array, ""],
    ) -> "Cache":
        """The cache with one row of every layer replaced, in place if the cache is donated."""
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=1)
        return Cache(write(self.k, k), write(self.v, v))


def fit_rows(
    x: Float[Array, "rows heads head_dim"], rows: int
) -> Float[Array, "fitted heads head_dim"]:
    """`x` cut or zero-padded to `rows` rows."""
    x = x[:rows]
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0), (0, 0)))
