"""Scoring a prompt: the logits of all its tokens.

    embedding -> hidden states -> logits (first rows) -> logits (next rows) -> ...

Logits are computed `LOGIT_ROWS` rows at a time, so that only the host holds tokens x vocabulary.
"""

from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from bsjax.masks.schedule import Schedule
from bsjax.models import ImageTextModel
from bsjax.runtime.embedding import Embedding
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.memory import Stage
from bsjax.runtime.programs import Programs

LOGIT_ROWS = 1024
"""How many rows one call of `logits` computes."""


def hidden_states(
    module: ImageTextModel,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: Sequence[Schedule],
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> Float[Array, "rows hidden"]:
    """Hidden states of all rows of a prompt.

    Donate `embeddings` so that the hidden states reuse their buffer.
    """
    hidden, _ = module.language_model.prefill(
        embeddings, position_ids, schedules, head_category, cache_length=0, backend=backend
    )
    return hidden


def logits(
    module: ImageTextModel, hidden: Float[Array, "rows hidden"], first_row: Int[Array, ""]
) -> Float32[Array, "chunk vocabulary"]:
    """Logits of `LOGIT_ROWS` rows from `first_row` on, or of all rows if there are fewer.

    If fewer than `LOGIT_ROWS` rows follow `first_row`, the last `LOGIT_ROWS` rows are used.
    """
    chunk = min(LOGIT_ROWS, hidden.shape[0])
    return module.logits(jax.lax.dynamic_slice_in_dim(hidden, first_row, chunk))


class Scoring:
    """The stages from a prompt to the logits of its tokens.

    Attributes:
      stages: all stages, in the order in which they run.
      result_bytes: size of the result, in host memory.
    """

    def __init__(self, programs: Programs, inputs: ModelInputs, backend: str) -> None:
        self._inputs = inputs
        self._embedding = Embedding(programs, inputs, backend)
        self._arguments = (inputs.position_ids, inputs.schedules, inputs.head_category)
        self._hidden_states = programs.get(
            hidden_states,
            (self._embedding.output, *self._arguments),
            static=(backend,),
            donate=(0,),
        )
        self._logits = programs.get(logits, (self._hidden_states.output, np.int32(0)))
        self._vocabulary = self._logits.output.shape[1]
        self.result_bytes = 4 * inputs.tokens * self._vocabulary
        self.stages = [
            *self._embedding.stages,
            Stage("prefill", self._hidden_states),
            Stage("logits", self._logits),
        ]

    def run(self) -> Float32[np.ndarray, "tokens vocabulary"]:
        """Logits in prompt order, on the host."""
        embeddings, _ = self._embedding.run()
        hidden = self._hidden_states(embeddings, *self._arguments)
        tokens, order = self._inputs.tokens, self._inputs.order
        result = np.empty((tokens, self._vocabulary), np.float32)
        for first, end in self._chunks(hidden.shape[0]):
            of_rows = np.asarray(self._logits(hidden, np.int32(first)))
            result[order[first:end]] = of_rows[: end - first]
        return result

    def _chunks(self, rows: int) -> Iterator[tuple[int, int]]:
        """First and end row of each call of `logits`; together they cover all rows but padding."""
        chunk = self._logits.output.shape[0]
        for first in range(0, self._inputs.tokens, chunk):
            first = min(first, rows - chunk)
            yield first, min(first + chunk, self._inputs.tokens)
