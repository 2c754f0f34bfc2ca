"""What model families share: attention of layers, stacked layers, gated MLPs, rotary embedding."""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from bsjax.attention import decode_attention, ragged_attention, with_own_token
from bsjax.errors import CheckpointError
from bsjax.models.cache import Cache, CachedRows, GlobalRows, WindowRows
from bsjax.models.collectives import CONTEXT, TENSOR, gathered, rows_of_all, summed

Attend = Callable[[Array, Array, Array], Array]
"""Attention of one layer: maps q [rows, q_heads, head_dim] and k, v [rows, kv_heads, head_dim] to
[rows, q_heads, head_dim]. What each row sees is bound into the function."""

KeepingAttend = Callable[[Array, Array, Array], tuple[Array, Any]]
"""Like `Attend`, but also returns what to keep from the layer: keys and values for a cache,
statistics of the scores, or None. There may be fewer queries than keys."""

LayerAttend = Callable[[Array, Array, Array, Any], tuple[Array, Any]]
"""Like `KeepingAttend`, for all layers of one kind. The last argument is the layer's slice of the
arrays that are scanned over together with the layers."""

Layer = TypeVar("Layer", bound=nnx.Module)

LayerStep = Callable[[Layer, Any, Any], tuple[Any, Any]]
"""Runs one layer: `step(layer, carry, scanned_of_layer)` returns the next carry, such as the hidden
state, and the layer's output."""

MLP_ROWS = 8192
"""Rows that `by_rows` passes to a function at a time; enough to keep a GPU's matrix units busy."""

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "silu": jax.nn.silu,
}


# Rows of a matrix that one reduction on a GPU sums. Few enough that matrices of published sizes
# occupy all multiprocessors; many enough that the partial sums are much smaller than the matrix.
_ROWS_PER_SUM = 128
_LEAST_PER_SUM = 32


@cache
def activation(name: str) -> Callable[[Array], Array]:
    """The activation function that Hugging Face configs call `name`.

    It computes in float32 and returns its argument's dtype. The same name always returns the same
    object, so that equally built modules compare equal and share compiled programs.

    Raises:
      CheckpointError: the activation is not supported.
    """
    if name not in _ACTIVATIONS:
        raise CheckpointError(
            f"The config asks for the activation function {name!r}; supported are "
            f"{', '.join(sorted(_ACTIVATIONS))}."
        )
    return partial(_in_float32, _ACTIVATIONS[name])


def _in_float32(function: Callable[[Array], Array], x: Array) -> Array:
    """`function(x)` computed in float32 and rounded to `x`'s dtype at the end."""
    return function(x.astype(jnp.float32)).astype(x.dtype)


CachingAttend = Callable[[Array, Array, Array, Array, Array, Cache], tuple[Array, Cache]]
"""Attention of one layer to a cache: `attend(q, k, v, categories, layer, cache)` returns the output
and the cache with `k` and `v` written to it. `layer` is the layer's index in the cache."""


def chunk_attend(rows: CachedRows, *, scale: float, backend: str) -> CachingAttend:
    """Attention of a chunk of a prompt to the chunks before it and to itself.

    The whole cache is carried from layer to layer, so that it is updated in place.

    Args:
      rows: where the keys of the chunk, and of the chunks before it, are in the cache.
      scale: factor applied to the scores.
      backend: attention backend.
    """
    attention = partial(ragged_attention, scale=scale, backend=backend)
    attend: Any = _attend_to_all if isinstance(rows, GlobalRows) else _attend_to_window
    return partial(attend, attention, rows)


def _attend_to_all(
    attention: Callable[..., Array],
    rows: GlobalRows,
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    categories: Int[Array, "q_heads"],
    layer: Int[Array, ""],
    cache: Cache,
) -> tuple[Float[Array, "queries q_heads head_dim"], Cache]:
    """Writes the chunk's keys and values, then attends to the rows of the cache."""
    cache = cache.chunk_written(layer, gathered(k, CONTEXT), gathered(v, CONTEXT), rows.runs)
    keys, values, layer_index = cache.all_rows(layer, rows.sequences)
    return attention(q, keys, values, rows.schedule, categories, layer_index), cache


