"""The whole of Qwen2-VL and Qwen2.5-VL (transformers: Qwen2VLForConditionalGeneration)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig

from bsjax.models.layers import Cache, LayerAttend
from bsjax.models.parameters import ties_embeddings
from bsjax.models.qwen2_vl.text import Qwen2VLTextModel
from bsjax.models.qwen2_vl.vision_plan import VisionPlan
from bsjax.schedule import Schedule


class Qwen2VLForConditionalGeneration(nnx.Module):
    """Vision tower, language model and output projection.

    Every method works on one prompt and can be jitted. Rows of `embed` and `prefill` may stand in
    any order, as long as all their arguments are in the same one.
    """

    def __init__(
        self,
        visual: nnx.Module,
        language_model: Qwen2VLTextModel,
        lm_head: nnx.Linear | None,
    ) -> None:
        self.visual = visual
        self.language_model = language_model
        # Tied to the embedding table when None.
        self.lm_head = lm_head

    @classmethod
    def from_config(
        cls, config: PretrainedConfig, dtype: Any, *, tower: Callable[..., nnx.Module]
    ) -> "Qwen2VLForConditionalGeneration":
        """The model with random parameters of `dtype`; `tower` is the family's vision transformer.

        Raises:
          CheckpointError: the config asks for something that the port does not compute.
        """
        rngs = nnx.Rngs(0)
        text = config.text_config
        lm_head = None
        if not ties_embeddings(config):
            lm_head = nnx.Linear(
                text.hidden_size, text.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
            )
        return cls(
            tower(config.vision_config, dtype, rngs), Qwen2VLTextModel(text, dtype, rngs), lm_head
        )

    def encode_images(
        self,
        pixel_values: Float[Array, "patches pixels"],
        plan: VisionPlan,
        *,
        backend: str = "auto",
    ) -> Float[Array, "merged hidden"]:
        """The tokens of some images, one image after the other.

        Args:
          pixel_values: patches as the image processor orders them, padded to the plan's rows; what
            the padding holds does not matter as long as it is finite.
          plan: from the family's `vision_plan`.
          backend: of the attention.

        Returns:
          One row per `spatial_merge_size ** 2` patches, in the dtype of the parameters.
        """
        return self.visual(pixel_values, plan, backend=backend)

    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        """Embeddings of tokens. Those of image tokens are to be replaced by image features."""
        return self.language_model.embed_tokens(token_ids)

    def prefill(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "3 tokens"],
        schedule: Schedule,
        head_category: Int[Array, "layers q_heads"],
        *,
        cache_length: int,
        backend: str = "auto",
    ) -> tuple[Float[Array, "tokens hidden"], Cache]:
        """Runs a prompt, in the order of the schedule's rows, padding rows included.

        Args:
          embeddings: from `embed`, with the features of `encode_images` at image tokens; in row
            order.
          position_ids: of each row: temporal, row and column positions.
          schedule: which keys each row sees, by head category.
          head_category: `HeadCategory` of every query head of every layer.
          cache_length: rows of the cache; 0 when nothing is going to be decoded. Rows of the prompt
            beyond it are left out, so it must be at least the number of rows that are not padding.
          backend: of the attention.

        Returns:
          Hidden states after the final norm, of all rows, and the cache, which holds row r at
          index r. No array of tokens x tokens elements exists on the way.
        """
        return self.language_model.prefill(
            embeddings,
            position_ids,
            schedule,
            head_category,
            cache_length=cache_length,
            backend=backend,
        )

    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "3 tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Runs a prompt with any attention: what profiling and training are made from.

        Args:
          embeddings: as for `prefill`; rows in any order.
          position_ids: of each row: temporal, row and column positions.
          attends: one function for each kind of layer of the family (here there is one kind), in
            the order of the family's `layer_kinds`. Each is called as
            `attend(q, k, v, scanned_of_layer)`, with rotary embedding applied to q and k, and
            returns the attention output and what to keep of the layer (any pytree).
          scanned: pytree of arrays with a leading layer axis.

        Returns:
          Hidden states after the final norm, and what was kept, stacked on a leading layer axis.
        """
        return self.language_model.run_layers(embeddings, position_ids, attends, scanned)

    @property
    def attention_scale(self) -> float:
        """Factor of the scores of the language model's attention."""
        return self.language_model.scale

    def decode_step(
        self,
        token_id: Int[Array, ""],
        position_ids: Int[Array, "3"],
        cache: Cache,
        cache_index: Int[Array, ""],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "vocabulary"], Cache]:
        """Runs one text token after those of the cache.

        Args:
          token_id: the token.
          position_ids: its three positions, all the same.
          cache: from `prefill` or the step before. Donate it when jitting: it is updated in place.
          cache_index: how many of the cache's rows are valid. The token is written after them.
          backend: of the attention.

        Returns:
          Float32 logits of the token that follows, and the cache with this token in it.
        """
        embedding = self.language_model.embed_tokens(token_id[None])
        hidden, cache = self.language_model.decode_step(
            embedding, position_ids, cache, cache_index, backend=backend
        )
        return self.logits(hidden[0]), cache

    def logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocabulary"]:
        """Float32 logits of hidden states that `prefill` returned."""
        if self.lm_head is None:
            kernel, equation = self.language_model.embed_tokens.embedding, "...h,vh->...v"
        else:
            kernel, equation = self.lm_head.kernel, "...h,hv->...v"
        return jnp.einsum(equation, hidden, kernel[...], preferred_element_type=jnp.float32)
