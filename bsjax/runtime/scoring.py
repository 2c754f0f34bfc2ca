"""Scoring a prompt: the logits of all its tokens, chunk by chunk.

The device holds the logits of one chunk at a time; those of the whole prompt are on the host only.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.prefill import ChunkedRun, score
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
        self, programs: Programs, prompt: PlacedPrompt, layout: CacheLayout, backend: str
    ) -> None:
        language_model = programs.module.language_model
        sizes = sizes_in_use()
        super().__init__(
            programs,
            [prompt],
            layout,
            score,
            backend,
            sizes=sizes._replace(chunks=tuple(of for of in sizes.chunks if of <= _MOST_ROWS)),
            carried=jax.eval_shape(lambda: language_model.empty_cache(*layout)),
            all_outputs=True,
        )
        logits, _ = self.stages[-1].program.output
        self._vocabulary = logits.shape[1]
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
            result[chunk.order - self._start] = np.asarray(logits)[: chunk.tokens]
        return result, after
