"""What the rest of bsjax needs to know of a model family, and nothing more."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from flax import nnx
from jaxtyping import Float32, Int
from transformers import PretrainedConfig

from bsjax.masks.visibility import Visibility
from bsjax.models.parameters import ParameterRule


class ProcessedImage(NamedTuple):
    """One image of the messages as a vision tower takes it; with its crops, several images."""

    pixel_values: Float32[np.ndarray, "patches patch_values"]
    """Patches of all its images, one image after the other."""
    grid_thw: Int[np.ndarray, "images 3"]
    """Frames, rows and columns of patches of each."""
    image_tokens: Int[np.ndarray, "images"]
    """Tokens of each."""


@dataclass(frozen=True)
class PromptRules:
    """How a family's prompts are made from messages, beyond chat template and tokenizer.

    Attributes:
      image_token_id: `image_token_id(config)` is the id that stands for each token of an image.
      placeholder_id: `placeholder_id(config)` is the id of what the chat template writes once for
        each image of the messages.
      process_image: `process_image(image, options, image_processor, config)` cuts one image into
        patches. `options` are those that stood beside the image in its message. Raises
        `MessageError` for one that the family does not know.
      expand: `expand(text, images, tokenizer, config)` writes a rendered chat template out, so that
        one image token stands for each image; `images` says how many each placeholder stands for.
      image_processor: class of the image processor, one that needs neither torch nor torchvision
        (AutoProcessor would, for videos). None for models that read text only.
      image_options: what may stand beside an image in its message, for `process_image` to check.
      how_to_shorten: a sentence for messages about prompts that are too long.
    """

    image_token_id: Callable[[PretrainedConfig], int]
    placeholder_id: Callable[[PretrainedConfig], int]
    process_image: Callable[[Any, Mapping[str, Any], Any, PretrainedConfig], ProcessedImage]
    expand: Callable[[str, Sequence[int], Any, PretrainedConfig], str]
    image_processor: type | None
    image_options: tuple[str, ...]
    how_to_shorten: str


def same_logits(logits: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """The `reference_logits` of a family whose logits are those of transformers."""
    return logits


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
        `patches` is too small. None for models that read text only.
      text_head_dim: `text_head_dim(config)` is the head dimension of the language model.
      vision_head_dim: `vision_head_dim(config)` is the head dimension of the vision tower: what its
        attention's block sizes depend on. None where there is no tower.
      prompts: what its prompts need beyond chat template and tokenizer.
      reference_inputs: `reference_inputs(prompt, config)` is what transformers' own model takes for
        a `Prompt`: NumPy arrays by argument name, in a batch of one.
      reference_logits: `reference_logits(logits, config)` is what our logits are to be compared
        with, from those of transformers' own model.
      positions: `positions(token_ids, image_token_id, grid_thw, config)` computes the position ids
        int32 [axes, tokens] of a prompt, in prompt order, and the position of the first token after
        it; a token after the prompt has the same position on all axes. Raises `TemplateError` where
        grids and placeholders do not agree.
      visibilities: `visibilities(config)` lists the base visibility of each kind of layer that the
        language model has.
      layer_kinds: `layer_kinds(config)` says of each layer which of those kinds it is, int32
        [layers].
      dtypes: what its models can compute in.
    """

    name: str
    build: Callable[[PretrainedConfig, Any], nnx.Module]
    parameter_table: Callable[[PretrainedConfig], list[ParameterRule]]
    vision_plan: Callable[..., Any] | None
    text_head_dim: Callable[[PretrainedConfig], int]
    vision_head_dim: Callable[[PretrainedConfig], int] | None
    prompts: PromptRules
    reference_inputs: Callable[[Any, PretrainedConfig], dict[str, np.ndarray]]
    positions: Callable[
        [np.ndarray, int, np.ndarray, PretrainedConfig], tuple[Int[np.ndarray, "axes tokens"], int]
    ]
    visibilities: Callable[[PretrainedConfig], tuple[Visibility, ...]]
    layer_kinds: Callable[[PretrainedConfig], Int[np.ndarray, "layers"]]
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    reference_logits: Callable[[np.ndarray, PretrainedConfig], np.ndarray] = same_logits


def reference_text_inputs(prompt: Any) -> dict[str, np.ndarray]:
    """The `reference_inputs` of a prompt's token ids, which all families share."""
    token_ids = np.asarray(prompt.token_ids, np.int64)[None]
    return {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}


def one_kind(config: PretrainedConfig) -> Int[np.ndarray, "layers"]:
    """The `layer_kinds` of a language model whose layers are all of one kind."""
    return np.zeros(config.get_text_config().num_hidden_layers, np.int32)


def causal(config: PretrainedConfig) -> tuple[Visibility, ...]:
    """The `visibilities` of a language model whose layers are all causal."""
    return (Visibility(),)
