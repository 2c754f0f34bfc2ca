"""What prompts of Qwen2-VL and Qwen2.5-VL need beyond template and tokenizer (Qwen2VLProcessor)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig, Qwen2VLImageProcessorPil

from bsjax.errors import MessageError
from bsjax.models.family import ProcessedImage, PromptRules, reference_text_inputs


def process_image(
    image: Any, options: Mapping[str, Any], image_processor: Any, config: PretrainedConfig
) -> ProcessedImage:
    """Cuts one image into patches; `max_pixels` and `min_pixels` bound the size it is scaled to.

    Raises:
      MessageError: another option, bounds that are none, or that the checkpoint's image settings
        leave no room for.
    """
    unknown = [name for name in options if name not in PROMPTS.image_options]
    if unknown:
        raise MessageError(f"{', '.join(unknown)}: Qwen's image processor has no such option.")
    for name, value in options.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MessageError(f"{name} must be a positive number of pixels, got {value!r}.")
    maximum, minimum = options.get("max_pixels"), options.get("min_pixels")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise MessageError(f"min_pixels ({minimum}) is above max_pixels ({maximum}).")
    settings = {}
    if maximum is not None or minimum is not None:
        size = dict(image_processor.size)
        if "shortest_edge" not in size or "longest_edge" not in size:
            raise MessageError(
                "max_pixels and min_pixels have no effect: this checkpoint scales all images to "
                "one size."
            )
        # For Qwen's image processors the two "edges" are numbers of pixels.
        maximum = maximum or max(size["longest_edge"], minimum or 0)
        minimum = minimum or min(size["shortest_edge"], maximum)
        settings["size"] = {"shortest_edge": minimum, "longest_edge": maximum}
    features = image_processor(images=[image], return_tensors="np", **settings)
    grid = features["image_grid_thw"]
    return ProcessedImage(
        features["pixel_values"], grid, grid.prod(axis=1) // image_processor.merge_size**2
    )


def expand(text: str, images: Sequence[int], tokenizer: Any, config: PretrainedConfig) -> str:
    """The text itself: the template's placeholder is the image token, and an image is one image."""
    return text


def reference_inputs(prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """What transformers' model takes for a prompt: grids as well, and which tokens are images'."""
    inputs = reference_text_inputs(prompt)
    if prompt.pixel_values is not None:
        inputs |= {
            "pixel_values": np.array(prompt.pixel_values, np.float32),
            "image_grid_thw": np.array(prompt.grid_thw, np.int64),
            "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).astype(np.int32),
        }
    return inputs


PROMPTS = PromptRules(
    image_token_id=lambda config: config.image_token_id,
    placeholder_id=lambda config: config.image_token_id,
    process_image=process_image,
    expand=expand,
    image_processor=Qwen2VLImageProcessorPil,
    image_options=("max_pixels", "min_pixels"),
    how_to_shorten="Lower max_pixels, pass fewer images or ask for fewer tokens.",
)
