"""Scoring a prompt, chunk by chunk: the logits of all its tokens, or how likely its answer is.

The device holds the logits of one chunk at a time; those of the whole prompt are on the host only.
For the log-probabilities of an answer, no logits leave the device.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int
from typing_extensions import override

from bsjax.runtime.chunks import CacheLayout, Chunk, PlacedPrompt
from bsjax.runtime.image_cache import ImageCache
from bsjax.runtime.prefill import (
    SCORED_ROWS,
    ChunkedRun,
    ScoredRows,
    all_logits,
    log_probabilities,
)
from bsjax.runtime.processes import fetched
from bsjax.runtime.programs import Programs
from bsjax.runtime.sizes import sizes_in_use

_MOST_ROWS = 1024
"""The most rows of a chunk whose logits are computed: 0.6 GB with a vocabulary of 152K tokens."""


class Scoring(ChunkedRun):
    """The stages from a prompt to the logits of its tokens.

    Attributes:
      result_bytes: size of the result, in host memory.
    """

    def __init__(
        self,
        programs: Programs,
        prompt: PlacedPrompt,
        layout: CacheLayout,
        backend: str,
        image_cache: ImageCache | None = None,
    ) -> None:
        language_model = programs.module.language_model
        sizes = sizes_in_use()
        super().__init__(
            programs,
            [prompt],
            layout,
            all_logits,
            backend,
            sizes=sizes._replace(chunks=tuple(rows for rows in sizes.chunks if rows <= _MOST_ROWS)),
            carried=jax.eval_shape(lambda: language_model.empty_cache(*layout)),
            image_cache=image_cache,
            all_outputs=True,
        )
        self._vocabulary = language_model.embed_tokens.num_embeddings
        self._start = prompt.reuse.start
        self._tokens = prompt.end - prompt.reuse.start
        self.result_bytes = 4 * self._tokens * self._vocabulary

    def logits(self, cache: Any) -> tuple[Float32[np.ndarray, "tokens vocabulary"], Any]:
        """Logits of the tokens that run, in prompt order, on the host; and the cache.

        Args:
          cache: as for `run`.
        """
        result = np.empty((self._tokens, self._vocabulary), np.float32)
        after = cache
        for chunk, logits, after in self.run(cache):  # noqa: B007 (the last one is returned)
            of_devices = fetched(logits.stacked)
            positions = chunk.position.reshape(of_devices.shape[:2])
            for position, of_device in zip(positions, of_devices, strict=True):
                tokens = np.count_nonzero(position >= 0)
                result[position[:tokens] - self._start] = of_device[:tokens]
        return result, after


class AnswerScoring(ChunkedRun):
    """The stages from a prompt that ends with an answer to how likely each token of the answer is.

    Args:
      programs: the programs of the model.
      prompt: the prompt, with the answer. The token before the answer has to run.
      first: position of the answer's first token.
      layout: the shape of the cache.
      backend: attention backend.
      image_cache: as for `ChunkedRun`.
    """

    def __init__(
        self,
        programs: Programs,
        prompt: PlacedPrompt,
        first: int,
        layout: CacheLayout,
        backend: str,
        image_cache: ImageCache | None = None,
    ) -> None:
        self._first, self._prompt = first, prompt
        language_model = programs.module.language_model
        super().__init__(
            programs,
            [prompt],
            layout,
            log_probabilities,
            backend,
            sizes=sizes_in_use(),
            carried=jax.eval_shape(lambda: language_model.empty_cache(*layout)),
            image_cache=image_cache,
            all_outputs=True,
        )

    def scores(
        self, cache: Any
    ) -> tuple[Float32[np.ndarray, "answer"], Bool[np.ndarray, "answer"], Any]:
        """The log-probability of each token of the answer, whether it is the likeliest; the cache.

        Args:
          cache: as for `run`.
        """
        tokens = self._prompt.end - self._first
        scores, likeliest = np.empty(tokens, np.float32), np.empty(tokens, bool)
        after = cache
        for chunk, results, after in self.run(cache):  # noqa: B007 (the last one is returned)
            before = chunk.position[self._scored_rows(chunk)]
            for into, values in zip((scores, likeliest), results, strict=True):
                into[before + 1 - self._first] = np.asarray(values)[: before.size]
        return scores, likeliest, after

    def _scored_rows(self, chunk: Chunk) -> Int[np.ndarray, "scored"]:
        """The rows of a chunk that a token of the answer follows."""
        last = self._prompt.end - 1
        return np.flatnonzero((chunk.position >= self._first - 1) & (chunk.position < last))

    @override
    def more_arguments(self, chunk: Chunk) -> tuple[ScoredRows]:
        rows = self._scored_rows(chunk)
        padded = np.zeros((2, -(-chunk.position.size // SCORED_ROWS) * SCORED_ROWS), np.int32)
        padded[:, : rows.size] = rows, self._prompt.inputs.token_ids[chunk.position[rows] + 1]
        return (ScoredRows(np.int32(rows.size), *padded),)
