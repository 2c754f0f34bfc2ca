"""Prefill: a prompt runs chunk by chunk over one cache, and the last chunk gives the first token.

    images of the chunk -> chunk -> images of the next chunk -> next chunk -> ...

The cache is allocated once, and each chunk updates it in place. Image features are kept, until
their chunk runs, in an array with room for those of a chunk and those of a group of images. When
its rows are used up, image tokens start again from the first row.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from bsjax.models import ImageTextModel
from bsjax.models.cache import PADDING_ROW
from bsjax.runtime.chunks import Chunk, ChunkArguments, Chunks
from bsjax.runtime.images import ImageEncoder
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.programs import Program, Programs, Stage, size_in_bytes
from bsjax.runtime.reuse import NOTHING, Reuse
from bsjax.runtime.sampling import Sampling, sample
from bsjax.runtime.sizes import Sizes, most_parts, sizes_in_use


def prefill(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    sampling: Sampling,
    occurred: Bool[Array, "vocabulary"],
    backend: str,
) -> tuple[Int[Array, ""], Any]:
    """Runs a chunk and chooses the token that follows it.

    Args:
      module: the model.
      cache: empty, or from the previous chunk. Donate it so that it is updated in place.
      features: features of images, in the rows that `chunk.feature_row` names; None if the model
        reads no images.
      chunk: the chunk, with the row of its last token as `outputs`.
      head_category: `HeadCategory` of every query head of every layer.
      sampling: how the token is chosen.
      occurred: which tokens are in the prompt.
      backend: attention backend.

    Returns:
      The token, int32, and the cache with the chunk. Only the token that the prompt's last chunk
      returns means anything.
    """
    hidden, cache = _run_chunk(module, cache, features, chunk, head_category, backend)
    return sample(module.logits(hidden[0]), sampling, jnp.int32(0), occurred), cache


def all_logits(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> tuple[Float32[Array, "rows vocabulary"], Any]:
    """Runs a chunk for the logits of all its rows. The arguments are those of `prefill`.

    Returns:
      The logits of each row, padding included, and the cache with the chunk.
    """
    hidden, cache = _run_chunk(module, cache, features, chunk, head_category, backend)
    return module.logits(hidden), cache


SCORED_ROWS = 128
"""Rows whose logits `log_probabilities` holds at a time: 78 MB with a vocabulary of 152K tokens."""


class ScoredRows(NamedTuple):
    """The rows of a chunk whose next tokens are scored, padded to a multiple of `SCORED_ROWS`."""

    count: Any
    """int32, how many there are."""
    rows: Any
    """int32 [scored], the rows."""
    next_token_ids: Any
    """int32 [scored], the token that follows each of them in the prompt."""


def log_probabilities(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    scored: ScoredRows,
    backend: str,
) -> tuple[tuple[Float32[Array, "scored"], Bool[Array, "scored"]], Any]:
    """Runs a chunk for the log-probabilities of the tokens that follow some of its rows.

    The arguments are those of `prefill`, without the chunk's `outputs`.

    Returns:
      For each of the scored rows, the log-probability of its next token and whether that is the
      likeliest one; and the cache with the chunk.
    """
    hidden, cache = _run_chunk(module, cache, features, chunk, head_category, backend)

    def of_some(index: Array, results: tuple[Array, Array]) -> tuple[Array, Array]:
        first = index * SCORED_ROWS
        rows = jax.lax.dynamic_slice(scored.rows, (first,), (SCORED_ROWS,))
        token_ids = jax.lax.dynamic_slice(scored.next_token_ids, (first,), (SCORED_ROWS,))
        logits = module.logits(hidden[rows])
        chosen = jnp.take_along_axis(logits, token_ids[:, None], axis=1)[:, 0]
        scores = chosen - jax.nn.logsumexp(logits, axis=1)
        # As `sample` chooses it: of equally likely tokens, the first.
        likeliest = jnp.argmax(logits, axis=1) == token_ids
        return (
            jax.lax.dynamic_update_slice(results[0], scores, (first,)),
            jax.lax.dynamic_update_slice(results[1], likeliest, (first,)),
        )

    # Logits are computed only for the rows that are scored, which most chunks have none of.
    groups = (scored.count + (SCORED_ROWS - 1)) // SCORED_ROWS
    size = scored.rows.shape
    nothing = jnp.zeros(size, jnp.float32), jnp.zeros(size, bool)
    return jax.lax.fori_loop(jnp.int32(0), groups, of_some, nothing), cache


def _run_chunk(
    module: ImageTextModel,
    cache: Any,
    features: Float[Array, "features hidden"] | None,
    chunk: ChunkArguments,
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> tuple[Float[Array, "outputs hidden"], Any]:
    """Embeds the rows of a chunk and runs the layers."""
    embeddings = module.language_model.embed(chunk.token_ids)
    if features is not None:
        is_image = (chunk.feature_row != PADDING_ROW)[:, None]
        of_images = features.at[chunk.feature_row].get(mode="clip")
        embeddings = jnp.where(is_image, of_images, embeddings)
    return module.language_model.prefill(
        embeddings,
        chunk.position_ids,
        chunk.cached_rows,
        head_category,
        cache,
        only=chunk.outputs,
        backend=backend,
    )


class ChunkedRun:
    """Runs a prompt chunk by chunk: what answering and scoring have in common.

    Attributes:
      chunks: the chunks of the prompt.
      cache: shapes and dtypes of the cache.
      stages: all stages: one for each size of image group, and one for each size of chunk.
      vision_seconds: time in the vision tower so far.
      seconds: time in the language model so far, including the time to build chunks, except those
        that were built to compile programs.
    """

    def __init__(
        self,
        programs: Programs,
        inputs: ModelInputs,
        step: Callable[..., Any],
        backend: str,
        *,
        sizes: Sizes,
        new_tokens: int,
        reuse: Reuse = NOTHING,
        all_outputs: bool = False,
        more_arguments: tuple[Any, ...] = (),
    ) -> None:
        """Compiles the programs that are needed.

        Args:
          programs: the programs of the model.
          inputs: the prompt.
          step: the function that runs a chunk: `prefill`, `all_logits` or `log_probabilities`.
          backend: attention backend.
          sizes: sizes of chunks.
          new_tokens: how many tokens may follow the prompt.
          reuse: which tokens are in the cache already.
          all_outputs: whether `step` needs the hidden states of all rows, not only that of the
            prompt's last token.
          more_arguments: arguments of `step` after the head categories.
        """
        self._programs, self._step, self._backend = programs, step, backend
        self._more_arguments = more_arguments
        language_model = programs.module.language_model
        stacked_heads = inputs.head_category.shape[1] // language_model.kv_heads
        self.chunks = Chunks(
            inputs,
            sizes,
            stacked_heads,
            new_tokens,
            reuse=reuse,
            most_parts=most_parts(backend, language_model.dtype),
            all_outputs=all_outputs,
        )
        self.cache = jax.eval_shape(partial(language_model.empty_cache, self.chunks.cache_rows))
        self._features: jax.ShapeDtypeStruct | None = None
        if inputs.group_tokens:
            shape = (self.chunks.feature_rows, language_model.embed_tokens.features)
            self._features = jax.ShapeDtypeStruct(shape, language_model.dtype)
        self._images = ImageEncoder(
            programs,
            inputs.image_groups,
            self._features,
            self.chunks.feature_row,
            backend,
            other_bytes=size_in_bytes(self.cache),
        )
        # Programs are compiled for the shapes of one chunk of each size. `_build` uses it again.
        of_size = {rows: (start, end, rows) for start, end, rows in self.chunks.borders}
        began = time.perf_counter()
        self._built = {borders[0]: self.chunks.chunk(*borders) for borders in of_size.values()}
        self.vision_seconds = 0.0
        self.seconds = time.perf_counter() - began
        self.stages = [
            *self._images.stages,
            *(Stage("prefill", self.program_of(chunk)) for chunk in self._built.values()),
        ]

    def run(self, cache: Any = None) -> Iterator[tuple[Chunk, Any, Any]]:
        """Runs one chunk after the other. Yields each chunk, its result and the cache.

        The next chunk overwrites the cache.

        Args:
          cache: the cache that holds the tokens before the first chunk; None for an empty one. It
            is donated.
        """
        features = None
        if self._features is not None:
            features = jnp.zeros(self._features.shape, self._features.dtype)
        if cache is None:
            cache = jax.tree.map(lambda of: jnp.zeros(of.shape, of.dtype), self.cache)
        groups = self.chunks.inputs.image_groups
        began = time.perf_counter()
        chunks = self._build()
        chunk = next(chunks, None)
        self.seconds += time.perf_counter() - began
        while chunk is not None:
            if features is not None:
                began = time.perf_counter()
                ready = next(
                    (i for i, group in enumerate(groups) if group.first >= chunk.images_end),
                    len(groups),
                )
                features = self._images.encode(features, groups[:ready])
                groups = groups[ready:]
                jax.block_until_ready(features)
                self.vision_seconds += time.perf_counter() - began
            began = time.perf_counter()
            program = self.program_of(chunk)
            result, cache = program(*self._all_arguments(chunk, cache, features))
            # The device runs this chunk meanwhile.
            following = next(chunks, None)
            jax.block_until_ready(result)
            self.seconds += time.perf_counter() - began
            yield chunk, result, cache
            chunk = following

    def _build(self) -> Iterator[Chunk]:
        for start, end, rows in self.chunks.borders:
            yield self._built.pop(start, None) or self.chunks.chunk(start, end, rows)

    def program_of(self, chunk: Chunk) -> Program:
        """The program that runs a chunk: the same for all chunks of one size."""
        return self._programs.get(
            self._step,
            self._all_arguments(chunk, self.cache, self._features),
            static=(self._backend,),
            donate=(0,),
        )

    def _all_arguments(self, chunk: Chunk, cache: Any, features: Any) -> tuple[Any, ...]:
        categories = self.chunks.inputs.head_category
        return (cache, features, chunk.arguments, categories, *self._more_arguments)


def occurring_tokens(module: ImageTextModel, inputs: ModelInputs) -> Bool[np.ndarray, "vocabulary"]:
    """Which tokens are in a prompt."""
    vocabulary = module.language_model.embed_tokens.num_embeddings
    occurred = np.zeros(vocabulary, bool)
    # The image token needs no embedding, and may be beyond the vocabulary.
    occurred[inputs.token_ids[inputs.token_ids < vocabulary]] = True
    return occurred


class Prefill(ChunkedRun):
    """The stages from a prompt to the first token of its answer."""

    def __init__(
        self,
        programs: Programs,
        inputs: ModelInputs,
        *,
        new_tokens: int,
        sampling: Sampling,
        backend: str,
        reuse: Reuse = NOTHING,
    ) -> None:
        """Compiles the programs that are needed.

        Args:
          programs: the programs of the model.
          inputs: the prompt.
          new_tokens: how many tokens may follow the prompt.
          reuse: which tokens are in the cache already.
          sampling: how the first token is chosen.
          backend: attention backend.
        """
        super().__init__(
            programs,
            inputs,
            prefill,
            backend,
            sizes=sizes_in_use(),
            new_tokens=new_tokens,
            reuse=reuse,
            more_arguments=(sampling, occurring_tokens(programs.module, inputs)),
        )

    def first_token(self, cache: Any = None) -> tuple[jax.Array, Any]:
        """Runs all chunks; returns the first token of the answer, int32, and the cache.

        Args:
          cache: as for `run`.
        """
        *_, (_, token, cache) = self.run(cache)
        return token, cache
