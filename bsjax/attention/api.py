"""Attention over a schedule, for users and for models.

    sparse_attention    one prompt under a `BlockMask`, prompt order in and out
    ragged_attention    rows in the order of a schedule: language models and vision towers

Arrays are checked here, once; the backends do not check them again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from bsjax.attention.backends import GPU_KERNELS, resolve_backend, triton_problem
from bsjax.attention.explicit import over_devices
from bsjax.attention.first_order import first_order_only
from bsjax.attention.reference import reference_attention
from bsjax.attention.xla import Residuals, attention_gradients, xla_attention
from bsjax.checks import as_number, check_not_forked, shown, truth_value
from bsjax.errors import BackendError, MaskError
from bsjax.gpu.configurations import compiles_for_gpus
from bsjax.manual_axes import varying_axes, varying_over
from bsjax.masks.block_mask import BlockMask
from bsjax.masks.schedule import Schedule


@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    scale: float | Float[Array, ""] | None = None,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    scale: float | Float[Array, ""] | None = None,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


@overload
def sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask,
    *,
    scale: float | Float[Array, ""] | None = None,
    backend: str = "auto",
    return_lse: bool,
) -> Array | tuple[Array, Array]: ...


def sparse_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "keys kv_heads head_dim"],
    v: Float[Array, "keys kv_heads head_dim"],
    mask: BlockMask,
    *,
    scale: float | Float[Array, ""] | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention under a block mask; invisible blocks are never computed.

    Works inside and outside `jax.jit`. A mask is a pytree and can be an argument of the jitted
    function, so that masks of the same shapes share one compiled program. Outside of `jax.jit`, JAX
    still compiles a program for each number of tokens and each scale, and keeps it until
    `jax.clear_caches()`.

    Arrays may be sharded: docs/devices.md shows how, with an example of each way.

    Args:
      q: the mask's queries in prompt order; bfloat16, float16 or float32. Query head h reads
        key-value head h // (q_heads // kv_heads).
      k: keys of all tokens in prompt order, in the dtype of `q`; all finite. Where the mask has
        several prompts, the arrays hold one after the other.
      v: values, in the dtype of `q`; all finite, even where no query sees them.
      mask: which keys each query of each head sees.
      scale: factor applied to the scores, above 0; head_dim ** -0.5 by default. A traced scale
        multiplies `q`, rounded to its dtype, and is not checked.
      backend: `pallas` (GPU kernel, head_dim up to 256; on a CPU it is interpreted, hence slow),
        `triton` (the same in Triton, for GPUs; needs the extra `triton`), `xla` (any device),
        `reference` (holds the whole score matrix), or `auto`: pallas on an NVIDIA GPU of the Ampere
        generation or later, triton there if JAX has no pallas, xla elsewhere. All support
        first-order reverse-mode gradients (`jax.grad`, `jax.vjp`). On a GPU, those of pallas and
        triton are computed by kernels if the mask was built with `gradients=True` and the extra
        `triton` is installed, outside of `jax.shard_map` with `check_vma`; else by xla's code,
        slowly.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [queries, q_heads, head_dim] in the dtype of `q`. With `return_lse` also the
      log-sum-exp [queries, q_heads] of the scaled scores, float32. A query that sees no key yields
      zeros and -inf.

    Raises:
      MaskError: shapes or dtypes do not match each other or the mask, or the scale is not above 0.
      BackendError: the backend is unknown, not installed, or does not support the head dimension,
        dtype or block sizes; triton without a GPU; inside of `jax.shard_map` with `check_vma`,
        triton always, and pallas without a GPU; gradients of gradients.
    """
    check_not_forked(BackendError)
    if not isinstance(mask, BlockMask):
        raise MaskError(f"mask must be a bsjax.BlockMask, got {type(mask).__name__}.")
    for name, array in (("q", q), ("k", k), ("v", v)):
        if not isinstance(array, jax.Array | np.ndarray):
            raise MaskError(f"{name} must be a JAX or NumPy array, got {type(array).__name__}.")
    return_lse = truth_value("return_lse", return_lse, error=MaskError)
    _check(q, k, v, None, mask.schedule, mask.head_category)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    elif isinstance(scale, Tracer):
        q, scale = _scaled(q, scale), 1.0
    else:
        scale = _finite_in_float32(scale)
    out, lse = _in_prompt_order(q, k, v, mask, scale, resolve_backend(backend))
    return (out, lse) if return_lse else out


