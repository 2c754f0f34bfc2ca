"""What prompts of Gemma 3 need beyond template and tokenizer (transformers: Gemma3Processor)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Gemma3ImageProcessorPil, PretrainedConfig

from bsjax.checks import whole_number
from bsjax.errors import MessageError
from bsjax.models.family import ProcessedImage, PromptRules, reference_text_inputs
from bsjax.models.gemma3.vision_plan import grid_side, to_images, to_patches

# What Gemma3Processor takes where nothing stands beside the image, even if the checkpoint's image
# settings (preprocessor_config.json) say something else.
_CROPS = {
    "pan_and_scan_min_crop_size": 256,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
_IMAGE_SETTINGS = {"do_convert_rgb": True, "do_pan_and_scan": False, **_CROPS}


def process_image(
    image: Any, options: Mapping[str, Any], image_processor: Any, config: PretrainedConfig
) -> ProcessedImage:
    """Scales one image to the model's size and cuts it into patches; its crops after it.

    Crops are made where `do_pan_and_scan` beside the image says so and the image is long enough
    (Gemma3ImageProcessorPil.pan_and_scan): sides are to each other as
    `pan_and_scan_min_ratio_to_activate` or more, crops would be at least
    `pan_and_scan_min_crop_size` pixels wide and high. There are at most
    `pan_and_scan_max_num_crops`.

    Raises:
      MessageError: another option, or one with a value that it cannot have.
    """
    unknown = [name for name in options if name not in PROMPTS.image_options]
    if unknown:
        raise MessageError(
            f"{' and '.join(unknown)}: Gemma 3 scales all images to one size. do_pan_and_scan adds "
            "crops of long ones."
        )
    _check_crops(options)
    settings = _IMAGE_SETTINGS | dict(options)
    # Processors in transformers refuse an int here.
    ratio = "pan_and_scan_min_ratio_to_activate"
    settings[ratio] = float(settings[ratio])
    features = image_processor(images=[image], return_tensors="np", **settings)
    pixel_values = np.asarray(features["pixel_values"], np.float32)
    images, _, height, width = pixel_values.shape
    size = config.vision_config.patch_size
    wanted = grid_side(config) * size
    if (height, width) != (wanted, wanted):
        raise MessageError(
            f"the checkpoint's image settings scale images to {height} x {width} pixels, and its "
            f"vision tower takes {wanted} x {wanted}."
        )
    return ProcessedImage(
        to_patches(pixel_values, config),
        np.tile(np.asarray([1, height // size, width // size], np.int64), (images, 1)),
        np.full(images, config.mm_tokens_per_image, np.int64),
    )


def _check_crops(options: Mapping[str, Any]) -> None:
    wanted = options.get("do_pan_and_scan", False)
    if not isinstance(wanted, bool):
        raise MessageError(f"do_pan_and_scan must be true or false, got {wanted!r}.")
    for name in [name for name in _CROPS if name in options]:
        value = options[name]
        if "do_pan_and_scan" not in options:
            raise MessageError(f"{name} does nothing without do_pan_and_scan beside the image.")
        if name == "pan_and_scan_min_ratio_to_activate":
            if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
                raise MessageError(f"{name} is long side over short side, at least 1; got {value}.")
        else:
            whole_number(name, value, least=1, error=MessageError)


def expand(text: str, images: Sequence[int], tokenizer: Any, config: PretrainedConfig) -> str:
    """The text with an image's delimiters, and for crops the words that introduce them.

    As Gemma3Processor writes them (`full_image_sequence`, `replace_image_token`), with one image
    token for each image.

    Raises:
      MessageError: the tokenizer lacks one of the tokens.
    """
    names = ("boi_token_index", "image_token_index", "eoi_token_index")
    tokens = tokenizer.convert_ids_to_tokens([getattr(config, name) for name in names])
    for name, known in zip(names, tokens, strict=True):
        if known is None:
            raise MessageError(
                f"The checkpoint's tokenizer has no token {getattr(config, name)}, which is the "
                f"config's {name}: config.json and the tokenizer's files do not fit each other."
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


def reference_inputs(prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """What transformers' model takes for a prompt: whole images, and which tokens are theirs."""
    inputs = reference_text_inputs(prompt)
    if prompt.pixel_values is not None:
        inputs |= {
            "pixel_values": to_images(prompt.pixel_values, config),
            "token_type_ids": (inputs["input_ids"] == config.image_token_index).astype(np.int64),
        }
    return inputs


PROMPTS = PromptRules(
    image_token_id=lambda config: config.image_token_index,
    placeholder_id=lambda config: config.boi_token_index,
    process_image=process_image,
    expand=expand,
    image_processor=Gemma3ImageProcessorPil,
    image_options=("do_pan_and_scan", *_CROPS),
    how_to_shorten=(
        "Pass fewer images, none with do_pan_and_scan (crops are images too), or ask for fewer "
        "tokens."
    ),
)


def _refuse_image(
    image: Any, options: Mapping[str, Any], image_processor: Any, config: PretrainedConfig
) -> ProcessedImage:
    raise MessageError("this model reads text only.")


TEXT_PROMPTS = PromptRules(
    # No token is one.
    image_token_id=lambda config: -1,
    placeholder_id=lambda config: -1,
    process_image=_refuse_image,
    expand=lambda text, images, tokenizer, config: text,
    image_processor=None,
    image_options=(),
    how_to_shorten="Shorten the messages or ask for fewer tokens.",
)
