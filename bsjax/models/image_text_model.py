"""The outer model of all families: a vision tower, a language model and an output projection."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig

from bsjax.models.collectives import TENSOR, gathered
from bsjax.models.language_model import LanguageModel
from bsjax.models.pixels import Pixels


class ImageTextModel(nnx.Module):
    """A language model with its output projection. Families that read images add a vision tower.

    Attributes:
      language_model: embeds tokens and runs the layers.
      lm_head: the output projection; None if it is tied to the embedding table.
    """

    def __init__(self, language_model: LanguageModel, lm_head: nnx.Linear | None) -> None:
        self.language_model = language_model
        self.lm_head = lm_head

    def encode_images(
        self,
        pixels: Pixels | Float[Array, "patches values"],
        plan: Any,
        *,
        backend: str = "auto",
    ) -> Float[Array, "merged hidden"]:
        """Computes the features of all image tokens, one image after the other.

        Args:
          pixels: patches in the order of the family's prompts, padded to the plan's rows, in bytes
            or as transformers' image processors give them (`pixel_values`). The padding may hold
            any finite values.
          plan: from the family's `vision_plan`.
          backend: attention backend.

        Returns:
          One row per image token, in the dtype of the parameters.
        """
        raise NotImplementedError

    def decode_step(
        self,
        token_id: Int[Array, "sequences"],
        position: Int[Array, "sequences"],
        cache: Any,
        cache_index: Int[Array, "sequences"],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "sequences vocabulary"], Any]:
        """Embeds one text token of each sequence, runs them and computes the logits of the next.

        Args:
          token_id: the tokens.
          position: the tokens' positions, as in `LanguageModel.decode_step`.
          cache: from prefill or the previous step. Donate it so that it is updated in place.
          cache_index: how many tokens of each sequence the cache holds; -1 for those without one.
          backend: attention backend.

        Returns:
          Float32 logits of the next tokens, and the cache with these tokens added.
        """
        embedding = self.language_model.embed(token_id)
        hidden, cache = self.language_model.decode_step(
            embedding, position, cache, cache_index, backend=backend
        )
        return self.logits(hidden), cache

    def logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocabulary"]:
        """Float32 logits of hidden states after the final norm."""
        if self.lm_head is None:
            kernel, equation = self.language_model.embed_tokens.embedding, "...h,vh->...v"
        else:
            kernel, equation = self.lm_head.kernel, "...h,hv->...v"
        logits = jnp.einsum(equation, hidden, kernel[...], preferred_element_type=jnp.float32)
        return gathered(logits, TENSOR, axis=-1)


def output_projection(config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """The `lm_head` of a text config whose embeddings are not tied."""
    return nnx.Linear(
        config.hidden_size, config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
    )