def _finite_in_float32(scale: Any) -> float:
    """The scale as a number that is above 0 and finite where kernels compute, in float32."""
    number = as_number(scale)
    limits = np.finfo(np.float32)
    if not float(limits.tiny) <= number <= float(limits.max):
        raise MaskError(
            "The scale of attention scores must be a number above 0 that float32 can hold, got "
            f"{shown(scale)}."
        )
    return float(number)


def _scaled(q: Array, scale: Any) -> Array:
    """Queries multiplied by a traced scale, because kernels are compiled for one scale."""
    is_real = jnp.issubdtype(scale.dtype, jnp.floating) or jnp.issubdtype(scale.dtype, jnp.integer)
    if scale.shape or not is_real:
        raise MaskError(f"A traced scale must be one number, got {scale.dtype} {scale.shape}.")
    return (q.astype(jnp.float32) * scale.astype(jnp.float32)).astype(q.dtype)


@partial(jax.jit, static_argnames=("scale", "backend"))
def _in_prompt_order(
    q: Array, k: Array, v: Array, mask: BlockMask, scale: float, backend: str
) -> tuple[Array, Array]:
    def attend(
        q: Array, k: Array, v: Array, mask: BlockMask, head_category: Array
    ) -> tuple[Array, Array]:
        rows_q = q[mask.order]
        rows_k, rows_v = (array[mask.key_order][None] for array in (k, v))
        layer = jnp.asarray(0, jnp.int32)
        out, lse = _attend(
            rows_q, rows_k, rows_v, mask.schedule, head_category, layer, scale, backend
        )
        return out[mask.row], lse[mask.row]

    return over_devices(attend, q, k, v, mask, backend=backend)


@overload
def ragged_attention(
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Array | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: Literal[False] = False,
) -> Array: ...


@overload
def ragged_attention(
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Array | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: Literal[True],
) -> tuple[Array, Array]: ...


