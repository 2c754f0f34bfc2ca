"""What tests of the prefill kernels share: inputs, and the result that they must have."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import HeadCategory, Image, Sinks, Template, Text
from bsjax.masks.schedule import Schedule, build_schedule, category_tables
from bsjax.masks.visibility import TokenInfo, Visibility, visible
from tests.support.templates import categories, templates

RAGGED = Template.from_segments(
    [Text(11), Image(45), Text(3), Image(1), Image(20), Text(7), Image(33), Text(1)],
    Sinks(first=1, offsets=(4,)),
)
SHORT = Template.from_segments(
    [Text(7), Image(45), Text(2), Image(1), Image(20), Text(5)], Sinks(first=1, offsets=(4,))
)
EVERY_CATEGORY = list(HeadCategory)


def on_random_templates(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on templates, head categories, visibilities and seeds of random numbers."""

    def decorated(test: Callable[..., None]) -> Callable[..., None]:
        cases = given(
            template=templates,
            head_category=categories,
            visibility=st.builds(Visibility, st.booleans(), st.sampled_from([None, 1, 17])),
            seed=st.integers(0, 99),
        )
        return settings(max_examples=examples)(cases(test))

    return decorated


def random_arrays(tokens, q_heads, kv_heads, head_dim, dtype, seed=0):
    """Queries, keys and values."""
    generator = np.random.default_rng(seed)
    return [
        jnp.asarray(generator.normal(size=(tokens, heads, head_dim)), dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    ]


def dense_softmax(q, k, v, schedule, head_category, scale, real_tokens):
    """float64 NumPy with the whole score matrix, rows in the schedule's order."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    query = TokenInfo(*(np.asarray(field)[:, None] for field in schedule.queries))
    key = TokenInfo(*(np.asarray(field)[None, :] for field in schedule.queries))
    real = np.arange(schedule.query_rows) < real_tokens
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for head, category in enumerate(head_category):
        seen = visible(query, key, int(schedule.groups[category]), schedule.visibility)
        seen = seen & real[:, None] & real[None, :]
        kv_head = head // (q.shape[1] // k.shape[1])
        scores = np.where(seen, q[:, head] @ k[:, kv_head].T * scale, -np.inf)
        some = seen.any(axis=1)
        lse[some, head] = np.logaddexp.reduce(scores[some], axis=1)
        out[some, head] = np.exp(scores[some] - lse[some, head, None]) @ v[:, kv_head]
    return out, lse


def check_prefill(
    attend: Callable[..., Any],
    schedule: Schedule,
    real_tokens: int,
    head_category,
    *,
    kv_heads: int = 1,
    head_dim: int = 64,
    dtype="float32",
    tolerance: float = 3e-6,
    seed: int = 0,
    **options: Any,
) -> None:
    """Compares `attend`, a kernel's function, with the dense softmax."""
    q, k, v = random_arrays(
        schedule.query_rows, len(head_category), kv_heads, head_dim, dtype, seed
    )
    scale = head_dim**-0.5
    out, lse = attend(
        q,
        k,
        v,
        schedule,
        jnp.asarray(head_category, jnp.int32),
        scale=scale,
        **options,
    )
    wanted_out, wanted_lse = dense_softmax(q, k, v, schedule, head_category, scale, real_tokens)
    assert out.dtype == q.dtype and lse.dtype == jnp.float32
    # In every dtype the scores are exact products summed in float32: so is their log-sum-exp.
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-6, rtol=3e-6)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted_out, atol=tolerance, rtol=tolerance
    )


def mixed_schedule(template=RAGGED, block_q=32, block_kv=16, **options):
    """A schedule with tables of all categories."""
    return build_schedule(
        template, category_tables(EVERY_CATEGORY), block_q=block_q, block_kv=block_kv, **options
    )
