"""The whole Gemma 3 model (transformers: Gemma3ForConditionalGeneration, Gemma3ForCausalLM)."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float
from transformers import PretrainedConfig
from typing_extensions import override

from bsjax.models.gemma3.text import Gemma3TextModel
from bsjax.models.gemma3.vision import Gemma3MultiModalProjector, SiglipVisionModel, vision_tower
from bsjax.models.gemma3.vision_plan import VisionPlan
from bsjax.models.image_text_model import ImageTextModel, output_projection
from bsjax.models.parameters import ties_embeddings
from bsjax.models.pixels import Pixels


class Gemma3ForCausalLM(ImageTextModel):
    """Language model and output projection. Caps the logits if the config asks for it."""

    def __init__(
        self,
        language_model: Gemma3TextModel,
        lm_head: nnx.Linear | None,
        final_logit_softcapping: float | None,
    ) -> None:
        super().__init__(language_model, lm_head)
        self.final_logit_softcapping = final_logit_softcapping

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: Any) -> "Gemma3ForCausalLM":
        """The model with random parameters of `dtype`.

        Raises:
          CheckpointError: the config asks for something that the port does not support.
        """
        return cls(**text_parts(config, dtype, nnx.Rngs(0)))

    @override
    def logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocabulary"]:
        logits, cap = super().logits(hidden), self.final_logit_softcapping
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class Gemma3ForConditionalGeneration(Gemma3ForCausalLM):
    """Vision tower, projector, language model and output projection.

    Applies the config's soft cap to the logits, as transformers' Gemma3ForCausalLM does.
    transformers' Gemma3ForConditionalGeneration ignores the cap; no published config has one.
    """

    def __init__(
        self,
        vision_tower: SiglipVisionModel,
        multi_modal_projector: Gemma3MultiModalProjector,
        **text: Any,
    ) -> None:
        super().__init__(**text)
        self.vision_tower = vision_tower
        self.multi_modal_projector = multi_modal_projector

    @classmethod
    def from_config(cls, config: PretrainedConfig, dtype: Any) -> "Gemma3ForConditionalGeneration":
        """See `Gemma3ForCausalLM.from_config`."""
        rngs = nnx.Rngs(0)
        return cls(
            vision_tower(config, dtype, rngs),
            Gemma3MultiModalProjector(config, dtype, rngs),
            **text_parts(config, dtype, rngs),
        )

    @override
    def encode_images(
        self,
        pixels: Pixels | Float[Array, "patches values"],
        plan: VisionPlan,
        *,
        backend: str = "auto",
    ) -> Float[Array, "merged hidden"]:
        return self.multi_modal_projector(self.vision_tower(pixels, plan, backend=backend))


def text_parts(config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> dict[str, Any]:
    """The arguments of `Gemma3ForCausalLM`."""
    text = config.get_text_config()
    return {
        "language_model": Gemma3TextModel(text, dtype, rngs),
        "lm_head": None if ties_embeddings(config) else output_projection(text, dtype, rngs),
        "final_logit_softcapping": text.final_logit_softcapping,
    }
