"""Which backend runs, in which block sizes; and the attention that models call."""

from functools import partial
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from bsjax.attention.reference import reference_attention
from bsjax.attention.xla import attention_gradients, xla_attention
from bsjax.errors import BackendError, MaskError
from bsjax.masks.schedule import Schedule
from bsjax.pallas import configurations
from bsjax.pallas.prefill import prefill_attention

BACKENDS = ("auto", "pallas", "xla", "reference")

# Measured on two CPU cores at 8K tokens, head dim 128, float32: large blocks are a quarter faster
# where everything is visible, small ones visit fewer invisible pairs where little is.
_XLA_DENSE_BLOCKS = (256, 512)
_XLA_SPARSE_BLOCKS = (128, 64)


def resolve_backend(backend: str) -> str:
    """The backend that `backend` names: `auto` is pallas on an NVIDIA GPU it supports, else xla.

    Raises:
      BackendError: the name is unknown.
    """
    if backend not in BACKENDS:
        raise BackendError(
            f"Unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}."
        )
    if backend != "auto":
        return backend
    return "pallas" if _has_supported_gpu() else "xla"


def _has_supported_gpu() -> bool:
    """Whether programs run on an NVIDIA GPU of the Ampere generation or later."""
    if jax.default_backend() != "gpu":
        return False
    try:
        configurations.target_in_use()
    except BackendError:
        return False
    return True


def block_sizes(
    backend: str, head_dim: int, dtype: jax.typing.DTypeLike, *, sparse: bool
) -> tuple[int, int]:
    """The (block_q, block_kv) that schedules for a backend are built with."""
    if resolve_backend(backend) == "pallas":
        return configurations.default_blocks(head_dim, dtype, sparse=sparse)
    return _XLA_SPARSE_BLOCKS if sparse else _XLA_DENSE_BLOCKS


@overload
def ragged_attention(
    q: Array,
    k: Array,
    v: Array,
    schedule: Schedule,
    head_category: Array,
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
    *,
    scale: float,
    backend: str = "auto",
    return_lse: bool,
) -> Array | tuple[Array, Array]: ...


def ragged_attention(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    schedule: Schedule,
    head_category: Int[Array, "q_heads"],
    *,
    scale: float,
    backend: str = "auto",
    return_lse: bool = False,
) -> Array | tuple[Array, Array]:
    """Attention over a schedule, rows in its order: what language models and towers call.

    Args:
      q: queries, bfloat16, float16 or float32; query head h reads key-value head
        h // (q_heads // kv_heads).
      k: keys, of q's dtype; all finite.
      v: values, of q's dtype; all finite, padding rows and those that no query sees too.
      schedule: what to visit; `schedule.tokens` rows, padding included.
      head_category: int32, the table of the schedule that each query head uses; may be traced.
      scale: factor of the scores, above 0.
      backend: one of `BACKENDS`. On a CPU, `pallas` interprets the kernel: exact, and very slow.
      return_lse: also return the log-sum-exp.

    Returns:
      The output [tokens, q_heads, head_dim] in q's dtype; with `return_lse` also the float32
      log-sum-exp [tokens, q_heads] of the scaled scores. Rows that see nothing, padding rows among
      them, are zeros and -inf.

    Raises:
      BackendError: unknown backend, or one that cannot do these shapes.
      MaskError: shapes do not fit each other or the schedule.
    """
    check_shapes(q, k, v, schedule, head_category)
    if not scale > 0:
        raise MaskError(f"The scale of attention scores must be above 0, got {scale}.")
    head_category = jnp.asarray(head_category)
    result: Any
    match resolve_backend(backend):
        case "pallas":
            result = _pallas_attention(
                q, k, v, jax.tree.map(jnp.asarray, schedule), head_category, scale
            )
        case "xla":
            result = xla_attention(q, k, v, schedule, head_category, scale)
        case _:
            result = reference_attention(q, k, v, schedule, head_category, scale)
    return result if return_lse else result[0]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _pallas_attention(
    q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array, scale: float
) -> Any:
    # Chosen by the platform compiled for, which need not be one this machine has.
    return jax.lax.platform_dependent(
        q,
        k,
        v,
        schedule,
        head_category,
        cpu=partial(prefill_attention, scale=scale, return_lse=True, interpret=True),
        default=partial(prefill_attention, scale=scale, return_lse=True),
    )


def _pallas_forward(
    q: Array, k: Array, v: Array, schedule: Schedule, head_category: Array, scale: float
) -> Any:
    result: Any = _pallas_attention(q, k, v, schedule, head_category, scale)
    return result, (q, k, v, schedule, head_category, *result)


_pallas_attention.defvjp(_pallas_forward, attention_gradients)


def check_shapes(q: Array, k: Array, v: Array, schedule: Schedule, head_category: Any) -> None:
    """Refuses arrays that do not fit each other or the schedule, before anything is indexed.

    Raises:
      MaskError: says which shapes or dtypes were given and what is wanted.
    """
    shapes = f"q {q.shape}, k {k.shape}, v {v.shape}"
    if q.ndim == k.ndim == 3 and 0 in (*q.shape[1:], *k.shape[1:]):
        raise MaskError(f"Attention needs at least one head of one element, got {shapes}.")
    if q.ndim != 3 or k.shape != v.shape or k.ndim != 3 or q.shape[::2] != k.shape[::2]:
        raise MaskError(
            f"Attention takes q [tokens, q_heads, head_dim] and "
            f"k, v [tokens, kv_heads, head_dim], got {shapes}."
        )
    if q.shape[1] % k.shape[1]:
        raise MaskError(f"The query heads must be a multiple of the key-value heads, got {shapes}.")
    if q.shape[0] != schedule.tokens:
        raise MaskError(f"The mask is for {schedule.tokens} tokens, but got {shapes}.")
    if head_category.shape != (q.shape[1],):
        raise MaskError(f"The mask is for {head_category.shape[0]} query heads, but got {shapes}.")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise MaskError(
            "q, k and v must share one dtype out of float32, bfloat16 and float16, got "
            f"{q.dtype}, {k.dtype} and {v.dtype}."
        )
