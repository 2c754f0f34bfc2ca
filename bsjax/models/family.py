"""The interface of a model family: everything that the rest of bsjax knows of one."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32
from transformers import PretrainedConfig

from bsjax.errors import MessageError
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import Visibility
from bsjax.models.image_text_model import ImageTextModel
from bsjax.models.parameters import ParameterRule


class ProcessedImage(NamedTuple):
    """One image of the messages, cut into patches. With crops it becomes several images."""

    pixel_values: Float32[np.ndarray, "patches patch_values"]
    """Patches of all its images, one image after the other."""
    grid_thw: Int[np.ndarray, "images 3"]
    """Frames, rows and columns of patches of each image."""
    image_tokens: Int[np.ndarray, "images"]
    """Tokens of each image."""


class Family(ABC):
    """One architecture: how to build it, fill it with weights, and prepare its inputs on the host.

    `config` is always the Hugging Face configuration of the whole model. The defaults are those of
    a model that reads text only and whose layers are all causal.

    Attributes:
      name: the `model_type` of its Hugging Face configurations.
      dtypes: what its models can compute in.
      image_processor: class of the image processor, one that needs neither torch nor torchvision
        (AutoProcessor would, for videos). None for a family that reads text only.
      image_options: keys that an image part of a message may have for `process_image`.
      how_to_shorten: advice for error messages about prompts that are too long.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    image_processor: ClassVar[Any] = None
    image_options: ClassVar[tuple[str, ...]] = ()
    how_to_shorten: ClassVar[str] = "Shorten the messages or ask for fewer tokens."

    @property
    def reads_images(self) -> bool:
        """Whether its models have a vision tower."""
        return self.image_processor is not None

    @abstractmethod
    def build(self, config: PretrainedConfig, dtype: Any) -> ImageTextModel:
        """Creates the model with random parameters; under `nnx.eval_shape`, with shapes only.

        Raises:
          CheckpointError: the config asks for something that the port does not compute.
        """

    @abstractmethod
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        """Where each parameter comes from."""

    # What the language model sees, and where.

    @abstractmethod
    def text_head_dim(self, config: PretrainedConfig) -> int:
        """The head dimension of the language model."""

    def visibilities(self, config: PretrainedConfig) -> tuple[Visibility, ...]:
        """The base visibility of each kind of layer in the language model."""
        return (Visibility(),)

    def layer_kinds(self, config: PretrainedConfig) -> Int32[np.ndarray, "layers"]:
        """The kind of each layer, an index into `visibilities`."""
        return np.zeros(config.get_text_config().num_hidden_layers, np.int32)

    def positions(
        self,
        token_ids: Int[np.ndarray, "tokens"],
        grid_thw: Int[np.ndarray, "images 3"],
        config: PretrainedConfig,
    ) -> tuple[Int32[np.ndarray, "axes tokens"], int]:
        """Position ids of a prompt. By default tokens are counted, from 0 on, on one axis.

        Args:
          token_ids: the prompt, with `image_token_id` once per image token.
          grid_thw: frames, rows and columns of patches of each image, in prompt order.
          config: of the whole model.

        Returns:
          The positions, in prompt order, and the position of the first token after the prompt; such
          a token has the same position on all axes.

        Raises:
          TemplateError: grids and image tokens do not match.
        """
        return np.arange(len(token_ids), dtype=np.int32)[None], len(token_ids)

    # How messages become a prompt.

    def image_token_id(self, config: PretrainedConfig) -> int:
        """The id that every token of an image has in a prompt. By default -1: there is none."""
        return -1

    def placeholder_id(self, config: PretrainedConfig) -> int:
        """The id that the chat template writes once for each image of the messages."""
        return self.image_token_id(config)

    def template(
        self, prompt: Any, config: PretrainedConfig, sinks: Sinks | None = None
    ) -> Template:
        """The template of a `Prompt`; without `sinks` the first token of each image is its sink.

        Raises:
          TemplateError: image tokens and images do not match.
        """
        return Template.from_tokens(
            prompt.token_ids,
            self.image_token_id(config),
            Sinks() if sinks is None else sinks,
            prompt.image_tokens,
        )

    def process_image(
        self,
        image: Any,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
    ) -> ProcessedImage:
        """Cuts one image into patches.

        Args:
          image: a PIL image or an array, as transformers' image processors take them.
          options: the image part's options; see `image_options`.
          image_processor: the checkpoint's.
          config: of the whole model.

        Raises:
          MessageError: an option that the family does not have, or an invalid value of one.
        """
        raise MessageError("this model reads text only.")

    def expand(
        self, text: str, images: Sequence[int], tokenizer: Any, config: PretrainedConfig
    ) -> str:
        """Replaces each placeholder in a rendered chat template, so that every image has one token.

        Args:
          text: the rendered template.
          images: how many images each placeholder stands for: more than one with crops.
          tokenizer: the checkpoint's.
          config: of the whole model.

        Raises:
          MessageError: the tokenizer does not have the tokens that this needs.
        """
        return text

    # How images become the vision tower's inputs.

    def vision_head_dim(self, config: PretrainedConfig) -> int:
        """The head dimension of the vision tower, which its block sizes depend on."""
        raise NotImplementedError

    @staticmethod
    def vision_plan(
        grid_thw: Int[np.ndarray, "images 3"],
        config: PretrainedConfig,
        *,
        patches: int,
        block_q: int,
        block_kv: int,
    ) -> Any:
        """What the vision tower needs to know of some images: a pytree of NumPy arrays.

        Args:
          grid_thw: frames, rows and columns of patches of each image.
          config: of the whole model.
          patches: rows to pad to, a multiple of the patches of an image token.
          block_q: query rows of an attention tile, at most.
          block_kv: keys of an attention block, at most.

        Raises:
          TemplateError: a grid that the tower cannot merge.
          CapacityError: `patches` is too small or not a valid multiple.
        """
        raise NotImplementedError

    # How the port is compared with transformers.

    def reference_inputs(self, prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
        """The arguments of transformers' model for a `Prompt`, by name: arrays, a batch of one."""
        token_ids = np.asarray(prompt.token_ids, np.int64)[None]
        return {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}

    def reference_logits(
        self, logits: Float[np.ndarray, "*rows vocabulary"], config: PretrainedConfig
    ) -> Float[np.ndarray, "*rows vocabulary"]:
        """What ours should equal, given the logits of transformers' model."""
        return logits


class Architecture(NamedTuple):
    """A model without its weights."""

    family: Family
    config: PretrainedConfig
    dtype: Any
    """What it computes in."""
