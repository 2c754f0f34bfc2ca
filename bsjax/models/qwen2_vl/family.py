"""The family of Qwen2-VL. Qwen2.5-VL differs from it only in the vision tower."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int, Int32, UInt8
from transformers import PretrainedConfig, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from typing_extensions import override

from bsjax.checks import argument, shown
from bsjax.errors import CheckpointError, MessageError, TemplateError
from bsjax.models.family import Family, ImageShapes
from bsjax.models.image_rows import image_starts
from bsjax.models.parameters import ParameterRule
from bsjax.models.pixels import cut_into_patches, image_size, pixel_values_of, scaled_to
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
    def check_image_settings(self, image_processor: Any, config: PretrainedConfig) -> None:
        vision = config.vision_config
        for name, of_tower in (
            ("patch_size", vision.patch_size),
            ("merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", vision.temporal_patch_size),
        ):
            of_settings = getattr(image_processor, name)
            if of_settings != of_tower:
                raise CheckpointError(
                    f"The checkpoint's image settings (preprocessor_config.json) have the {name} "
                    f"{of_settings}, but its vision tower has {of_tower}: they do not match."
                )

    @override
    def image_shapes(
        self,
        height: int,
        width: int,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
    ) -> ImageShapes:
        height, width = self._scaled_size(height, width, options, image_processor)
        size, merge = image_processor.patch_size, image_processor.merge_size
        grid = np.asarray([[1, height // size, width // size]], np.int32)
        return ImageShapes(grid, (int(grid.prod()) // merge**2,), height * width)

    @override
    def image_patches(
        self,
        image: Any,
        options: Mapping[str, Any],
        image_processor: Any,
        config: PretrainedConfig,
        places: Mapping[int, UInt8[np.ndarray, "_ values"]],
    ) -> list[UInt8[np.ndarray, "_ values"]]:
        """Scales one image to between `min_pixels` and `max_pixels`, and cuts it into patches.

        Raises:
          MessageError: an option is unknown, or the bounds are invalid or not allowed by the
            checkpoint's image settings.
        """
        size = self._scaled_size(*image_size(image), options, image_processor)
        pixels = scaled_to(
            image,
            size if image_processor.do_resize else None,
            image_processor,
            channels=self.channels(config),
            convert_rgb=image_processor.do_convert_rgb,
        )
        size, merge = image_processor.patch_size, image_processor.merge_size
        return [cut_into_patches(pixels, size, merge, places.get(0))]

    def _scaled_size(
        self, height: int, width: int, options: Mapping[str, Any], image_processor: Any
    ) -> tuple[int, int]:
        """Height and width of an image of this size, scaled."""
        size = self._bounds(options, image_processor)
        multiple = image_processor.patch_size * image_processor.merge_size
        if image_processor.do_resize:
            if not size.get("shortest_edge") or not size.get("longest_edge"):
                raise MessageError(
                    f"the checkpoint's image settings have the size {size}; bsjax computes those "
                    "with bounds (shortest_edge and longest_edge, numbers of pixels)."
                )
            return smart_resize(
                height, width, multiple, size["shortest_edge"], size["longest_edge"]
            )
        if height % multiple or width % multiple:
            raise MessageError(
                f"it has {width} x {height} pixels, and the checkpoint's image settings do not "
                f"scale images (do_resize): both sides must be multiples of {multiple}."
            )
        return height, width

    def _bounds(self, options: Mapping[str, Any], image_processor: Any) -> dict[str, int]:
        """The size in the settings of the image processor, as an image part's options change it."""
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
        size = dict(image_processor.size)
        if maximum is not None or minimum is not None:
            if "shortest_edge" not in size or "longest_edge" not in size:
                raise MessageError(
                    f"{argument('max_pixels')} and min_pixels have no effect: this checkpoint "
                    "scales all images to one size."
                )
            # In Qwen's image processors, the two "edges" are numbers of pixels.
            maximum = maximum or max(size["longest_edge"], minimum or 0)
            minimum = minimum or min(size["shortest_edge"], maximum)
            size |= {"shortest_edge": minimum, "longest_edge": maximum}
        return size

    @override
    def smallest_grid(self, config: PretrainedConfig) -> tuple[int, int, int]:
        merge = config.vision_config.spatial_merge_size
        return 1, merge, merge

    @override
    def channels(self, config: PretrainedConfig) -> int:
        return config.vision_config.in_channels

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
        if len(prompt.grid_thw):
            frames = config.vision_config.temporal_patch_size
            inputs |= {
                "pixel_values": pixel_values_of(prompt.pixels, frames=frames),
                "image_grid_thw": np.array(prompt.grid_thw, np.int64),
                "mm_token_type_ids": (inputs["input_ids"] == config.image_token_id).astype(
                    np.int32
                ),
            }
        return inputs
