"""What the GPU kernels compute, compared with the dense softmax of `benchmarks.dense_rows`.

Attention is computed in float32 on the same device, and compared row by row and head by head.
`benchmarks.dense_rows` states the tolerances, in epsilons of the dtype. The kernel is "pallas" or
"triton".
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.dense_rows import (
    LSE_TOLERANCE,
    dense_rows,
    greatest_error,
    greatest_lse_error,
    sampled_positions,
    tolerance,
)
from bsjax.attention import block_sizes, decode_attention, ragged_attention
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import Schedule, build_schedule, category_tables, segment_schedule
from bsjax.masks.visibility import TokenInfo
from tools.gpu_templates import FUZZED, FUZZED_TOKENS, TEMPLATES, VISIBILITIES, random_template

CATEGORIES = tuple(HeadCategory)
# The most rows of a prompt that are compared.
_MOST_ROWS = 1024
# The value of padding rows of keys and values, large enough to show if it leaks into a sum.
_PADDING_VALUE = 1e4


@dataclass(frozen=True)
class Comparison:
    """The error of one quantity of a case, and its limit."""

    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within its limit. NaN is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class PrefillCase:
    """Prefill attention of random numbers over one template."""

    head_dim: int
    dtype: str
    group: int = 2
    """Query heads per key head."""
    visibility: str = "causal"
    template: str = "ragged"
    return_lse: bool = True
    kv_heads: int = 2
    categories: tuple[HeadCategory, ...] = CATEGORIES
    """The categories that the heads take in turn."""
    seed: int = 0
    padding: int = 37
    blocks: tuple[int, int] | None = None
    """(block_q, block_kv); None for those that the library would choose."""

    @property
    def name(self) -> str:
        """A description that distinguishes this case from others."""
        parts = [
            f"prefill {self.template}",
            f"head dim {self.head_dim}",
            self.dtype,
            f"{self.group} query heads a key head",
            self.visibility,
            *(["with lse"] if self.return_lse else []),
            *([] if self.categories == CATEGORIES else [self.categories[0].name]),
            *([] if self.blocks is None else [f"blocks {self.blocks}"]),
            *([f"seed {self.seed}"] if self.seed else []),
        ]
        return ", ".join(parts)

    def run(self, kernel: str) -> list[Comparison]:
        """Compares all rows of a short prompt, and some text, sink and image rows of a long one."""
        fuzzed = self.template == FUZZED
        template = random_template(self.seed) if fuzzed else TEMPLATES[self.template]
        q_heads = self.group * self.kv_heads
        categories = [self.categories[head % len(self.categories)] for head in range(q_heads)]
        blocks = self.blocks or block_sizes(
            kernel, self.head_dim, self.dtype, sparse=set(categories) != {HeadCategory.DENSE}
        )
        schedule = build_schedule(
            template,
            category_tables(self.categories),
            block_q=blocks[0],
            block_kv=blocks[1],
            visibility=VISIBILITIES[self.visibility],
            tokens=FUZZED_TOKENS if fuzzed else template.tokens + self.padding,
        )
        rows = np.arange(schedule.query_rows)
        if schedule.query_rows > _MOST_ROWS:
            positions = sampled_positions(template, _MOST_ROWS, self.seed)
            rows = np.argsort(schedule.queries.position, kind="stable")[positions]
        return compare(
            kernel,
            schedule,
            np.asarray(categories, np.int32),
            rows=rows,
            real_tokens=template.tokens,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            return_lse=self.return_lse,
            seed=self.seed,
        )


@dataclass(frozen=True)
class SegmentCase:
    """A vision tower's attention: segments of different lengths, each of which sees only itself."""

    lengths: tuple[int, ...]
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """A description that distinguishes this case from others."""
        shown = "+".join(map(str, self.lengths[:4])) + ("+..." if len(self.lengths) > 4 else "")
        return f"segments {shown} ({len(self.lengths)}), head dim {self.head_dim}, {self.dtype}"

    def run(self, kernel: str) -> list[Comparison]:
        """Compares all rows, or a sample if there are many."""
        heads = 4
        blocks = block_sizes(kernel, self.head_dim, self.dtype, sparse=True)
        schedule = segment_schedule(
            self.lengths, block_q=blocks[0], block_kv=blocks[1], tokens=sum(self.lengths) + 19
        )
        rows = np.arange(schedule.query_rows)
        if rows.size > _MOST_ROWS:
            rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_ROWS, replace=False))
        return compare(
            kernel,
            schedule,
            np.full(heads, HeadCategory.INTRA_IMAGE, np.int32),
            rows=rows,
            real_tokens=sum(self.lengths),
            kv_heads=heads,
            head_dim=self.head_dim,
            dtype=self.dtype,
            return_lse=False,
            seed=0,
        )


