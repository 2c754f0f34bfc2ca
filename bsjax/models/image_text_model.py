"""The outer model that all families share: what programs call, whatever stands behind it."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import Schedule
from bsjax.models.layers import LayerAttend


class ImageTextModel(nnx.Module):
    """A language model and its output projection; families add a vision tower.

    Every method works on one prompt and can be jitted. Rows of `embed` and `prefill` may stand in
    any order, as long as all their arguments are in the same one.
    """

    def __init__(self, language_model: Any, lm_head: nnx.Linear | None) -> None:
        self.language_model = language_model
        # Tied to the embedding table when None.
        self.lm_head = lm_head

    def encode_images(
        self, pixel_values: Float[Array, "patches pixels"], plan: Any, *, backend: str = "auto"
    ) -> Float[Array, "merged hidden"]:
        """The tokens of some images, one image after the other.

        Args:
          pixel_values: patches in the order of the family's prompts, padded to the plan's rows;
            what the padding holds does not matter as long as it is finite.
          plan: from the family's `vision_plan`.
          backend: of the attention.

        Returns:
          One row per image token, in the dtype of the parameters: as many patches are merged into
          a token as the family's config says.
        """
        raise NotImplementedError

    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        """Embeddings of tokens. Those of image tokens are to be replaced by image features."""
        return self.language_model.embed(token_ids)

    def prefill(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "axes tokens"],
        schedules: Sequence[Schedule],
        head_category: Int[Array, "layers q_heads"],
        *,
        cache_length: int,
        backend: str = "auto",
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Runs a prompt, in the order of the schedules' rows, padding rows included.

        Args:
          embeddings: from `embed`, with the features of `encode_images` at image tokens; in row
            order.
          position_ids: of each row, from the family's `positions`.
          schedules: which keys each row sees, by head category: one for each of the family's
            `visibilities`, all in the same row order.
          head_category: `HeadCategory` of every query head of every layer.
          cache_length: rows of the cache; 0 when nothing is going to be decoded. Rows of the prompt
            beyond it are left out, so it must be at least the number of rows that are not padding.
          backend: of the attention.

        Returns:
          Hidden states after the final norm, of all rows, and the cache, which is for `decode_step`
          to read. No array of tokens x tokens elements exists on the way.
        """
        return self.language_model.prefill(
            embeddings,
            position_ids,
            schedules,
            head_category,
            cache_length=cache_length,
            backend=backend,
        )

    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "axes tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Runs a prompt with any attention: what profiling and training are made from.

        Args:
          embeddings: as for `prefill`; rows in any order.
          position_ids: of each row, from the family's `positions`.
          attends: one function for each of the family's `visibilities`, the kinds of its layers.
            Each is called as `attend(q, k, v, scanned_of_layer)`, with rotary embedding applied to
            q and k, and returns the attention output and what to keep of the layer: a pytree, of
            the same shapes for all kinds.
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
        position: Int[Array, ""],
        cache: Any,
        cache_index: Int[Array, ""],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "vocabulary"], Any]:
        """Runs one text token after those of the cache.

        Args:
          token_id: the token.
          position: its position, on all axes that positions have.
          cache: from `prefill` or the step before. Donate it when jitting: it is updated in place.
          cache_index: how many tokens the cache holds. This one becomes the next.
          backend: of the attention.

        Returns:
          Float32 logits of the token that follows, and the cache with this token in it.
        """
        hidden, cache = self.language_model.decode_step(
            self.embed(token_id[None]), position, cache, cache_index, backend=backend
        )
        return self.logits(hidden[0]), cache

    def logits(self, hidden: Float[Array, "*rows hidden"]) -> Float[Array, "*rows vocabulary"]:
        """Float32 logits of hidden states that `prefill` returned."""
        if self.lm_head is None:
            kernel, equation = self.language_model.embed_tokens.embedding, "...h,vh->...v"
        else:
            kernel, equation = self.lm_head.kernel, "...h,hv->...v"
        return jnp.einsum(equation, hidden, kernel[...], preferred_element_type=jnp.float32)


def output_projection(config: Any, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    """The `lm_head` of a text config whose embeddings are not tied."""
    return nnx.Linear(
        config.hidden_size, config.vocab_size, use_bias=False, param_dtype=dtype, rngs=rngs
    )
