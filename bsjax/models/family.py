"""The interface of a model family: everything that the rest of bsjax knows about it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8
from transformers import PretrainedConfig

from bsjax.errors import MessageError
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import Visibility
from bsjax.models.image_text_model import ImageTextModel
from bsjax.models.parameters import ParameterRule


class ImageShapes(NamedTuple):
    """Grid, tokens and pixels of an image and its crops, as determined by the image's size.

    Attributes:
      grid_thw: frames, rows and columns of patches of the image and of each crop.
      image_tokens: number of tokens of the image and of each crop.
      pixels: how many pixels all of them are scaled to.
    """

    grid_thw: Int32[np.ndarray, "images 3"]
    image_tokens: tuple[int, ...]
    pixels: int


class Family(ABC):
    """One architecture: how to build it, fill it with weights, and prepare its inputs on the host.

    `config` is always the Hugging Face configuration of the whole model. The defaults are those of
    a model that reads text only and whose layers are all causal.

    Attributes:
      name: the `model_type` of its Hugging Face configurations.
      dtypes: the dtypes that its models can run in.
      image_processor: class of the image processor. Unlike AutoProcessor, which handles videos too,
        it must not need torch or torchvision. None for a family that reads text only.
      image_options: keys that an image part of a message may have for `image_patches`.
      fewer_image_tokens: what makes a prompt with images shorter, as advice in error messages;
        names of options are in braces.
    """

    name: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    image_processor: ClassVar[Any] = None
    image_options: ClassVar[tuple[str, ...]] = ()
    fewer_image_tokens: ClassVar[tuple[str, ...]] = ()

    @property
    def reads_images(self) -> bool:
        """Whether its models have a vision tower."""
        return self.image_processor is not None

    @abstractmethod
    def build(self, config: PretrainedConfig, dtype: Any) -> ImageTextModel:
        """Creates the model with random parameters; under `nnx.eval_shape`, with shapes only.

        Raises:
          CheckpointError: the config asks for something that the port does not support.
        """

    @abstractmethod
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        """The rules that say which source tensors each parameter is made from."""

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
        """Position ids of a prompt. By default there is one axis, which counts tokens from 0.

        Args:
          token_ids: the prompt, with `image_token_id` once per image token.
          grid_thw: frames, rows and columns of patches of each image, in prompt order.
          config: configuration of the whole model.

        Returns:
          The positions, in prompt order, and the position of the first token after the prompt,
          which is the same on all axes.

        Raises:
          TemplateError: grids and image tokens do not match.
        """
        return np.arange(len(token_ids), dtype=np.int32)[None], len(token_ids)

    # How messages become a prompt.

    def image_token_id(self, config: PretrainedConfig) -> int:
        """The id that every image token has in a prompt; -1, the default, if there is none."""
        return -1

    def placeholder_id(self, config: PretrainedConfig) -> int:
        """The id that the chat template writes once for each image of the messages."""
        return self.image_token_id(config)

    def template(
        self, prompt: Any, config: PretrainedConfig, sinks: Sinks | None = None
    ) -> Template:
        """The template of a `Prompt`; by default the first token of each image is its only sink.

        Raises:
          TemplateError: image tokens and images do not match.
        """
        return Template.from_tokens(
            prompt.token_ids,
            self.image_token_id(config),
            Sinks() if sinks is None else sinks,
            prompt.image_tokens,
        )

    def check_image_settings(self, image_processor: Any, config: PretrainedConfig) -> None:
        """Refuses image settings that make patches which the vision tower does not read.

        Raises:
          CheckpointError: they do not match the config.
        """
        return

    def image_shapes(
        self,
        height: int,
        width: int,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
    ) -> ImageShapes:
        """What `image_patches` would make of an image of this size.

        Args:
          height: of the image.
          width: of the image.
          options: the image part's options; see `image_options`.
          image_processor: the checkpoint's image processor.
          config: configuration of the whole model.

        Raises:
          MessageError: the family does not have one of the options, its value is invalid, or the
            checkpoint's image settings make no image that the model reads.
        """
        raise MessageError("this model reads text only.")

    def image_patches(
        self,
        image: Any,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
        places: Mapping[int, UInt8[np.ndarray, "_ values"]],
    ) -> list[UInt8[np.ndarray, "_ values"]]:
        """Scales an image and cuts it into patches; see `pixels.cut_into_patches`.

        Args:
          image: an RGB image, or an array with its channels first and whole values from 0 to 255.
          options: the image part's options; see `image_options`.
          image_processor: the checkpoint's image processor.
          config: configuration of the whole model.
          places: arrays that patches are written to: 0 for the image, and the number of a crop.
            Patches that have none, or one of another shape, get arrays of their own.

        Returns:
          The patches of the image and of each crop.

        Raises:
          MessageError: as for `image_shapes`.
        """
        raise MessageError("this model reads text only.")

    def expand(
        self, text: str, images: Sequence[int], tokenizer: Any, config: PretrainedConfig
    ) -> str:
        """Replaces the placeholders in a rendered chat template, so that each image has one token.

        Args:
          text: the rendered chat template.
          images: how many images each placeholder represents: more than one with crops.
          tokenizer: the checkpoint's tokenizer.
          config: configuration of the whole model.

        Raises:
          MessageError: the tokenizer lacks a token that is needed.
        """
        return text

    # How images become the vision tower's inputs.

    def smallest_grid(self, config: PretrainedConfig) -> tuple[int, int, int]:
        """Frames, rows and columns of patches of the smallest image."""
        raise NotImplementedError

    def patch_area(self, config: PretrainedConfig) -> int:
        """How many pixels a patch has."""
        return config.vision_config.patch_size**2

    def channels(self, config: PretrainedConfig) -> int:
        """How many channels a pixel has."""
        raise NotImplementedError

    def patches_per_token(self, config: PretrainedConfig) -> int:
        """How many patches the vision tower merges into one image token."""
        raise NotImplementedError

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
        """What the vision tower needs to know about some images: a pytree of NumPy arrays.

        Args:
          grid_thw: frames, rows and columns of patches of each image.
          config: configuration of the whole model.
          patches: rows to pad to, a multiple of the patches of an image token.
          block_q: query rows of an attention tile, at most.
          block_kv: keys of an attention block, at most.

        Raises:
          TemplateError: the tower cannot merge the patches of a grid.
          CapacityError: `patches` is too small or not a valid multiple.
        """
        raise NotImplementedError

    # How the port is compared with transformers.

    def reference_inputs(self, prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
        """The arguments of transformers' model for a `Prompt`: arrays by name, a batch of one."""
        token_ids = np.asarray(prompt.token_ids, np.int64)[None]
        return {"input_ids": token_ids, "attention_mask": np.ones_like(token_ids)}

    def reference_logits(
        self, logits: Float[np.ndarray, "*rows vocabulary"], config: PretrainedConfig
    ) -> Float[np.ndarray, "*rows vocabulary"]:
        """What our logits should equal, given those of transformers' model."""
        return logits


class Architecture(NamedTuple):
    """A model without its weights."""

    family: Family
    config: PretrainedConfig
    dtype: Any
    """The dtype that it runs in."""
