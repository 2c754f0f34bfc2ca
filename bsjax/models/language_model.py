"""The interface of language models: what the runtime, profiling and training call."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from bsjax.models.cache import CachedRows, OutputRows
from bsjax.models.layers import LayerAttend
from bsjax.models.sharding import mesh_of


class LanguageModel(nnx.Module):
    """Token embeddings, decoder layers and the final norm.

    All methods can be jitted. Rows may be in any order, as long as all arguments of a call use the
    same order.

    Attributes:
      embed_tokens: the embedding table.
      kv_heads: how many key heads a layer has.
      head_dim: channels of a head.
      dtype: dtype of the parameters, the hidden states and the cache.
      scale: factor applied to the attention scores.
    """

    embed_tokens: nnx.Embed
    kv_heads: int
    head_dim: int
    dtype: Any
    scale: float

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the model is on; None for one."""
        return mesh_of(self.embed_tokens.embedding.get_value())

    @abstractmethod
    def embed(self, token_ids: Int[Array, "tokens"]) -> Float[Array, "tokens hidden"]:
        """Embeds tokens. The caller replaces the rows of image tokens with image features."""

    @abstractmethod
    def empty_cache(self, rows: int, sequences: int = 1) -> Any:
        """A cache for sequences of `rows` tokens each: a pytree of arrays, with one `Cache` or None
        for each kind of layers (the family's `visibilities`).
        """

    @abstractmethod
    def moved(self, cache: Any, rows: Int[Array, "rows"]) -> Any:
        """The cache with the rows of layers that keep all tokens taken from other rows.

        Args:
          cache: from `prefill` or `decode_step`. Donate it.
          rows: int32, the row to take for each row.
        """

    def rings(self, cache: Any) -> Any:
        """The part of a cache that keeps the last tokens only, of layers with a window: a pytree.

        None if no layer has a window.
        """
        del cache
        return None

    def with_rings(self, cache: Any, rings: Any) -> Any:
        """The cache with its `rings` replaced."""
        del rings
        return cache

    @abstractmethod
    def copied(
        self, cache: Any, source: Int[Array, ""], target: Int[Array, ""], sequences: int
    ) -> Any:
        """The cache with one of its `sequences` sequences copied over another one.

        Args:
          cache: from `prefill` or `decode_step`. Donate it.
          source: int32, index of the sequence to copy.
          target: int32, index of the sequence that is replaced.
          sequences: how many sequences the cache has.
        """

    @abstractmethod
    def prefill(
        self,
        embeddings: Float[Array, "rows hidden"],
        position_ids: Int[Array, "axes rows"],
        cached_rows: Sequence[CachedRows],
        head_category: Int[Array, "layers q_heads"],
        cache: Any,
        *,
        only: OutputRows | None = None,
        backend: str = "auto",
    ) -> tuple[Float[Array, "outputs hidden"], Any]:
        """Runs a chunk of a prompt, or of several, after the chunks before it.

        Args:
          embeddings: from `embed`, with image features in the rows of image tokens.
          position_ids: position ids of each row, from the family's `positions`.
          cached_rows: for each kind of layers, where the keys of the chunk and of the chunks before
            it are in the cache.
          head_category: `HeadCategory` of every query head of every layer.
          cache: from `empty_cache` or the previous chunk. Donate it so that it is updated in place.
          only: the rows whose hidden states are needed; None for all rows of the chunk.
          backend: attention backend.

        Returns:
          Hidden states after the final norm, of the rows `only` or of all rows, and the cache with
          the keys and values of all rows of the chunk.
        """

    @abstractmethod
    def run_layers(
        self,
        embeddings: Float[Array, "tokens hidden"],
        position_ids: Int[Array, "axes tokens"],
        attends: Sequence[LayerAttend],
        scanned: Any,
    ) -> tuple[Float[Array, "tokens hidden"], Any]:
        """Runs a whole prompt with the caller's attention functions, for profiling and training.

        Args:
          embeddings: embeddings of all tokens, as for `prefill`.
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
        embedding: Float[Array, "sequences hidden"],
        position: Int[Array, "sequences"],
        cache: Any,
        cache_index: Int[Array, "sequences"],
        *,
        backend: str = "auto",
    ) -> tuple[Float[Array, "sequences hidden"], Any]:
        """Runs one text token of each sequence after its tokens in the cache.

        Args:
          embedding: the tokens' embeddings.
          position: the tokens' position ids, the same on all axes.
          cache: from `prefill` or the previous step. Donate it so that it is updated in place.
          cache_index: how many tokens of each sequence come before this one. It is also the row of
            the sequence that this token takes, except in layers with a window. Of several
            sequences, those with -1 have no token: the cache keeps their rows, and their hidden
            states mean nothing.
          backend: attention backend.

        Returns:
          The hidden states after the final norm, and the cache with these tokens added.
        """