def _attend_to_window(
    attention: Callable[..., Array],
    rows: WindowRows,
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    v: Float[Array, "rows kv_heads head_dim"],
    categories: Int[Array, "q_heads"],
    layer: Int[Array, ""],
    cache: Cache,
) -> tuple[Float[Array, "queries q_heads head_dim"], Cache]:
    """Attends to the window before the chunk and to the chunk, and updates the ring."""
    k, v = gathered(k, CONTEXT), gathered(v, CONTEXT)
    cached_rows = cache.k.shape[1]
    is_new = (rows.key_rows >= cached_rows)[:, None, None]
    keys, values = (
        jnp.where(
            is_new,
            new.at[rows.key_rows - cached_rows].get(mode="clip"),
            cached.at[layer, rows.key_rows].get(mode="clip"),
        )
        for cached, new in ((cache.k, k), (cache.v, v))
    )
    # The ring is read before it is written; otherwise XLA copies all of it.
    keys, values, k, v = jax.lax.optimization_barrier((keys, values, k, v))
    cache = cache.chunk_written(layer, k, v, rows.runs)
    return attention(q, keys, values, rows.schedule, categories), cache


def decode_attend(
    cache: Cache, tokens: Int[Array, "sequences"], *, scale: float, backend: str
) -> LayerAttend:
    """Attention of one token of each sequence to the cache and to itself.

    Layer indices are scanned over. The cache itself is not, because its slices would be copies.

    Args:
      cache: the cache of these layers.
      tokens: how many rows of each sequence are valid: its first ones.
      scale: factor applied to the scores.
      backend: attention backend.
    """
    sequences = tokens.shape[0]
    on_devices = cache.devices > 1

    def keeping(q: Array, k: Array, v: Array, index: Array) -> tuple[Array, Any]:
        # The axis of sequences is added inside the loop over layers. XLA would choose another
        # layout for a cache that has it outside, and copy the whole cache into the loop.
        cached_k, cached_v = (
            rows.reshape(rows.shape[0], sequences, -1, *rows.shape[2:]) for rows in cache
        )
        attend = partial(decode_attention, q, cached_k, cached_v, index)
        if not on_devices:
            return attend(tokens, k, v, scale=scale, backend=backend), (k, v)
        own = jnp.clip(tokens - cache.first_row(sequences), 0, cached_k.shape[2])
        out, lse = attend(own, scale=scale, backend=backend, return_lse=True)
        parts = gathered(out[None], CONTEXT), gathered(lse[None], CONTEXT)
        return with_own_token(*parts, q, k, v, scale=scale), (k, v)

    return keeping


