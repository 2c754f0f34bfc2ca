"""What the attention benchmarks compute: shapes of published models, templates, masks, head mixes.

A mix is named after the share of the dense attention FLOPs (visible pairs) that it cuts. The number
of sparse heads follows from the pairs that each category sees in the template at hand. Results
state what this whole number of heads actually cuts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import FLOPS_PER_PAIR
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.template import Image, Template, Text
from bsjax.masks.visibility import CAUSAL, Visibility

TEXT_TOKENS = {256: 10}
"""Text tokens before each image, by the image's number of tokens, as in chat templates."""

OTHER_TEXT_TOKENS = 8
"""Text tokens before each image of any other number of tokens."""

LAST_TEXT_TOKENS = 8
"""Text tokens of the question at the end."""

SPARSE_CATEGORIES = (
    HeadCategory.INTRA_IMAGE_SINK,
    HeadCategory.INTRA_IMAGE,
    HeadCategory.SINK,
)

MIXES = {
    "cut 32 %": 0.32,
    "cut 36 %": 0.36,
    "cut 41 %": 0.41,
    "ideal 1.8x": 1 - 1 / 1.8,
    "ideal 3.2x": 1 - 1 / 3.2,
}
"""Share of the dense attention FLOPs that each mix cuts. The first three are the paper's; the
others are named by their ideal speed-up."""

MASK_NAMES = (*(category.name for category in HeadCategory), *MIXES)
"""All masks, by the name that options take."""


@dataclass(frozen=True)
class AttentionShape:
    """The attention of one layer of a model."""

    name: str
    q_heads: int
    kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    visibility: Visibility = CAUSAL
    image_tokens: tuple[int, ...] = (400, 256, 1000, 1800)
    """Tokens per image in the templates that the shape is measured with."""


_GEMMA3_GLOBAL = Visibility(bidirectional_images=True)
_GEMMA3_LOCAL = Visibility(bidirectional_images=True, window=1024)

SHAPES = {
    shape.name: shape
    for shape in (
        AttentionShape("qwen2.5-vl-7b", 28, 4, 128),
        # Every image of Gemma 3 has 256 tokens.
        AttentionShape(
            "gemma-3-4b-global", 8, 4, 256, visibility=_GEMMA3_GLOBAL, image_tokens=(256,)
        ),
        AttentionShape(
            "gemma-3-4b-local",
            8,
            4,
            256,
            visibility=_GEMMA3_LOCAL,
            image_tokens=(256,),
        ),
        AttentionShape(
            "gemma-3-27b-global", 32, 16, 128, visibility=_GEMMA3_GLOBAL, image_tokens=(256,)
        ),
        AttentionShape(
            "gemma-3-27b-local",
            32,
            16,
            128,
            visibility=_GEMMA3_LOCAL,
            image_tokens=(256,),
        ),
        # For CPUs: the same kinds of masks at sizes that take seconds.
        AttentionShape("small", 8, 2, 64, "float32", image_tokens=(400, 100)),
        AttentionShape(
            "small-window",
            4,
            2,
            64,
            "float32",
            visibility=Visibility(bidirectional_images=True, window=512),
            image_tokens=(256,),
        ),
    )
}


@dataclass(frozen=True)
class HeadMask:
    """A category for every query head."""

    name: str
    categories: tuple[HeadCategory, ...]

    @property
    def is_dense(self) -> bool:
        return set(self.categories) == {HeadCategory.DENSE}

    @property
    def description(self) -> str:
        """The number of heads of each category."""
        return " + ".join(
            f"{self.categories.count(category)} {category.name}"
            for category in sorted(set(self.categories))
        )


@dataclass(frozen=True)
class Workload:
    """One shape on one prompt."""

    shape: AttentionShape
    tokens: int
    image_tokens: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}, {self.tokens} tokens, images of {self.image_tokens}"

    @cached_property
    def template(self) -> Template:
        return prompt_template(self.tokens, self.image_tokens)

    @cached_property
    def pairs(self) -> dict[HeadCategory, int]:
        """The visible pairs of one head, for each category."""
        return {
            category: visible_pairs(self.template, category.groups, self.shape.visibility)
            for category in HeadCategory
        }

    def visible_pairs(self, mask: HeadMask) -> int:
        """The visible pairs of all heads."""
        return sum(self.pairs[category] for category in mask.categories)

    def flops(self, pairs: int) -> int:
        """Attention FLOPs of visible pairs."""
        return FLOPS_PER_PAIR * self.shape.head_dim * pairs

    @property
    def dense_flops(self) -> int:
        return self.flops(self.shape.q_heads * self.pairs[HeadCategory.DENSE])

    def masks(self, names: Sequence[str] = MASK_NAMES) -> list[HeadMask]:
        """The masks with these names. Mixes with the same heads become one mask with both names."""
        heads = self.shape.q_heads
        by_categories: dict[tuple[HeadCategory, ...], str] = {}
        for name in names:
            if name in MIXES:
                categories = head_mix(self.pairs, heads, MIXES[name])
            else:
                categories = (HeadCategory[name],) * heads
            known = by_categories.get(categories)
            by_categories[categories] = name if known is None else f"{known} = {name}"
        return [HeadMask(name, categories) for categories, name in by_categories.items()]


def prompt_template(tokens: int, image_tokens: int) -> Template:
    """Text and images in turn, with exactly `tokens` tokens; the last image takes what remains.

    So templates with the same number of tokens have the same shapes, share programs, and have equal
    dense times.
    """
    text = TEXT_TOKENS.get(image_tokens, OTHER_TEXT_TOKENS)
    images, left = divmod(tokens - LAST_TEXT_TOKENS, text + image_tokens)
    segments = [Text(text), Image(image_tokens)] * images
    if left > text:
        segments += [Text(text), Image(left - text)]
        left = 0
    return Template.from_segments([*segments, Text(LAST_TEXT_TOKENS + left)])


def head_mix(pairs: Mapping[HeadCategory, int], heads: int, cut: float) -> tuple[HeadCategory, ...]:
    """Categories for `heads` heads that cut as close to `cut` of the dense FLOPs as possible.

    The sparse heads take the three sparse categories in turn. Their places are drawn with a fixed
    seed, because sparse heads of real models are spread over all heads, too.
    """

    def share_cut(categories: Sequence[HeadCategory]) -> float:
        seen = sum(pairs[category] for category in categories)
        return 1 - seen / (heads * pairs[HeadCategory.DENSE])

    candidates = [
        [SPARSE_CATEGORIES[head % len(SPARSE_CATEGORIES)] for head in range(sparse)]
        + [HeadCategory.DENSE] * (heads - sparse)
        for sparse in range(heads + 1)
    ]
    nearest = min(candidates, key=lambda categories: abs(share_cut(categories) - cut))
    order = np.random.default_rng(0).permutation(heads)
    return tuple(nearest[index] for index in order)
