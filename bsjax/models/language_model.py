"""The interface of language models: what the runtime, profiling and training call."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array, Float, Int

from bsjax.masks.schedule import Schedule
from bsjax.models.layers import LayerAttend


class LanguageModel(nnx.Module):
    """Token embeddings, decoder layers and the final norm.

    All methods work on one prompt and can be jitted. Rows may be in any order, as long as all
    arguments of a call use the same order.

    Attributes:
      embed_tokens: the embedding table.
      scale: factor applied to the attention scores.
    """

    embed_tokens: nnx.Embed
    scale: float

    @abstractmethod
    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        """Embeds tokens. The caller replaces the rows of image tokens with image features."""

    @abstractmethod
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
        """Runs a prompt, padding rows included. Holds no array of tokens x tokens elements.

        Args:
          embeddings: from `embed`, with image features in the rows of image tokens; rows in the
            order of the schedules.
          position_ids: position ids of each row, from the family's `positions`.
          schedules: which keys each row sees, by head category: one schedule for each of the
            family's `visibilities`, all with the same row order.
          head_category: `HeadCategory` of every query head of every layer.
          cache_length: rows of the cache; 0 if no token will be decoded. The first `cache_length`
            rows of the prompt are kept, so it must be at least the number of rows before padding.
          backend: attention backend.

        Returns:
          Hidden states of all rows after the final norm, and the cache for `decode_step`.
        """

    @abstractmethod
    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "axes tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Runs a prompt with the caller's attention functions, for profiling and training.

        Args:
          embeddings: as for `prefill`.
          position_ids: position ids of each row, from the family's `positions`.
          attends: one function for each of the family's `visibilities`. What they keep from a layer
            must have the same structure and shapes.
          scanned: pytree of arrays with a leading layer axis; each layer's attention is given its
            slice.

        Returns:
          Hidden states after the final norm, and what was kept, stacked on a leading layer axis.
        """

    @abstractmethod
    def decode_step(
        self,
        embedding: Float[Array, "1 hidden"],
        position: Int[Array, ""],
        cache: Any,
        cache_index: Int[Array, ""],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "1 hidden"], Any]:
        """Runs one text token after the tokens in the cache.

        Args:
          embedding: the token's embedding.
          position: the token's position, the same on all position axes.
          cache: from `prefill` or the previous step. Donate it so that it is updated in place.
          cache_index: how many tokens the cache holds; this token becomes the next.
          backend: attention backend.

        Returns:
          The hidden state after the final norm, and the cache with this token added.
        """
