"""Inputs of the profiling programs: prompts in packed order, and one schedule per kind of layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int, Int64
from transformers import PretrainedConfig

from bsjax.attention import block_sizes
from bsjax.checkpoint.loading import LoadedModel
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import head_flops
from bsjax.masks.schedule import Schedule, build_schedule, category_tables
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import Visibility
from bsjax.models import Family
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt
from bsjax.runtime.inputs import ModelInputs, prepare_inputs

BuildSchedule = Callable[..., Schedule]
"""`build(template, visibility, *, block_q, block_kv, tokens)`, for one kind of layer."""


@dataclass(frozen=True, eq=False)
class Shape:
    """The numbers of layers, heads and channels of a language model, and its kinds of layers.

    Attributes:
      layers: number of layers.
      heads: number of query heads of each layer.
      head_dim: channels of a head.
      visibilities: visibility of each kind of layer.
      kinds: int32 [layers], the kind of each layer.
    """

    layers: int
    heads: int
    head_dim: int
    visibilities: tuple[Visibility, ...]
    kinds: np.ndarray

    @classmethod
    def of(cls, family: Family, config: PretrainedConfig) -> "Shape":
        """The shape of a family's model with this config."""
        text = config.get_text_config()
        return cls(
            text.num_hidden_layers,
            text.num_attention_heads,
            family.text_head_dim(config),
            family.visibilities(config),
            np.asarray(family.layer_kinds(config)),
        )

    def category_flops(self, template: Template) -> Int64[np.ndarray, "layers categories"]:
        """Exact attention FLOPs of one head of each layer over a prompt, by `HeadCategory`."""
        return head_flops(template, self.visibilities, self.kinds, self.head_dim)


def append_tokens(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """The prompt with text tokens appended."""
    more = np.asarray(token_ids, prompt.token_ids.dtype)
    return replace(prompt, token_ids=np.concatenate([prompt.token_ids, more]))


def packed_inputs(model: LoadedModel, prompt: Prompt, sinks: Sinks, backend: str) -> ModelInputs:
    """Prepares a prompt's inputs, with rows in packed order.

    Raises:
      CapacityError: the prompt needs more positions than the model has.
    """
    # Any sparse category gives packed order. Profiling builds its own schedules.
    packed = Profile.uniform(HeadCategory.INTRA_IMAGE_SINK, model, sinks=sinks)
    return prepare_inputs(model.architecture, prompt, packed, backend=backend)


def kind_schedules(
    shape: Shape, inputs: ModelInputs, dtype: Any, backend: str, build: BuildSchedule
) -> tuple[Schedule, ...]:
    """One schedule per kind of layer, over the inputs' rows."""
    block_q, block_kv = block_sizes(backend, shape.head_dim, dtype, sparse=True)
    return tuple(
        build(
            inputs.template,
            visibility,
            block_q=block_q,
            block_kv=block_kv,
            tokens=inputs.token_ids.size,
        )
        for visibility in shape.visibilities
    )


def category_schedule(
    template: Template, visibility: Visibility, *, block_q: int, block_kv: int, tokens: int
) -> Schedule:
    """A packed schedule with tables for all categories, so that a head's category can be data."""
    return build_schedule(
        template,
        category_tables(list(HeadCategory)),
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
        tokens=tokens,
    )


def row_of_token(inputs: ModelInputs) -> Int[np.ndarray, "tokens"]:
    """The row of each token of the prompt."""
    return np.argsort(inputs.template.packed_order)
