"""What the rest of bsjax needs to know of a model family, and nothing more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from flax import nnx
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.categories import BaseVisibility
from bsjax.models.parameters import ParameterRule


@dataclass(frozen=True)
class Family:
    """One architecture: how to build it, fill it, and prepare its inputs on the host.

    Attributes:
      name: the Hugging Face config's `model_type`.
      build: `build(config, dtype)` creates the model with random parameters. It works under
        `nnx.eval_shape`, which creates none. Raises `CheckpointError` for a config that asks for
        something that the port does not compute.
      parameter_table: `parameter_table(config)` lists where each parameter comes from.
      vision_plan: `vision_plan(grid_thw, config, patches=, block_q=, block_kv=)` computes what the
        vision tower needs to know of the images, as a pytree of NumPy arrays padded to `patches`
        rows. Raises `TemplateError` for a grid that the tower cannot merge, `CapacityError` when
        `patches` is too small.
      text_head_dim: `text_head_dim(config)` is the head dimension of the language model.
      vision_head_dim: `vision_head_dim(config)` is the head dimension of the vision tower: what its
        attention's block sizes depend on.
      positions: `positions(token_ids, image_token_id, grid_thw, config)` computes the position ids
        int32 [3, tokens] of a prompt, in prompt order, and the position of the first token after
        it. Raises `TemplateError` where grids and placeholders do not agree.
      visibilities: `visibilities(config)` lists the base visibility of each kind of layer that the
        language model has.
      layer_kinds: `layer_kinds(config)` says of each layer which of those kinds it is, int32
        [layers].
    """

    name: str
    build: Callable[[PretrainedConfig, Any], nnx.Module]
    parameter_table: Callable[[PretrainedConfig], list[ParameterRule]]
    vision_plan: Callable[..., Any]
    text_head_dim: Callable[[PretrainedConfig], int]
    vision_head_dim: Callable[[PretrainedConfig], int]
    positions: Callable[
        [np.ndarray, int, np.ndarray, PretrainedConfig], tuple[Int[np.ndarray, "3 tokens"], int]
    ]
    visibilities: Callable[[PretrainedConfig], tuple[BaseVisibility, ...]]
    layer_kinds: Callable[[PretrainedConfig], Int[np.ndarray, "layers"]]


def one_kind(config: PretrainedConfig) -> Int[np.ndarray, "layers"]:
    """The `layer_kinds` of a language model whose layers are all of one kind."""
    return np.zeros(config.get_text_config().num_hidden_layers, np.int32)


def causal(config: PretrainedConfig) -> tuple[BaseVisibility, ...]:
    """The `visibilities` of a language model whose layers are all causal."""
    return (BaseVisibility(),)