def ragged_attention(
    q: Float[Array, "queries q_heads head_dim"],
    k: Float[Array, "*layers keys kv_heads head_dim"],
    v: Float[Array, "*layers keys kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    layer: Int[Array, ""] | None = None,
    *,
    scale: float,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention over a schedule, rows in its order: what language models and vision towers call.

    Keys and values may be the cache of all layers: the rows of one layer are read where they are.

    Args:
      q: queries, `schedule.query_rows` rows, padding included; bfloat16, float16 or float32. Query
        head h reads key-value head h // (q_heads // kv_heads).
      k: keys, `schedule.key_rows` rows, in the dtype of `q`; all finite. With `layer`, keys of all
        layers.
      v: values, in the dtype of `q`; all finite, even in padding rows and where no query sees them.
      schedule: which blocks to visit.
      head_category: int32, the table of the schedule that each query head uses; may be traced.
      layer: int32, the layer whose keys and values are read; may be traced. None if there is no
        axis of layers.
      scale: factor applied to the scores, above 0.
      backend: one of `BACKENDS`. On a CPU, `pallas` interprets the kernel: exact, and very slow;
        `triton` needs a GPU.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [queries, q_heads, head_dim] in the dtype of `q`. With `return_lse` also the
      log-sum-exp [queries, q_heads] of the scaled scores, float32. Rows that see nothing, such as
      padding rows, are zeros and -inf.

    Raises:
      MaskError: shapes or dtypes do not match each other or the schedule, or the scale is not above
        0.
      BackendError: the backend is unknown, or does not support the head dimension, dtype or block
        sizes.
    """
    _check(q, k, v, layer, schedule, head_category)
    if not scale > 0:
        raise MaskError(f"The scale of attention scores must be above 0, got {scale}.")
    backend = resolve_backend(backend)
    if schedule.parts is not None and backend not in GPU_KERNELS:
        raise MaskError(
            f"Only the backends pallas and triton combine the parts of split tiles, not {backend}."
        )
    if layer is None:
        k, v, layer = k[None], v[None], jnp.int32(0)
    head_category = jnp.asarray(head_category)
    result = _attend(q, k, v, schedule, head_category, layer, scale, backend)
    return result if return_lse else result[0]


def _attend(
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Any,
    scale: float,
    backend: str,
) -> tuple[Array, Array]:
    """Output and log-sum-exp, computed by one backend; `backend` is not `auto` here."""
    # Outside of the functions with gradients of their own, so that JAX adds up the gradients of
    # what is the same on several devices.
    arrays = q, k, v, schedule, head_category, layer
    axes = varying_axes(arrays)
    q, k, v, schedule, head_category, layer = varying_over(axes, arrays)
    result: Any
    match backend:
        case "pallas" | "triton":
            if axes:
                _check_in_shard_map(backend)
            kernel = {"pallas": _pallas_attention, "triton": _triton_attention}[backend]
            schedule = jax.tree.map(jnp.asarray, schedule)
            result = _kernel_attention(kernel, q, k, v, schedule, head_category, layer, scale)
        case "xla":
            result = xla_attention(q, k, v, schedule, head_category, layer, scale)
        case _:
            result = reference_attention(q, k[layer], v[layer], schedule, head_category, scale)
    return result


def _check_in_shard_map(backend: str) -> None:
    """Does nothing if a GPU kernel works inside of `jax.shard_map` with `check_vma`."""
    if backend == "triton":
        problem = "jax-triton does not work"
    elif not compiles_for_gpus():
        problem = "Without a GPU the kernel is interpreted, which JAX cannot do"
    else:
        return
    raise BackendError(
        f"{problem} inside of jax.shard_map with check_vma: pass check_vma=False, or choose "
        "another backend."
    )


def _pallas_attention(*arrays: Any, scale: float) -> Any:
    from bsjax.pallas.prefill import prefill_attention

    # Chosen by the platform being compiled for, which this machine may not have.
    return jax.lax.platform_dependent(
        *arrays,
        cpu=partial(prefill_attention, scale=scale, return_lse=True, interpret=True),
        default=partial(prefill_attention, scale=scale, return_lse=True),
    )


def _triton_attention(*arrays: Any, scale: float) -> Any:
    from bsjax.triton.prefill import prefill_attention

    return prefill_attention(*arrays, scale=scale)


@partial(jax.custom_vjp, nondiff_argnums=(0, 7))
def _kernel_attention(
    kernel: Callable[..., Any],
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Array,
    scale: float,
) -> Any:
    return kernel(q, k, v, schedule, head_category, layer, scale=scale)


def _kernel_forward(
    kernel: Callable[..., Any],
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
    layer: Array,
    scale: float,
) -> tuple[tuple[Array, Array], Residuals]:
    if schedule.parts is not None:
        raise MaskError("A schedule whose tiles are split has no gradient.")
    q, k, v = first_order_only((q, k, v))
    out, lse = kernel(q, k, v, schedule, head_category, layer, scale=scale)
    return (out, lse), (q, k, v, schedule, head_category, layer, out, lse)


def _kernel_gradients(
    kernel: Callable[..., Any], scale: float, residuals: Residuals, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None, None]:
    schedule = residuals[3]
    of_gpu = kernel is _triton_attention or (compiles_for_gpus() and triton_problem() is None)
    # Like its forward kernel, those of jax-triton do not work with `check_vma`.
    if schedule.transposed is None or not of_gpu or varying_axes(residuals):
        return attention_gradients(scale, residuals, gradients)
    from bsjax.triton.backward import attention_gradients as kernel_gradients

    residuals, gradients = first_order_only((residuals, gradients))
    return *kernel_gradients(*residuals, *gradients, scale=scale), None, None, None


_kernel_attention.defvjp(_kernel_forward, _kernel_gradients)


def _check(
    q: Array,
    k: Array,
    v: Array,
    layer: Any,
    schedule: Schedule,
    head_category: Array | np.ndarray,
) -> None:
    """Rejects arrays that do not match each other or the schedule, before anything is indexed.

    Raises:
      MaskError: names the shapes or dtypes given and those expected.
    """
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    axes, names = (3, "keys") if layer is None else (4, "layers, keys")
    if q.ndim != 3 or k.ndim != axes or k.shape != v.shape or q.shape[-1] != k.shape[-1]:
        raise MaskError(
            f"Attention needs q [queries, q_heads, head_dim] and "
            f"k, v [{names}, kv_heads, head_dim], got {shapes}."
        )
    keys, kv_heads = k.shape[-3:-1]
    if 0 in (*q.shape[1:], kv_heads):
        raise MaskError(f"Attention needs at least one head of one element, got {shapes}.")
    if q.shape[1] % kv_heads:
        raise MaskError(f"The query heads must be a multiple of the key-value heads, got {shapes}.")
    if (q.shape[0], keys) != (schedule.query_rows, schedule.key_rows):
        raise MaskError(
            f"The mask is for {schedule.query_rows} queries and {schedule.key_rows} keys, but got "
            f"{shapes}."
        )
    if head_category.shape != (q.shape[1],):
        raise MaskError(f"The mask is for {head_category.shape[0]} query heads, but got {shapes}.")
    if schedule.stacked_heads not in (0, q.shape[1] // kv_heads):
        raise MaskError(
            f"The schedule stacks {schedule.stacked_heads} query heads for each key head, but got "
            f"{shapes}."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise MaskError(
            "q, k and v must have one dtype, float32, bfloat16 or float16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}."
        )
