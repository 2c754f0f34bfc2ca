"""The families of Gemma 3: models that read images, and the 1B, which reads text only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8
from transformers import Gemma3ImageProcessorPil, PretrainedConfig
from typing_extensions import override

from bsjax.checks import argument, shown, whole_number
from bsjax.errors import MessageError
from bsjax.masks.visibility import Visibility
from bsjax.models.family import Family, ImageShapes
from bsjax.models.gemma3.model import Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from bsjax.models.gemma3.parameters import language_rules, parameter_table
from bsjax.models.gemma3.text import layer_kinds
from bsjax.models.gemma3.vision_plan import (
    grid_side,
    pooled_side,
    to_images,
    vision_plan,
)
from bsjax.models.image_rows import image_starts
from bsjax.models.parameters import ParameterRule
from bsjax.models.pixels import cut_into_patches, image_size, pixel_values_of, scaled_to

# Gemma3Processor's settings for an image part without options. They take precedence over the
# checkpoint's image settings (preprocessor_config.json).
_CROPS = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
_IMAGE_SETTINGS = {"do_convert_rgb": True, "do_pan_and_scan": False, **_CROPS}


class Gemma3TextFamily(Family):
    """Text only: local layers, which have a sliding window, and global ones."""

    name = "gemma3_text"
    # The residual stream of the published models exceeds float16's range.
    dtypes = ("float32", "bfloat16")

    @override
    def build(self, config: PretrainedConfig, dtype: Any) -> Gemma3ForCausalLM:
        return Gemma3ForCausalLM.from_config(config, dtype)

    @override
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        return language_rules(config)

    @override
    def text_head_dim(self, config: PretrainedConfig) -> int:
        return config.get_text_config().head_dim

    @override
    def visibilities(self, config: PretrainedConfig) -> tuple[Visibility, Visibility]:
        """Those of local and of global layers; in both, tokens of an image see each other."""
        window = config.get_text_config().sliding_window
        return (
            Visibility(bidirectional_images=True, window=window),
            Visibility(bidirectional_images=True),
        )

    @override
    def layer_kinds(self, config: PretrainedConfig) -> Int32[np.ndarray, "layers"]:
        return layer_kinds(config)


class Gemma3Family(Gemma3TextFamily):
    """Adds a vision tower, which scales all images to one size."""

    name = "gemma3"
    image_processor = Gemma3ImageProcessorPil
    image_options = ("do_pan_and_scan", *_CROPS)
    fewer_image_tokens = ("pass fewer images", "leave out {do_pan_and_scan} (crops are images too)")

    @override
    def build(self, config: PretrainedConfig, dtype: Any) -> Gemma3ForConditionalGeneration:
        return Gemma3ForConditionalGeneration.from_config(config, dtype)

    @override
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        return parameter_table(config)

    @override
    def positions(
        self,
        token_ids: Int[np.ndarray, "tokens"],
        grid_thw: Int[np.ndarray, "images 3"],
        config: PretrainedConfig,
    ) -> tuple[Int32[np.ndarray, "1 tokens"], int]:
        lengths = np.full(len(grid_thw), config.mm_tokens_per_image)
        image_starts(token_ids, self.image_token_id(config), lengths)
        return super().positions(token_ids, grid_thw, config)

    @override
    def image_token_id(self, config: PretrainedConfig) -> int:
        return config.image_token_index

    @override
    def placeholder_id(self, config: PretrainedConfig) -> int:
        return config.boi_token_index

    @override
    def image_shapes(
        self,
        height: int,
        width: int,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
    ) -> ImageShapes:
        settings = self._settings(options)
        # An image of that size which takes no memory; crops are views of it.
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        images = [blank, *_crops(blank, settings, image_processor)]
        sizes = [_scaled_size(*image_size(each), image_processor) for each in images]
        side = grid_side(config)
        wanted = side * config.vision_config.patch_size
        for scaled in sizes:
            if scaled != (wanted, wanted):
                raise MessageError(
                    f"the checkpoint's image settings scale images to {scaled[0]} x {scaled[1]} "
                    f"pixels, but its vision tower needs {wanted} x {wanted}."
                )
        return ImageShapes(
            np.tile(np.asarray([1, side, side], np.int32), (len(images), 1)),
            (config.mm_tokens_per_image,) * len(images),
            len(images) * wanted**2,
        )

    @override
    def image_patches(
        self,
        image: Any,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
        places: Mapping[int, UInt8[np.ndarray, "_ values"]],
    ) -> list[UInt8[np.ndarray, "_ values"]]:
        """Scales one image to the model's size and cuts it into patches, followed by its crops.

        Crops are made if the option `do_pan_and_scan` is true and the image is long enough
        (Gemma3ImageProcessorPil.pan_and_scan): the ratio of its sides must be at least
        `pan_and_scan_min_ratio_to_activate`, and crops at least `pan_and_scan_min_crop_size` pixels
        wide and high. At most `pan_and_scan_max_num_crops` are made.

        Raises:
          MessageError: an option is unknown or has an invalid value.
        """
        settings = self._settings(options)
        # Refuses images that the tower does not read.
        self.image_shapes(*image_size(image), options, image_processor, config)
        images = [image]
        if settings["do_pan_and_scan"]:
            image = image_processor.process_image(image, do_convert_rgb=settings["do_convert_rgb"])
            images = [image, *_crops(image, settings, image_processor)]
        size = grid_side(config) * config.vision_config.patch_size
        return [
            cut_into_patches(
                scaled_to(
                    each,
                    (size, size) if image_processor.do_resize else None,
                    image_processor,
                    channels=self.channels(config),
                    convert_rgb=settings["do_convert_rgb"],
                ),
                config.vision_config.patch_size,
                pooled_side(config),
                places.get(index),
            )
            for index, each in enumerate(images)
        ]

    def _settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the image processor for an image part with options."""
        unknown = [name for name in options if name not in self.image_options]
        if unknown:
            raise MessageError(
                f"{' and '.join(map(argument, unknown))}: Gemma 3 scales all images to one size. "
                f"{argument('do_pan_and_scan')} adds crops of long ones."
            )
        _check_crops(options)
        settings = _IMAGE_SETTINGS | dict(options)
        # transformers' processors reject an int here.
        ratio = "pan_and_scan_min_ratio_to_activate"
        settings[ratio] = float(settings[ratio])
        return settings

    @override
    def expand(
        self, text: str, images: Sequence[int], tokenizer: Any, config: PretrainedConfig
    ) -> str:
        """Adds each image's delimiters, and the words that introduce crops.

        Like Gemma3Processor (`full_image_sequence`, `replace_image_token`), but with one token per
        image.
        """
        names = ("boi_token_index", "image_token_index", "eoi_token_index")
        tokens = tokenizer.convert_ids_to_tokens([getattr(config, name) for name in names])
        for name, known in zip(names, tokens, strict=True):
            if known is None:
                raise MessageError(
                    f"The checkpoint's tokenizer has no token {getattr(config, name)}, which is "
                    f"the config's {name}: config.json and the tokenizer's files do not match."
                )
        start, token, end = tokens
        whole = f"\n\n{start}{token}{end}\n\n"
        first, *others = text.split(start)
        pieces = [first]
        for count, following in zip(images, others, strict=True):
            if count > 1:
                pieces.append(
                    f"Here is the original image {whole} and here are some crops to help you see "
                    f"better {' '.join([whole] * (count - 1))}"
                )
            else:
                pieces.append(whole)
            pieces.append(following)
        return "".join(pieces)

    @override
    def smallest_grid(self, config: PretrainedConfig) -> tuple[int, int, int]:
        return 1, grid_side(config), grid_side(config)

    @override
    def channels(self, config: PretrainedConfig) -> int:
        return config.vision_config.num_channels

    @override
    def patches_per_token(self, config: PretrainedConfig) -> int:
        return pooled_side(config) ** 2

    @override
    def vision_head_dim(self, config: PretrainedConfig) -> int:
        return config.vision_config.hidden_size // config.vision_config.num_attention_heads

    vision_plan = staticmethod(vision_plan)

    @override
    def reference_inputs(self, prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
        inputs = super().reference_inputs(prompt, config)
        if len(prompt.grid_thw):
            is_image = inputs["input_ids"] == config.image_token_index
            inputs |= {
                "pixel_values": to_images(pixel_values_of(prompt.pixels), config),
                "token_type_ids": is_image.astype(np.int64),
            }
        return inputs

    @override
    def reference_logits(
        self, logits: Float[np.ndarray, "*rows vocabulary"], config: PretrainedConfig
    ) -> Float[np.ndarray, "*rows vocabulary"]:
        """Applies the config's soft cap, which Gemma3ForConditionalGeneration ignores."""
        cap = config.text_config.final_logit_softcapping
        return logits if cap is None else cap * np.tanh(logits / cap)


def _crops(
    image: UInt8[np.ndarray, "channels height width"],
    settings: Mapping[str, Any],
    image_processor: Any,
) -> list[UInt8[np.ndarray, "channels crop_height crop_width"]]:
    if not settings["do_pan_and_scan"]:
        return []
    return image_processor.pan_and_scan(image, **{name: settings[name] for name in _CROPS})


def _scaled_size(height: int, width: int, image_processor: Any) -> tuple[int, int]:
    """Height and width of an image of this size, scaled."""
    if not image_processor.do_resize:
        return height, width
    size = dict(image_processor.size)
    # Other settings, such as `shortest_edge`, take precedence in transformers.
    if set(name for name, value in size.items() if value) != {"height", "width"}:
        raise MessageError(
            f"the checkpoint's image settings have the size {size}; bsjax computes those with a "
            "height and a width."
        )
    return size["height"], size["width"]


def _check_crops(options: Mapping[str, Any]) -> None:
    """Rejects crop options with invalid values, or without `do_pan_and_scan`."""
    wanted = options.get("do_pan_and_scan", False)
    if not isinstance(wanted, bool):
        raise MessageError(
            f"{argument('do_pan_and_scan')} must be true or false, got {shown(wanted)}."
        )
    for name in [name for name in _CROPS if name in options]:
        value = options[name]
        if "do_pan_and_scan" not in options:
            raise MessageError(f"{name} has no effect without do_pan_and_scan in the same part.")
        if name == "pan_and_scan_min_ratio_to_activate":
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
                raise MessageError(
                    f"{name} is long side over short side, at least 1; got {shown(value)}."
                )
        else:
            whole_number(name, value, least=1, most=2**31, error=MessageError)
