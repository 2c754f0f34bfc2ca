"""The expected attention output in float32, for a sample of query rows and all keys.

The score matrix of 300K tokens does not fit into memory, but 64 of its rows do. They are computed
with the predicate and a plain softmax, without schedules, tiles or kernels.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.masks.template import Template
from bsjax.masks.visibility import PADDING_POSITION, TokenInfo, Visibility, visible

TOLERANCE_IN_EPSILONS = {"bfloat16": 1, "float16": 1, "float32": 256}
"""The largest allowed error of a row of one head, ||out - wanted|| / ||wanted||, in units of the
dtype's epsilon. In half precision, the output and the weights are rounded once each, by at most
half an epsilon per element. A float32 sum over n keys that cancel has an error of the order of
sqrt(n) epsilons: 256 covers 64K keys."""

LSE_TOLERANCE = 128 * float(jnp.finfo(jnp.float32).eps)
"""The largest allowed error of a log-sum-exp, relative to max(1, |wanted|): float32 holds the
products exactly, but they are summed over the head dimension in another order."""


def tolerance(dtype: jax.typing.DTypeLike) -> float:
    """The largest relative error of a row that counts as correct."""
    dtype = jnp.dtype(dtype)
    return TOLERANCE_IN_EPSILONS[dtype.name] * float(jnp.finfo(dtype).eps)


@partial(jax.jit, static_argnames=("visibility", "scale"))
def dense_rows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query: TokenInfo,
    key: TokenInfo,
    groups: jax.Array,
    visibility: Visibility,
    *,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    """Dense softmax attention of some query rows over all keys, in float32.

    Args:
      q: [rows, q_heads, head_dim], any dtype.
      k: [tokens, kv_heads, head_dim].
      v: as `k`.
      query: what the predicate needs to know about the query rows, [rows] each.
      key: what it needs to know about the keys, [tokens] each.
      groups: int32 [q_heads], the key groups that each head keeps.
      visibility: the model's own visibility.
      scale: factor of the scores.

    Returns:
      The output, float32 [rows, q_heads, head_dim], and the log-sum-exp, float32 [rows, q_heads].
      For rows that see nothing and for padding rows they are 0 and -inf.
    """
    rows, q_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    group = q_heads // kv_heads
    query = TokenInfo(*(jnp.asarray(part)[:, None, None] for part in query))
    key = TokenInfo(*(jnp.asarray(part)[None, None, :] for part in key))
    exact = partial(
        jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )

    def one_key_head(arguments: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        q, k, v, groups = arguments
        seen = visible(query, key, groups[None, :, None], visibility)
        seen = seen & (query.position != PADDING_POSITION)
        scores = exact("rgd,kd->rgk", q.astype(jnp.float32), k.astype(jnp.float32)) * scale
        lse = jax.nn.logsumexp(scores, axis=-1, where=seen)
        finite = jnp.where(jnp.isneginf(lse), 0.0, lse)
        weights = jnp.where(seen, jnp.exp(scores - finite[..., None]), 0.0)
        return exact("rgk,kd->rgd", weights, v.astype(jnp.float32)), lse

    # One key head at a time: its scores are the largest array.
    out, lse = jax.lax.map(
        one_key_head,
        (
            q.reshape(rows, kv_heads, group, head_dim).swapaxes(0, 1),
            k.swapaxes(0, 1),
            v.swapaxes(0, 1),
            jnp.asarray(groups).reshape(kv_heads, group),
        ),
    )
    out = out.transpose(1, 0, 2, 3).reshape(rows, q_heads, head_dim)
    return out, lse.transpose(1, 0, 2).reshape(rows, q_heads)


def sampled_positions(template: Template, rows: int, seed: int = 0) -> np.ndarray:
    """Prompt positions to compare: of text, sinks and other image tokens, early and late.

    Returns all positions if the prompt has at most `rows` tokens.
    """
    if template.tokens <= rows:
        return np.arange(template.tokens)
    kinds = [
        np.flatnonzero(template.image < 0),
        np.flatnonzero(template.sink),
        np.flatnonzero((template.image >= 0) & ~template.sink),
    ]
    kinds = [kind for kind in kinds if kind.size]
    generator = np.random.default_rng(seed)
    chosen = [
        np.concatenate([kind[[0, -1]], generator.choice(kind, min(kind.size, rows // len(kinds)))])
        for kind in kinds
    ]
    # The first and the last of each kind are included: tiles and ranges begin and end there.
    return np.unique(np.concatenate(chosen))


def greatest_error(out: np.ndarray, wanted: np.ndarray) -> float:
    """The greatest ||out - wanted|| / ||wanted|| over all rows and heads.

    It is infinite if any value is not finite, or not zero where zeros are expected.
    """
    out, wanted = np.asarray(out, np.float64), np.asarray(wanted, np.float64)
    if out.shape != wanted.shape or not np.isfinite(out).all():
        return float("inf")
    difference = np.linalg.norm(out - wanted, axis=-1)
    norm = np.linalg.norm(wanted, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(difference == 0, 0.0, difference / norm)
    return float(relative.max(initial=0.0))


def greatest_lse_error(lse: np.ndarray, wanted: np.ndarray) -> float:
    """The greatest |lse - wanted| / max(1, |wanted|); infinite where only one side is -inf."""
    lse, wanted = np.asarray(lse, np.float64), np.asarray(wanted, np.float64)
    empty = np.isneginf(wanted)
    if lse.shape != wanted.shape or not np.array_equal(np.isneginf(lse), empty):
        return float("inf")
    lse, wanted = lse[~empty], wanted[~empty]
    if not np.isfinite(lse).all():
        return float("inf")
    return float((np.abs(lse - wanted) / np.maximum(1, np.abs(wanted))).max(initial=0.0))
