"""The cases that `tools.gpu_check` runs: what the GPU kernels must get right on a device.

One list for both kernels, Pallas' and Triton's. `tools.gpu_comparisons` says what the cases of
prefill and decode are compared with, `tools.gpu_gradients` those of gradients.

`covering_cases` is a smallest set in which every pair of head dimension and dtype occurs, and
between them everything else that a kernel is specialised for or that could break it (`LEVELS`).
Random templates are tested at one padded shape, so that they share one compiled program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from bsjax.masks.categories import HeadCategory
from tools.gpu_comparisons import Comparison, DecodeCase, PrefillCase, SegmentCase
from tools.gpu_gradients import GradientCase
from tools.gpu_templates import FUZZED, LONG_TEMPLATES, SMALL_TEMPLATE, TEMPLATES, VISIBILITIES


@dataclass(frozen=True)
class Case:
    """Something to check on a device. `run` compiles it, runs it and compares the results."""

    name: str
    run: Callable[[], list[Comparison]]


HEAD_DIMS = (64, 72, 80, 128, 256)
DTYPES = ("bfloat16", "float16", "float32")
GROUPS = tuple(range(1, 9))
LEVELS: dict[str, tuple[Any, ...]] = {
    "group": GROUPS,
    "visibility": tuple(VISIBILITIES),
    "template": tuple(name for name in TEMPLATES if name not in (SMALL_TEMPLATE, *LONG_TEMPLATES)),
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


def gradient_cases() -> list[GradientCase]:
    """Every head dimension and dtype, every category, and tiles of keys that are split.

    Few: each has two kernels of its own, and two forward kernels.
    """
    return [
        GradientCase(64, "bfloat16", group=4),
        GradientCase(72, "float32", group=1, visibility="bidirectional images"),
        GradientCase(80, "float16", group=3, visibility="window"),
        GradientCase(128, "bfloat16", group=7),
        GradientCase(128, "float16", visibility="bidirectional images in a window"),
        GradientCase(256, "bfloat16", visibility="bidirectional images"),
        GradientCase(256, "float32", group=1, visibility="window"),
        # More than 128 blocks of rows see the text, and few see each image.
        GradientCase(
            64, "bfloat16", template="9K tokens", kv_heads=1, categories=(HeadCategory.SINK,)
        ),
    ]


def small_cases(kernels: Sequence[str], gradients_of: Sequence[str]) -> list[Case]:
    """The same checks at sizes that take only seconds in interpret mode; see `all_cases`."""
    described = [
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
    gradients = [
        GradientCase(16, "bfloat16", template=SMALL_TEMPLATE, kv_heads=1, visibility="window")
    ]
    return _of_kernels(described, kernels) + _of_kernels(gradients, gradients_of)


def all_cases(kernels: Sequence[str], gradients_of: Sequence[str]) -> list[Case]:
    """Every case, in the order in which they run.

    Args:
      kernels: those whose outputs are checked, of "pallas" and "triton".
      gradients_of: those that compute what is differentiated, by Triton's kernels for gradients.
    """
    described = [*prefill_cases(), *segment_cases(), *decode_cases()]
    return [
        *small_cases(kernels, gradients_of),
        *_of_kernels(described, kernels),
        *_of_kernels(gradient_cases(), gradients_of),
    ]


class _Described(Protocol):
    """A case that any kernel can run."""

    @property
    def name(self) -> str: ...

    def run(self, kernel: str) -> list[Comparison]: ...


def _of_kernels(described: Sequence[_Described], kernels: Sequence[str]) -> list[Case]:
    return [
        Case(f"{kernel}: {each.name}", partial(each.run, kernel))
        for kernel in kernels
        for each in described
    ]