@dataclass(frozen=True)
class DecodeCase:
    """One token per sequence against a cache, for sequences of different lengths."""

    head_dim: int
    dtype: str
    lengths: tuple[int, ...]
    rows: int
    group: int = 7
    kv_heads: int = 2
    own: bool = True
    """Whether the tokens' own keys and values are passed separately from the cache."""

    @property
    def name(self) -> str:
        """A description that distinguishes this case from others."""
        return (
            f"decode {'+'.join(map(str, self.lengths))} of {self.rows} rows, head dim "
            f"{self.head_dim}, {self.dtype}, {self.group} query heads a key head"
            f"{', own key apart from the cache' if self.own else ''}"
        )

    def run(self, kernel: str) -> list[Comparison]:
        """Compares every sequence and head; cache rows beyond a sequence's length are NaN."""
        layers, layer, batch = 3, 1, len(self.lengths)
        q_heads = self.group * self.kv_heads
        scale = self.head_dim**-0.5
        generator = np.random.default_rng(0)

        def random(*shape: int) -> np.ndarray:
            return generator.standard_normal(shape, np.float32).astype(jnp.dtype(self.dtype))

        q = random(batch, q_heads, self.head_dim)
        k, v = (random(layers, batch, self.rows, self.kv_heads, self.head_dim) for _ in range(2))
        for sequence, length in enumerate(self.lengths):
            k[:, sequence, length:] = v[:, sequence, length:] = np.nan
        own = [random(batch, self.kv_heads, self.head_dim) if self.own else None for _ in range(2)]
        out, lse = _decode(
            q,
            k,
            v,
            np.int32(layer),
            np.asarray(self.lengths, np.int32),
            *own,
            scale=scale,
            backend=kernel,
        )
        wanted, wanted_lse = [], []
        for sequence, length in enumerate(self.lengths):
            keys, values = (
                np.concatenate(
                    [
                        cache[layer, sequence, :length],
                        *([own_rows[sequence][None]] if self.own else []),
                    ]
                ).astype(np.float32)
                for cache, own_rows in zip((k, v), own, strict=True)
            )
            keys, values = (np.repeat(part, self.group, axis=1) for part in (keys, values))
            scores = scale * np.einsum("hd,khd->hk", q[sequence].astype(np.float32), keys)
            greatest = scores.max(axis=1, keepdims=True, initial=np.finfo(np.float32).min)
            weights = np.exp(scores - greatest)
            total = weights.sum(axis=1, keepdims=True)
            some = np.where(total > 0, total, 1)
            wanted.append(np.einsum("hk,khd->hd", weights / some, values))
            wanted_lse.append(np.where(total > 0, greatest + np.log(some), -np.inf)[:, 0])
        error = greatest_error(np.asarray(out, np.float32), np.stack(wanted))
        lse_error = greatest_lse_error(np.asarray(lse), np.stack(wanted_lse))
        return [
            Comparison("output", error, tolerance(self.dtype)),
            Comparison("log-sum-exp", lse_error, LSE_TOLERANCE),
        ]


def compare(
    kernel: str,
    schedule: Schedule,
    head_category: np.ndarray,
    *,
    rows: np.ndarray,
    real_tokens: int,
    kv_heads: int,
    head_dim: int,
    dtype: str,
    return_lse: bool,
    seed: int,
) -> list[Comparison]:
    """Runs the kernel on random inputs and compares `rows`; padding rows must be zeros."""
    scale = head_dim**-0.5
    # Inputs are made and results compared on the host, so that the device compiles only the kernel
    # and its reference.
    generator = np.random.default_rng(seed)
    q, k, v = (
        generator.standard_normal((schedule.query_rows, heads, head_dim), np.float32).astype(
            jnp.dtype(dtype)
        )
        for heads in (head_category.size, kv_heads, kv_heads)
    )
    k[real_tokens:] = v[real_tokens:] = _PADDING_VALUE
    result = attend(
        q, k, v, schedule, head_category, scale=scale, backend=kernel, return_lse=return_lse
    )
    out, lse = map(np.asarray, result) if return_lse else (np.asarray(result), None)
    out = out.astype(np.float32)
    info = schedule.queries
    wanted, wanted_lse = dense_rows(
        q[rows],
        k,
        v,
        TokenInfo(*(part[rows] for part in info)),
        info,
        schedule.groups[head_category],
        schedule.visibility,
        scale=scale,
    )
    comparisons = [
        Comparison("output", greatest_error(out[rows], np.asarray(wanted)), tolerance(dtype)),
        Comparison("padding rows", float(np.abs(out[real_tokens:]).max(initial=0.0)), 0.0),
        Comparison("not finite", float((~np.isfinite(out)).sum()), 0.0),
    ]
    if lse is not None:
        error = greatest_lse_error(lse[rows], np.asarray(wanted_lse))
        comparisons.append(Comparison("log-sum-exp", error, LSE_TOLERANCE))
        seen = float(np.isfinite(lse[real_tokens:]).sum())
        comparisons.append(Comparison("padding rows that see keys", seen, 0.0))
    return comparisons


attend = jax.jit(ragged_attention, static_argnames=("scale", "backend", "return_lse"))


def _decode_attention(*arguments: Any, scale: float, backend: str) -> Any:
    return decode_attention(*arguments, scale=scale, backend=backend, return_lse=True)


_decode = jax.jit(_decode_attention, static_argnames=("scale", "backend"))
