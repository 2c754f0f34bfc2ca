"""The whole model of Qwen2-VL and Qwen2.5-VL (transformers: Qwen2VLForConditionalGeneration)."""

from collections.abc import Callable
from typing import Any

from flax import nnx
from jaxtyping import Array, Float
from transformers import PretrainedConfig
from typing_extensions import override

from bsjax.models.image_text_model import ImageTextModel, output_projection
from bsjax.models.parameters import ties_embeddings
from bsjax.models.pixels import Pixels
from bsjax.models.qwen2_vl.text import Qwen2VLTextModel
from bsjax.models.qwen2_vl.vision_plan import VisionPlan


class Qwen2VLForConditionalGeneration(ImageTextModel):
    """Vision tower, language model and output projection."""

    def __init__(
        self,
        visual: nnx.Module,
        language_model: Qwen2VLTextModel,
        lm_head: nnx.Linear | None,
    ) -> None:
        super().__init__(language_model, lm_head)
        self.visual = visual

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, dtype: Any, *, tower: Callable[..., nnx.Module]
    ) -> "Qwen2VLForConditionalGeneration":
        """The model with random parameters of `dtype`; `tower` is the family's vision transformer.

        Raises:
          CheckpointError: the config asks for something that the port does not support.
        """
        rngs = nnx.Rngs(0)
        text = config.text_config
        lm_head = None if ties_embeddings(config) else output_projection(text, dtype, rngs)
        return cls(
            tower(config.vision_config, dtype, rngs), Qwen2VLTextModel(text, dtype, rngs), lm_head
        )

    @override
    def encode_images(
        self,
        pixels: Pixels | Float[Array, "patches values"],
        plan: VisionPlan,
        *,
        backend: str = "auto",
    ) -> Float[Array, "merged hidden"]:
        return self.visual(pixels, plan, backend=backend)
