"""Attention FLOPs of prefill: of one head, of a whole language model, and of its kinds of layers.

Only visible (query, key) pairs count. Each costs four FLOPs for each channel of a head: a
multiplication and an addition in the scores, and again in the output. In the last layer only the
prompt's last token has a query, because nothing reads the outputs of the others. If it is a text
token, as chat templates have it, all categories cost the same there.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from bsjax.masks.categories import HeadCategory
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.rows import Span
from bsjax.masks.template import Template
from bsjax.masks.visibility import Visibility

FLOPS_PER_PAIR = 4
"""Attention FLOPs of a visible pair for each channel of a head."""


@dataclass(frozen=True)
class LayerFlops:
    """Attention FLOPs of prefill in all layers of one kind.

    Attributes:
      visibility: what these layers let any query see.
      layers: how many layers are of this kind.
      dense: FLOPs if all their heads were dense.
      sparse: FLOPs with the categories that their heads have.
    """

    visibility: Visibility
    layers: int
    dense: int
    sparse: int

    @property
    def name(self) -> str:
        """Which layers these are, for messages: "5 layers with a window of 1024"."""
        layers = "layer" if self.layers == 1 else "layers"
        if self.visibility.window is None:
            return f"{self.layers} global {layers}"
        return f"{self.layers} {layers} with a window of {self.visibility.window}"


def head_flops(
    template: Template,
    visibilities: Sequence[Visibility],
    layer_kinds: Int[np.ndarray, "layers"],
    head_dim: int,
    categories: Iterable[int] = tuple(HeadCategory),
    queries: Span | None = None,
) -> Int64[np.ndarray, "layers all_categories"]:
    """Exact attention FLOPs of one head of every layer in prefill, by `HeadCategory`.

    Args:
      template: the prompt.
      visibilities: one for each kind of layer.
      layer_kinds: the kind of each layer, an index into `visibilities`.
      head_dim: channels of a head.
      categories: which categories to count. The others are 0, which saves time.
      queries: the tokens that run, up to the last one; None for all.
    """
    last_token = Span(template.tokens - 1, template.tokens)
    last = len(layer_kinds) - 1
    flops = np.zeros((last + 1, len(HeadCategory)), np.int64)
    for category in map(HeadCategory, set(categories)):
        for kind in np.unique(layer_kinds[:last]):
            pairs = visible_pairs(template, category.groups, visibilities[kind], queries)
            flops[:last][layer_kinds[:last] == kind, category] = pairs
        visibility = visibilities[layer_kinds[last]]
        flops[last, category] = visible_pairs(template, category.groups, visibility, last_token)
    flops *= FLOPS_PER_PAIR * head_dim
    return flops


def total_flops(
    categories: Int[np.ndarray, "layers heads"], flops: Int64[np.ndarray, "layers all_categories"]
) -> int:
    """Attention FLOPs of all heads, from those of one head of each layer and category."""
    return int(np.take_along_axis(flops, categories.astype(np.int64), axis=1).sum())


def dense_flops(
    categories: Int[np.ndarray, "layers heads"], flops: Int64[np.ndarray, "layers all_categories"]
) -> int:
    """Attention FLOPs of as many heads if all of them were DENSE."""
    return total_flops(np.full_like(categories, HeadCategory.DENSE), flops)


def flops_per_kind(
    categories: Int[np.ndarray, "layers heads"],
    flops: Int64[np.ndarray, "layers all_categories"],
    visibilities: Sequence[Visibility],
    layer_kinds: Int[np.ndarray, "layers"],
) -> tuple[LayerFlops, ...]:
    """Attention FLOPs of each kind of layer that occurs, dense and with these categories.

    Args:
      categories: `HeadCategory` of every head.
      flops: FLOPs of one head of each layer, from `head_flops` with DENSE among its categories.
      visibilities: one for each kind of layer.
      layer_kinds: the kind of each layer, an index into `visibilities`.
    """
    result = []
    for kind, visibility in enumerate(visibilities):
        layers = layer_kinds == kind
        if layers.any():
            chosen, of_kind = categories[layers], flops[layers]
            dense, sparse = dense_flops(chosen, of_kind), total_flops(chosen, of_kind)
            result.append(LayerFlops(visibility, int(layers.sum()), dense, sparse))
    return tuple(result)
