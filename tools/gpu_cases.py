"""The cases that `tools.gpu_check` runs: what the GPU kernels must get right on a device.

Every case computes attention with the `pallas` backend and compares it with the dense softmax of
`benchmarks.dense_rows`, in float32 on the same device, row by row and head by head.
`benchmarks.dense_rows` states the tolerances, in epsilons of the dtype.

`covering_cases` is a smallest set in which every pair of head dimension and dtype occurs, and
between them everything else that a kernel is specialised for or that could break it (`LEVELS`).
Random templates are tested at one padded shape, so that they share one compiled program.
"""

from collections.abc import Callable, Sequence
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
from bsjax.masks.template import Image, Sinks, Template, Text
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility

_CATEGORIES = tuple(HeadCategory)
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
class Case:
    """Something to check on a device. `run` compiles it, runs it and compares the results."""

    name: str
    run: Callable[[], list[Comparison]]
    small: bool = False
    """Whether it takes only seconds in interpret mode on a CPU."""


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
    categories: tuple[HeadCategory, ...] = _CATEGORIES
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
            *([] if self.categories == _CATEGORIES else [self.categories[0].name]),
            *([] if self.blocks is None else [f"blocks {self.blocks}"]),
            *([f"seed {self.seed}"] if self.seed else []),
        ]
        return ", ".join(parts)

    def run(self) -> list[Comparison]:
        """Compares all rows of a short prompt, and some text, sink and image rows of a long one."""
        fuzzed = self.template == FUZZED
        template = random_template(self.seed) if fuzzed else TEMPLATES[self.template]
        q_heads = self.group * self.kv_heads
        categories = [self.categories[head % len(self.categories)] for head in range(q_heads)]
        blocks = self.blocks or block_sizes(
            "pallas", self.head_dim, self.dtype, sparse=set(categories) != {HeadCategory.DENSE}
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

    def run(self) -> list[Comparison]:
        """Compares all rows, or a sample if there are many."""
        heads = 4
        blocks = block_sizes("pallas", self.head_dim, self.dtype, sparse=True)
        schedule = segment_schedule(
            self.lengths, block_q=blocks[0], block_kv=blocks[1], tokens=sum(self.lengths) + 19
        )
        rows = np.arange(schedule.query_rows)
        if rows.size > _MOST_ROWS:
            rows = np.sort(np.random.default_rng(0).choice(rows, _MOST_ROWS, replace=False))
        return compare(
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

    def run(self) -> list[Comparison]:
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
            q, k, v, np.int32(layer), np.asarray(self.lengths, np.int32), *own, scale=scale
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
    result = attend(q, k, v, schedule, head_category, scale=scale, return_lse=return_lse)
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


def _attention(*arguments: Any, scale: float, return_lse: bool) -> Any:
    return ragged_attention(*arguments, scale=scale, backend="pallas", return_lse=return_lse)


def _decode_attention(*arguments: Any, scale: float) -> Any:
    return decode_attention(*arguments, scale=scale, backend="pallas", return_lse=True)


_decode = jax.jit(_decode_attention, static_argnames="scale")
attend = jax.jit(_attention, static_argnames=("scale", "return_lse"))


VISIBILITIES = {
    "causal": CAUSAL,
    "bidirectional images": Visibility(bidirectional_images=True),
    "window": Visibility(window=100),
    "bidirectional images in a window": Visibility(bidirectional_images=True, window=33),
}
TEMPLATES = {
    "ragged": Template.from_segments(
        [Text(11), Image(245), Text(3), Image(1), Image(120), Text(7), Image(133), Text(1)],
        Sinks(first=1, offsets=(4, 70)),
    ),
    "images of one token": Template.from_segments([Text(2), Image(1), Image(1), Text(1)] * 60),
    "no text": Template.from_segments([Image(300), Image(77), Image(300)]),
    "no image": Template.from_segments([Text(517)]),
    "200 images": Template.from_segments([Text(3), Image(17)] * 200 + [Text(5)]),
    "fewer tokens than a block": Template.from_segments([Text(2), Image(3)]),
    "8K tokens": Template.from_segments([Text(8), Image(400)] * 20 + [Text(32)]),
}
SMALL_TEMPLATE = "small"
TEMPLATES[SMALL_TEMPLATE] = Template.from_segments(
    [Text(9), Image(40), Text(3), Image(1), Image(25), Text(2)], Sinks(offsets=(3,))
)
FUZZED = "random"
FUZZED_TOKENS = 1024

HEAD_DIMS = (64, 72, 80, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
GROUPS = tuple(range(1, 9))
LEVELS: dict[str, tuple[Any, ...]] = {
    "group": GROUPS,
    "visibility": tuple(VISIBILITIES),
    "template": tuple(name for name in TEMPLATES if name not in (SMALL_TEMPLATE, "8K tokens")),
    "return_lse": (True, False),
}
"""The values that the covering cases must contain, in addition to all pairs of head dimension and
dtype."""


def covering_cases() -> list[PrefillCase]:
    """One case for each pair of head dimension and dtype; the other factors take turns.

    No smaller set contains all these pairs. The factors change at different rates, so that they do
    not always change together.
    """
    pairs = [(head_dim, dtype) for head_dim in HEAD_DIMS for dtype in DTYPES]
    visibilities, templates = LEVELS["visibility"], LEVELS["template"]
    return [
        PrefillCase(
            head_dim,
            dtype,
            group=GROUPS[index * 3 % len(GROUPS)],
            visibility=visibilities[index // 3 % len(visibilities)] if index else visibilities[0],
            template=templates[index % len(templates)],
            return_lse=index % 2 == 0,
        )
        for index, (head_dim, dtype) in enumerate(pairs)
    ]


def prefill_cases() -> list[PrefillCase]:
    """The covering cases and further ones, many of which share a compiled program."""
    qwen = {"head_dim": 128, "dtype": "bfloat16", "group": 7, "kv_heads": 4}
    gemma = {"head_dim": 256, "dtype": "bfloat16", "group": 2, "kv_heads": 4}
    return [
        *covering_cases(),
        # Long rows, many full blocks, each category alone; all schedules have the same shapes.
        PrefillCase(**qwen, template="8K tokens"),
        *(
            PrefillCase(**qwen, template="8K tokens", categories=(category,))
            for category in HeadCategory
        ),
        PrefillCase(**gemma, template="8K tokens", visibility="bidirectional images"),
        PrefillCase(**gemma, template="8K tokens", visibility="bidirectional images in a window"),
        PrefillCase(64, "float32", template="8K tokens"),
        PrefillCase(128, "bfloat16", template="fewer tokens than a block", padding=0),
        # Masks built with other blocks than the kernel's own.
        PrefillCase(128, "bfloat16", blocks=(16, 16)),
        PrefillCase(256, "bfloat16", blocks=(128, 64)),
        *(
            PrefillCase(128, "bfloat16", template=FUZZED, seed=seed, group=4)
            for seed in range(1, 25)
        ),
        *(
            PrefillCase(
                128,
                "bfloat16",
                template=FUZZED,
                seed=seed,
                group=4,
                visibility="bidirectional images in a window",
            )
            for seed in range(25, 41)
        ),
    ]


def segment_cases() -> list[SegmentCase]:
    """Qwen's tower (head dim 80), SigLIP (72), and Qwen2.5-VL's windows of at most 64 patches."""
    generator = np.random.default_rng(0)
    windows = tuple(generator.integers(1, 65, 200).tolist())
    return [
        SegmentCase((1,), 80, "bfloat16"),
        SegmentCase((1600, 1, 320, 77, 4, 900), 80, "bfloat16"),
        SegmentCase((1024, 1024, 1024), 72, "bfloat16"),
        SegmentCase(windows, 80, "bfloat16"),
        SegmentCase(windows, 80, "float32"),
    ]


def decode_cases() -> list[DecodeCase]:
    """Every head dimension and dtype; empty, full and unequal caches; a cache of 300K tokens."""
    return [
        *(
            DecodeCase(head_dim, dtype, (300, 1, 77), 512, group=GROUPS[index % len(GROUPS)])
            for index, (head_dim, dtype) in enumerate(
                (head_dim, dtype) for head_dim in HEAD_DIMS for dtype in DTYPES
            )
        ),
        DecodeCase(128, "bfloat16", (0, 512, 511, 64), 512, own=False),
        DecodeCase(128, "bfloat16", (0, 8192, 5000), 8192),
        DecodeCase(128, "bfloat16", (299_999,), 300_000),
    ]


def small_cases() -> list[Case]:
    """The same checks at sizes that take only seconds in interpret mode."""
    described: Sequence[PrefillCase | SegmentCase | DecodeCase] = [
        PrefillCase(64, "float32", template=SMALL_TEMPLATE, padding=5, blocks=(32, 16)),
        PrefillCase(
            72,
            "bfloat16",
            template=SMALL_TEMPLATE,
            visibility="bidirectional images in a window",
            group=1,
            blocks=(16, 16),
        ),
        SegmentCase((5, 1, 30), 80, "float16"),
        DecodeCase(64, "float32", (40, 0, 17), 48, group=3, kv_heads=1),
    ]
    return [Case(each.name, each.run, small=True) for each in described]


def all_cases() -> list[Case]:
    """Every case, in the order in which they run."""
    described: Sequence[PrefillCase | SegmentCase | DecodeCase] = [
        *prefill_cases(),
        *segment_cases(),
        *decode_cases(),
    ]
    return [*small_cases(), *(Case(each.name, each.run) for each in described)]


def random_template(seed: int) -> Template:
    """Text and images of random lengths, some of a single token."""
    generator = np.random.default_rng(seed)
    segments: list[Text | Image] = []
    left = FUZZED_TOKENS - int(generator.integers(0, 200))
    while left > 0:
        length = int(min(left, generator.choice([1, 2, 15, 16, 17, 63, 64, 65, 128, 200])))
        segments.append(Image(length) if generator.random() < 0.6 else Text(length))
        left -= length
    offsets = tuple(generator.integers(0, 60, generator.integers(0, 3)).tolist())
    return Template.from_segments(segments, Sinks(int(generator.integers(1, 4)), offsets))
