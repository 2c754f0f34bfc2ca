"""The KV cache of a stack of layers: what prefill fills and decoding reads."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.attention import decode_attention, ragged_attention
from bsjax.masks.schedule import Schedule
from bsjax.models.layers import LayerAttend


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far: prefill's rows in their order, then decoded ones.

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
        """The cache with one row of every layer replaced: in place, where it is donated."""
        write = partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=1)
        return Cache(write(self.k, k), write(self.v, v))


def filling_attend(
    schedule: Schedule,
    kept_rows: Callable[[Float[Array, "rows kv_heads head_dim"]], Array],
    *,
    scale: float,
    backend: str,
) -> LayerAttend:
    """Prefill's attention; what travels with the layers is the categories of their heads.

    Args:
      schedule: what each row sees, by head category.
      kept_rows: what of a layer's keys, and of its values, the cache is to hold. It is taken a
        layer at a time, so that the cache exists once, at its final size.
      scale: factor of the scores.
      backend: of the attention.
    """

    def attend(q: Array, k: Array, v: Array, categories: Array) -> tuple[Array, tuple]:
        attended = ragged_attention(q, k, v, schedule, categories, scale=scale, backend=backend)
        return attended, (kept_rows(k), kept_rows(v))

    return attend


def reading_attend(
    cache: Cache, tokens: Int[Array, ""], *, scale: float, backend: str
) -> LayerAttend:
    """Attention of one token to the cache and to itself; what travels is the layers' indices.

    The cache does not travel with the layers: slices of it would be copies.

    Args:
      cache: of the layers this is for.
      tokens: how many of its first rows hold keys.
      scale: factor of the scores.
      backend: of the attention.
    """
    lengths = jnp.reshape(tokens, 1)
    cached_k, cached_v = cache.k[:, None], cache.v[:, None]

    def attend(q: Array, k: Array, v: Array, index: Array) -> tuple[Array, tuple]:
        # Without `return_lse` it is the output alone.
        attended: Any = decode_attention(
            q, cached_k, cached_v, index, lengths, k, v, scale=scale, backend=backend
        )
        return attended, (k, v)

    return attend


def fit_rows(
    x: Float[Array, "rows heads head_dim"], rows: int
) -> Float[Array, "fitted heads head_dim"]:
    """`x` cut or padded with zeros to `rows` rows."""
    x = x[:rows]
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0), (0, 0)))