def stack_layers(create: Callable[[nnx.Rngs], Layer], layers: int, rngs: nnx.Rngs) -> Layer:
    """A module whose parameters are those of `layers` modules, stacked on a leading axis."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create_all(rngs: nnx.Rngs) -> Layer:
        return create(rngs)

    return create_all(rngs)


def scan_layers(
    stacked: Layer,
    step: LayerStep[Layer],
    carry: Any,
    scanned: Any = None,
    *,
    layers: int | None = None,
) -> tuple[Any, Any]:
    """Runs stacked layers one after the other; compiled only once, whatever their number.

    Args:
      stacked: a module made by `stack_layers`.
      step: runs one layer.
      carry: the first layer's input: the hidden state, alone or with a cache.
      scanned: pytree of arrays with a leading layer axis; `step` is given a layer's slice.
      layers: how many layers run, from the first one on; None is all.

    Returns:
      The last carry, and the layers' outputs stacked on a leading axis.
    """
    if layers is not None:
        return jax.lax.scan(
            lambda carry, layer: run_layer(stacked, layer, step, carry, scanned),
            carry,
            jnp.arange(layers),
        )
    graph, parameters = nnx.split(stacked)

    def body(carry: Any, slices: tuple[Any, Any]) -> tuple[Any, Any]:
        parameters_of_layer, scanned_of_layer = slices
        return step(nnx.merge(graph, parameters_of_layer), carry, scanned_of_layer)

    return jax.lax.scan(body, carry, (parameters, scanned))


def scan_layers_of_kinds(
    stacked: Layer,
    kinds: Sequence[int],
    steps: Sequence[LayerStep[Layer]],
    carry: Any,
    scanned: Any = None,
) -> tuple[Any, tuple[Any, ...]]:
    """Like `scan_layers`, for layers of several alternating kinds.

    Kinds repeat with a period, such as five local layers and a global one. The program contains one
    period, in which consecutive layers of one kind are a loop, and the layers after the last whole
    period. Its size does not grow with the number of periods.

    Args:
      stacked: a module made by `stack_layers`.
      kinds: the kind of each layer to run, from the first layer on, as an index into `steps`. The
        remaining layers of the stack do not run.
      steps: one function for each kind. Their outputs may differ in structure and shape.
      carry: the first layer's input: the hidden state, alone or with caches.
      scanned: pytree of arrays with a leading layer axis; steps are given a layer's slice.

    Returns:
      The last carry and, for each kind, the outputs of its layers stacked on a leading axis;
      None for a kind that no layer has.
    """

    def one_layer(kind: int, layer: Any, carry: Any) -> tuple[Any, Any]:
        return run_layer(stacked, layer, steps[kind], carry, scanned)

    def run(kind: int, first: Any, count: int, carry: Any) -> tuple[Any, Any]:
        """Runs `count` layers of one kind from layer `first` on."""
        if count == 1:
            carry, output = one_layer(kind, first, carry)
            return carry, jax.tree.map(lambda array: array[None], output)
        return jax.lax.scan(
            lambda carry, layer: one_layer(kind, layer, carry), carry, first + jnp.arange(count)
        )

    def run_in_turn(kinds: Sequence[int], first: Any, carry: Any) -> tuple[Any, dict[int, Any]]:
        """Runs consecutive layers of these kinds, starting at layer `first`."""
        outputs: dict[int, list[Any]] = {}
        for kind, members in itertools.groupby(kinds):
            count = len(list(members))
            carry, output = run(kind, first, count, carry)
            outputs.setdefault(kind, []).append(output)
            first = first + count
        return carry, {kind: _concatenated(parts) for kind, parts in outputs.items()}

    period = period_of(kinds)
    periods = len(kinds) // period
    carry, outputs = jax.lax.scan(
        lambda carry, first: run_in_turn(kinds[:period], first, carry),
        carry,
        period * jnp.arange(periods),
    )
    outputs = jax.tree.map(
        lambda array: array.reshape(array.shape[0] * array.shape[1], *array.shape[2:]), outputs
    )
    carry, rest = run_in_turn(kinds[periods * period :], periods * period, carry)
    return carry, tuple(
        _concatenated([part[kind] for part in (outputs, rest) if kind in part])
        for kind in range(len(steps))
    )


def run_layer(
    stacked: Layer,
    layer: Int[Array, ""] | int,
    step: LayerStep[Layer],
    carry: Any,
    scanned: Any = None,
) -> tuple[Any, Any]:
    """Runs a single one of stacked layers, as `scan_layers` would.

    Args:
      stacked: a module made by `stack_layers`.
      layer: index of the layer.
      step: runs the layer.
      carry: the layer's input.
      scanned: pytree of arrays with a leading layer axis; `step` is given this layer's slice.

    Returns:
      The next carry and the layer's output.
    """
    graph, parameters = nnx.split(stacked)
    # Indexed in place: cutting layers out of the stack would copy the weights.
    parameters_of_layer, scanned_of_layer = jax.tree.map(
        lambda array: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False),
        (parameters, scanned),
    )
    return step(nnx.merge(graph, parameters_of_layer), carry, scanned_of_layer)


def period_of(kinds: Sequence[int]) -> int:
    """The smallest number of layers after which the kinds repeat; 1 if there are no layers."""
    return next(
        (
            period
            for period in range(1, len(kinds) + 1)
            if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds))
        ),
        1,
    )


def _concatenated(parts: Sequence[Any]) -> Any:
    """Pytrees of one structure, concatenated along their leading axes; None for an empty list."""
    if len(parts) < 2:
        return parts[0] if parts else None
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def by_inputs(
    lhs: Array,
    rhs: Array,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> Array:
    """The `dot_general` of a linear layer whose inputs are divided among the devices of `TENSOR`.

    The products of the devices are added up.
    """
    return summed(dot_general(lhs, rhs, dimension_numbers, precision, **options), TENSOR)


def dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: jax.lax.DotDimensionNumbers,
    precision: jax.lax.PrecisionLike = None,
    **options: Any,
) -> Array:
    """`jax.lax.dot_general` for `nnx.Linear` that reads the weights only once if there is one row.

    Decoding is bound by memory traffic. For a matrix product, XLA for GPUs copies a layer's weights
    out of their stack or writes all products to memory before it sums them, which triples the
    traffic. A reduction is fused with the slice of the stack instead.
    """
    product = partial(
        jax.lax.dot_general, dimension_numbers=dimension_numbers, precision=precision, **options
    )
    if lhs.shape[:-1] != (1,) or rhs.ndim != 2 or _rows_per_sum(rhs.shape[0]) < _LEAST_PER_SUM:
        return product(lhs, rhs)
    return jax.lax.platform_dependent(lhs, rhs, cuda=one_row_product, default=product)


def one_row_product(
    row: Float[Array, "1 width"], matrix: Float[Array, "width outputs"]
) -> Float[Array, "1 outputs"]:
    """`row @ matrix`, summed in float32 and returned in `row`'s dtype.

    The sum has two stages, because a single one does not occupy a whole GPU. The barrier keeps XLA
    from merging them.
    """
    rows = _rows_per_sum(matrix.shape[0])
    parts = (matrix.shape[0] // rows, rows)
    products = row.reshape(*parts, 1).astype(jnp.float32) * matrix.reshape(*parts, -1)
    sums = jax.lax.optimization_barrier(products.sum(axis=1))
    return sums.sum(axis=0, keepdims=True).astype(row.dtype)


def _rows_per_sum(width: int) -> int:
    """The largest divisor of a width that is at most `_ROWS_PER_SUM`."""
    return next(rows for rows in range(_ROWS_PER_SUM, 0, -1) if width % rows == 0)


def by_rows(
    function: Callable[[Array], Array], x: Float[Array, "rows width"]
) -> Float[Array, "rows out"]:
    """`function(x)` in bounded memory, for a function that treats each row independently.

    The inner width of an MLP is about five times the model's, so its inner activations would be the
    largest arrays when profiling runs a whole prompt. More than `MLP_ROWS` rows are therefore
    several calls, the remainder last. A chunk of a prompt usually has fewer rows, and is one call.
    """
    rows = x.shape[0]
    if rows <= MLP_ROWS:
        return function(x)
    in_chunks = rows // MLP_ROWS * MLP_ROWS
    chunks = jax.lax.map(function, x[:in_chunks].reshape(-1, MLP_ROWS, x.shape[1]))
    result = chunks.reshape(in_chunks, -1)
    if in_chunks < rows:
        result = jnp.concatenate([result, function(x[in_chunks:])])
    return result


def take_rows(array: Float[Array, "rows *axes"], rows: Int[Array, "taken"] | None) -> Array:
    """Some rows of a chunk, or all rows of this device if `rows` is None."""
    return array if rows is None else rows_of_all(array, rows)


def frequencies(theta: float, count: int) -> Float[np.ndarray, "count"]:
    """Angles per position of a rotary embedding: `theta ** -(i / count)`, float32.

    The power is rounded to float32 once, as torch rounds it nearly always. NumPy's own float32
    power is often one bit off, which at position 2,000 turns keys by 2e-4.
    """
    exponent = np.arange(count, dtype=np.float32) / np.float32(count)
    power = np.float64(theta) ** exponent.astype(np.float64)
    return np.float32(1) / power.astype(np.float32)


def rotate(
    x: Float[Array, "rows heads head_dim"],
    cos: Float[Array, "rows half"],
    sin: Float[Array, "rows half"],
) -> Float[Array, "rows heads head_dim"]:
    """Rotates the pairs (i, i + head_dim / 2), in float32; the result has `x`'s dtype.

    Equals `apply_rotary_pos_emb` of transformers' Qwen2-VL and Gemma 3, and Qwen2-VL's
    `apply_rotary_pos_emb_vision`, whose cosines and sines repeat in the two halves of a head.
    """
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class GatedMLP(nnx.Module):
    """Gated feed-forward layer (transformers: Qwen2MLP, Qwen2_5_VLMLP, Gemma3MLP)."""

    def __init__(
        self,
        width: int,
        inner: int,
        act: str,
        *,
        bias: bool,
        dtype: Any,
        rngs: nnx.Rngs,
        is_divided: bool = False,
    ) -> None:
        """Creates random parameters.

        Args:
          width: channels of inputs and outputs.
          inner: channels between them.
          act: name of the activation.
          bias: whether the linear layers have biases.
          dtype: dtype of the parameters.
          rngs: random numbers.
          is_divided: whether the inner channels are divided among the devices of a mesh.
        """
        linear = partial(nnx.Linear, use_bias=bias, param_dtype=dtype, rngs=rngs)
        self.gate_proj = linear(width, inner, dot_general=dot_general)
        self.up_proj = linear(width, inner, dot_general=dot_general)
        self.down_proj = linear(inner, width, dot_general=by_inputs if is_divided else dot_general)
        self.act = activation(act)

    def __call__(self, hidden: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
        """The gated projection of each row."""
        return self.down_proj(self.act(self.gate_proj(hidden)) * self.up_proj(hidden))
