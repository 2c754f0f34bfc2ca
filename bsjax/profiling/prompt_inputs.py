"""Inputs of the profiling programs: whole prompts in packed order, and schedules of all rows.

Unlike the runtime, which runs prompts chunk by chunk, profiling compares the rows of a whole prompt
under several head categories.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Int32, Int64
from transformers import PretrainedConfig

from bsjax.attention import block_sizes
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import head_flops
from bsjax.masks.schedule import Schedule, bucket, build_schedule, category_tables
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import Visibility
from bsjax.models import Architecture, Family, ImageTextModel
from bsjax.prompts.prompt import Prompt
from bsjax.runtime.images import ImageEncoder, image_groups
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.programs import Programs, Stage

_SMALLEST_ROWS = 64
# Eight sizes per power of two: padding adds at most 12.5 %.
_BUCKETS = 8

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
        """Exact attention FLOPs of one head of each layer in prefill, by `HeadCategory`."""
        return head_flops(template, self.visibilities, self.kinds, self.head_dim)


def append_tokens(prompt: Prompt, token_ids: Sequence[int]) -> Prompt:
    """The prompt with text tokens appended."""
    more = np.asarray(token_ids, prompt.token_ids.dtype)
    return replace(prompt, token_ids=np.concatenate([prompt.token_ids, more]))


@dataclass(frozen=True, eq=False)
class PackedPrompt:
    """A whole prompt, its rows in packed order and padded to a bucket.

    Attributes:
      inputs: the prompt.
      order: int32 [tokens], the prompt position of each row before the padding.
      row: int32 [tokens], the row of each token.
      token_ids: int32 [rows], padded.
      position_ids: int32 [axes, rows], padded.
    """

    inputs: ModelInputs
    order: Int32[np.ndarray, "tokens"]
    row: Int32[np.ndarray, "tokens"]
    token_ids: Int32[np.ndarray, "rows"]
    position_ids: Int32[np.ndarray, "axes rows"]

    @classmethod
    def of(
        cls, model: Architecture, prompt: Prompt, sinks: Sinks | None, backend: str
    ) -> "PackedPrompt":
        """Packs a prompt.

        Raises:
          CapacityError: the prompt needs more positions than the model has.
        """
        inputs = prepare_inputs(model, prompt, None, sinks=sinks, backend=backend)
        order = inputs.template.packed_order
        rows = bucket(order.size, smallest=_SMALLEST_ROWS, steps=_BUCKETS)

        def by_row(values: np.ndarray) -> np.ndarray:
            padded = np.zeros((*values.shape[:-1], rows), np.int32)
            padded[..., : order.size] = values[..., order]
            return padded

        return cls(
            inputs,
            order,
            np.argsort(order).astype(np.int32),
            by_row(inputs.token_ids),
            by_row(inputs.position_ids),
        )

    @property
    def template(self) -> Template:
        """The prompt's structure."""
        return self.inputs.template

    def schedules(
        self, shape: Shape, dtype: Any, backend: str, build: BuildSchedule
    ) -> tuple[Schedule, ...]:
        """One schedule for each kind of layer, over all rows."""
        block_q, block_kv = block_sizes(backend, shape.head_dim, dtype, sparse=True)
        return tuple(
            build(
                self.template,
                visibility,
                block_q=block_q,
                block_kv=block_kv,
                tokens=self.token_ids.size,
            )
            for visibility in shape.visibilities
        )


def embed(module: ImageTextModel, token_ids: Int[Array, "rows"]) -> Float[Array, "rows hidden"]:
    """Embeddings of all rows; those of image tokens are placeholders."""
    return module.language_model.embed(token_ids)


class PromptEmbedding:
    """The stages that turn a whole prompt's token ids and pixels into embeddings.

    Attributes:
      stages: all stages, in the order in which they run.
      output: shape and dtype of the embeddings.
    """

    def __init__(self, programs: Programs, prompt: PackedPrompt, backend: str) -> None:
        self._token_ids = prompt.token_ids
        self._embed = programs.get(embed, (prompt.token_ids,))
        self.output = self._embed.output
        self._groups = image_groups(prompt.inputs.architecture, prompt.inputs.images, backend)
        row_of_image_token = prompt.row[prompt.template.image >= 0]
        self._images = ImageEncoder(
            programs,
            self._groups,
            self.output,
            lambda tokens: row_of_image_token[tokens],
            backend,
        )
        self.stages = [Stage("embed", self._embed), *self._images.stages]

    def run(self) -> jax.Array:
        """The embeddings [rows, hidden], images included."""
        return self._images.encode(self._embed(self._token_ids), self._groups)


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
