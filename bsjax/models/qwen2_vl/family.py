"""The family of Qwen2-VL. Qwen2.5-VL differs from it only in the vision tower."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32
from transformers import PretrainedConfig, Qwen2VLImageProcessorPil
from typing_extensions import override

from bsjax.checks import argument, shown
from bsjax.errors import MessageError, TemplateError
from bsjax.models.family import Family, ProcessedImage
from bsjax.models.image_rows import image_starts
from bsjax.models.parameters import ParameterRule
from bsjax.models.qwen2_vl.model import Qwen2VLForConditionalGeneration
from bsjax.models.qwen2_vl.parameters import parameter_table
from bsjax.models.qwen2_vl.text import head_dim
from bsjax.models.qwen2_vl.vision import Qwen2VisionTransformer
from bsjax.models.qwen2_vl.vision_plan import vision_plan


class Qwen2VLFamily(Family):
    """Causal layers, three position axes, images of any size."""

    name = "qwen2_vl"
    image_processor = Qwen2VLImageProcessorPil
    image_options = ("max_pixels", "min_pixels")
    fewer_image_tokens = ("lower {max_pixels}", "pass fewer images")

    @override
    def build(self, config: PretrainedConfig, dtype: Any) -> Qwen2VLForConditionalGeneration:
        return Qwen2VLForConditionalGeneration.from_config(
            config, dtype, tower=Qwen2VisionTransformer
        )

    @override
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        return parameter_table(config)

    @override
    def text_head_dim(self, config: PretrainedConfig) -> int:
        return head_dim(config.text_config)

    @override
    def positions(
        self,
        token_ids: Int[np.ndarray, "tokens"],
        grid_thw: Int[np.ndarray, "images 3"],
        config: PretrainedConfig,
    ) -> tuple[Int32[np.ndarray, "3 tokens"], int]:
        """M-RoPE: temporal, row and column positions (Qwen2VLModel.get_rope_index).

        Text advances by one per token on all three axes. An image starts where the text before it
        ended; temporal positions count frames, rows and columns count merged patches. The text
        after an image starts after its longer side. Unlike in transformers, images are
        distinguished by their grids, so two images may be adjacent.

        Raises:
          TemplateError: the prompt holds video tokens, text interrupts an image, or the grids do
            not match the image tokens.
        """
        token_ids = np.asarray(token_ids)
        video_tokens = int(np.count_nonzero(token_ids == config.video_token_id))
        if video_tokens:
            raise TemplateError(
                f"The prompt holds {video_tokens} video tokens (id {config.video_token_id}); "
                "videos are not supported. Pass frames as images."
            )
        merge = config.vision_config.spatial_merge_size
        grids = np.asarray(grid_thw, np.int64).reshape(-1, 3) // (1, merge, merge)
        lengths = grids.prod(axis=1)
        starts = image_starts(token_ids, self.image_token_id(config), lengths)

        result = np.empty((3, token_ids.size), np.int32)
        index = 0
        next_position = 0
        for grid, start, end in zip(grids, starts, starts + lengths, strict=True):
            result[:, index:start] = np.arange(next_position, next_position + start - index)
            next_position += start - index
            result[:, start:end] = next_position + np.indices(grid).reshape(3, -1)
            next_position += int(grid[1:].max())
            index = end
        result[:, index:] = np.arange(next_position, next_position + token_ids.size - index)
        return result, int(result.max(initial=-1)) + 1

    @override
    def image_token_id(self, config: PretrainedConfig) -> int:
        return config.image_token_id

    @override
    def scaled_pixels(
        self, height: int, width: int, options: Mapping[str, Any], image_processor: Any
    ) -> int:
        size = self._settings(options, image_processor).get("size", dict(image_processor.size))
        bounds = {
            "min_pixels": size.get("shortest_edge") or 1,
            "max_pixels": size.get("longest_edge") or height * width,
        }
        patches = image_processor.get_number_of_image_patches(height, width, bounds)
        return patches * image_processor.patch_size**2

    @override
    def process_image(
        self,
        image: Any,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
    ) -> ProcessedImage:
        """Scales one image to between `min_pixels` and `max_pixels`, and cuts it into patches.

        Raises:
          MessageError: an option is unknown, or the bounds are invalid or not allowed by the
            checkpoint's image settings.
        """
        settings = self._settings(options, image_processor)
        features = image_processor(images=[image], return_tensors="np", **settings)
        grid = features["image_grid_thw"]
        image_tokens = grid.prod(axis=1) // image_processor.merge_size**2
        return ProcessedImage(features["pixel_values"], grid, image_tokens)

    def _settings(self, options: Mapping[str, Any], image_processor: Any) -> dict[str, Any]:
        """What an image part's options change in the settings of the image processor."""
        unknown = [name for name in options if name not in self.image_options]
        if unknown:
            raise MessageError(
                f"{', '.join(map(argument, unknown))}: Qwen's image processor has no such option."
            )
        for name, value in options.items():
            is_number = isinstance(value, int) and not isinstance(value, bool)
            if not is_number or not 1 <= value < 2**63:
                raise MessageError(
                    f"{argument(name)} must be a positive number of pixels, got {shown(value)}."
                )
        maximum, minimum = options.get("max_pixels"), options.get("min_pixels")
        if minimum is not None and maximum is not None and minimum > maximum:
            raise MessageError(f"min_pixels ({minimum}) is above max_pixels ({maximum}).")
        settings = {}
        if maximum is not None or minimum is not None:
            size = dict(image_processor.size)
            if "shortest_edge" not in size or "longest_edge" not in size:
                raise MessageError(
                    f"{argument('max_pixels')} and min_pixels have no effect: this checkpoint "
                    "scales all images to one size."
                )
            # In Qwen's image processors, the two "edges" are numbers of pixels.
            maximum = maximum or max(size["longest_edge"], minimum or 0)
            minimum = minimum or min(size["shortest_edge"], maximum)
            settings["size"] = {"shortest_edge": minimum, "longest_edge": maximum}
        return settings

    @override
    def smallest_grid(self, config: PretrainedConfig) -> tuple[int, int, int]:
        merge = config.vision_config.spatial_merge_size
        return 1, merge, merge

    @override
    def patch_values(self, config: PretrainedConfig) -> int:
        vision = config.vision_config
        return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2

    @override
    def patches_per_token(self, config: PretrainedConfig) -> int:
        return config.vision_config.spatial_merge_size**2

    @override
    def vision_head_dim(self, config: PretrainedConfig) -> int:
        return config.vision_config.embed_dim // config.vision_config.num_heads

    vision_plan = staticmethod(vision_plan)

    @override
    def reference_inputs(self, prompt: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
        inputs = super().reference_inputs(prompt, config)
        if prompt.pixel_values is not None:
            inputs |= {
                "pixel_values": np.array(prompt.pixel_values, np.float32),
                "image_grid_thw": np.array(prompt.grid_thw, np.int64),
                "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).astype(
                    np.int32
                ),
            }
        return inputs
