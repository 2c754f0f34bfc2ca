"""Scoring a prompt: the logits of all its tokens, chunk by chunk.

The device holds the logits of one chunk at a time; those of the whole prompt are on the host only.
"""

from typing import Any

import numpy as np
from jaxtyping import Float32

from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.prefill import ChunkedRun, score
from bsjax.runtime.programs import Programs
from bsjax.runtime.reuse import NOTHING, Reuse
from bsjax.runtime.sizes import sizes_in_use

_MOST_ROWS = 1024
"""The most rows of a chunk whose logits are computed: 0.6 GB with a vocabulary of 152K tokens."""


class Scoring(ChunkedRun):
    """The stages from a prompt to the logits of its tokens.

    Attributes:
      result_bytes: size of the result, in host memory.
    """

    def __init__(
        self, programs: Programs, inputs: ModelInputs, backend: str, reuse: Reuse = NOTHING
    ) -> None:
        sizes = sizes_in_use()
        super().__init__(
            programs,
            inputs,
            score,
            backend,
            sizes=sizes._replace(chunks=tuple(of for of in sizes.chunks if of <= _MOST_ROWS)),
            new_tokens=0,
            reuse=reuse,
            all_outputs=True,
        )
        logits, _ = self.stages[-1].program.output
        self._vocabulary = logits.shape[1]
        self._start = reuse.start
        self._tokens = inputs.tokens - reuse.start
        self.result_bytes = 4 * self._tokens * self._vocabulary

    def logits(self) -> Float32[np.ndarray, "tokens vocabulary"]:
        """Logits in prompt order, on the host."""
        return self.logits_and_cache()[0]

    def logits_and_cache(
        self, cache: Any = None
    ) -> tuple[Float32[np.ndarray, "tokens vocabulary"], Any]:
        """Logits of the tokens that run, in prompt order, on the host; and the cache.

        Args:
          cache: as for `run`.
        """
        result = np.empty((self._tokens, self._vocabulary), np.float32)
        after: Any = None
        for chunk, logits, after in self.run(cache):  # noqa: B007 (the last one is returned)
            result[chunk.order - self._start] = np.asarray(logits)[: chunk.order.size]
        return result, after
