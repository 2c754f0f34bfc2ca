"""What several model families share: stacked layers, rotary embeddings, activations, KV cache."""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bsjax.errors import CheckpointError

Attend = Callable[[Array, Array, Array], Array]
"""Attention over one layer: q [rows, q_heads, head_dim], k and v [rows, kv_heads, head_dim] to
[rows, q_heads, head_dim]. What a row may see is bound into it."""

CHUNK_ROWS = 8192
"""Rows that `by_rows` hands to a function at a time: plenty for the matrix products of a GPU."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far: prefill's rows in their order, then decoded ones.

    Attributes:
      k: [layers, cache_length, kv_heads, head_dim], rotary embedding applied.
      v: [layers, cache_length, kv_heads, head_dim].
    """

    k: Float[Array, "layers cache_length kv_heads head_dim"]
    v: Float[Array, "layers cache_length kv_heads head_dim"]


@cache
def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that a Hugging Face config calls `name`.

    It computes in float32 and returns its argument's dtype. One name is always one object, which
    keeps modules built alike equal, and what is compiled for one usable for the other.

    Raises:
      CheckpointError: no supported model uses such an activation.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"The config's hidden_act is {name!r}; supported are {', '.join(sorted(_ACTIVATIONS))}."
        )
    return partial(_in_float32, _ACTIVATIONS[name])


def _in_float32(function: Callable[[Array], Array], x: Array) -> Array:
    """`function` without rounding to `x`'s dtype on the way."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


def stack_layers(
    create: Callable[[nnx.Rngs], nnx.Module], layers: int, rngs: nnx.Rngs
) -> nnx.Module:
    """A module whose parameters are those of `layers` modules, stacked on a leading axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create_all(rngs: nnx.Rngs) -> nnx.Module:
        return create(rngs)

    return create_all(rngs)


def scan_layers(stacked, step, hidden, scanned=None):
    """Runs stacked layers one after the other: compiled once, whatever their number.

    Args:
      stacked: a module made by `stack_layers`.
      step: called as `step(layer, hidden, scanned_of_layer)`; returns the next hidden state and the
        layer's output.
      hidden: what the first layer starts from.
      scanned: pytree of arrays with a leading layer axis, one slice of which goes to each layer.

    Returns:
      The last hidden state, and the layers' outputs stacked on a leading axis.
    """
    graph, parameters = nnx.split(stacked)

    def body(hidden, slices):
        parameters_of_layer, scanned_of_layer = slices
        return step(nnx.merge(graph, parameters_of_layer), hidden, scanned_of_layer)

    return jax.lax.scan(body, hidden, (parameters, scanned))


def by_rows(
    function: Callable[[Array], Array], x: Float[Array, "rows width"]
) -> Float[Array, "rows out"]:
    """`function(x)`, for a function that looks at each row by itself, in bounded memory.

    Up to `CHUNK_ROWS` rows that is one call. Beyond, whole chunks run one after the other and what
    is left of the rows after them, so that what `function` makes on the way is never larger than a
    chunk's: the inner width of an MLP is five times a model's, and a prompt has 300K rows.
    """
    rows = x.shape[0]
    if rows <= CHUNK_ROWS:
        return function(x)
    in_chunks = rows // CHUNK_ROWS * CHUNK_ROWS
    chunks = jax.lax.map(function, x[:in_chunks].reshape(-1, CHUNK_ROWS, x.shape[1]))
    result = chunks.reshape(in_chunks, -1)
    if in_chunks < rows:
        result = jnp.concatenate([result, function(x[in_chunks:])])
    return result


def frequencies(theta: float, count: int) -> Float[np.ndarray, "count"]:
    """The angles per position of a rotary embedding: `theta ** -(i / count)`, float32."""
    exponent = np.arange(count, dtype=np.float32) / np.float32(count)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def rotate(
    x: Float[Array, "rows heads head_dim"],
    cos: Float[Array, "rows half"],
    sin: Float[Array, "rows half"],
) -> Float[Array, "rows heads head_dim"]:
    """Rotary embedding of pairs (i, i + head_dim / 2), in float32; the result has `x`'s dtype.

    Computes `apply_rotary_pos_emb`, and `apply_rotary_pos_emb_vision`, of transformers' Qwen2-VL,
    whose cosines and sines repeat in the two halves of a head.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def fit_rows(
    x: Float[Array, "rows heads head_dim"], rows: int
) -> Float[Array, "fitted heads head_dim"]:
    """`x` cut or padded with zeros to `rows` rows."""
    x = x[:rows]
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0), (0, 0)))


def cached_attention(
    q: Float[Array, "1 q_heads head_dim"],
    k: Float[Array, "1 kv_heads head_dim"],
    v: Float[Array, "1 kv_heads head_dim"],
    cached_k: Float[Array, "cache_length kv_heads head_dim"],
    cached_v: Float[Array, "cache_length kv_heads head_dim"],
    length: Int[Array, ""],
    *,
    scale: float,
) -> Float[Array, "1 q_heads head_dim"]:
    """Attention of one new token to the first `length` cached tokens and to itself.

    The new token's own key and value stand beside the cache instead of in it, so that a layer only
    reads the cache: one write for all layers, after the last one, puts them there.

    Returns:
      The attention output in `q`'s dtype; scores and sums are float32.
    """
    _, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(kv_heads, q_heads // kv_heads, head_dim)
    product = partial(jnp.einsum, preferred_element_type=jnp.float32)

    cached_score = scale * product("kgd,ckd->kgc", grouped, cached_k)
    own_score = scale * product("kgd,kd->kg", grouped, k[0])[..., None]
    cached_score = jnp.where(jnp.arange(cached_k.shape[0]) < length, cached_score, -jnp.inf)

    greatest = jnp.maximum(
        jnp.max(cached_score, axis=-1, keepdims=True, initial=-jnp.inf), own_score
    )
    cached_weight = jnp.exp(cached_score - greatest)
    own_weight = jnp.exp(own_score - greatest)
    total = jnp.sum(cached_weight, axis=-1, keepdims=True) + own_weight
    output = product("kgc,ckd->kgd", cached_weight.astype(v.dtype), cached_v)
    output = output + own_weight * v[0, :, None, :].astype(jnp.float32)
    return (output / total).astype(q.dtype).reshape(1, q_heads, head_dim)
