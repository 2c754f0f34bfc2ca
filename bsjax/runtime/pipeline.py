"""The programs that a prompt takes one after the other, and the memory that each of them takes.

    embed -> encode images (a group) -> encode images (the next) ... -> prefill -> decode ...
                                                                     -> hidden states -> logits ...

All are compiled before any of them runs, and what the device holds at each stage is known then:
the stage's arguments, what it makes on the way and what it returns. Embeddings are one array that
every stage of images updates in place and that prefill overwrites; the cache is one array too.
"""

import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.errors import CapacityError
from bsjax.runtime import steps
from bsjax.runtime.inputs import ModelInputs, cache_rows, describe_images
from bsjax.runtime.programs import Program, Programs, size_in_bytes
from bsjax.runtime.sampling import Sampling


class Stage(NamedTuple):
    """A program in its place between others."""

    name: str
    program: Program
    beside: int = 0
    """Bytes that the device holds while it runs and that are none of its arguments."""

    @property
    def peak(self) -> int:
        """Bytes that the device holds beside the weights when this stage is at its worst."""
        return self.program.memory.total + self.beside


class Embedding:
    """From token ids and pixels to the rows that prefill starts from.

    Attributes:
      inputs: of the prompt.
      stages: in the order in which they run; image groups of one size share one.
      output: shape and dtype of the embeddings.
    """

    def __init__(self, programs: Programs, inputs: ModelInputs, backend: str) -> None:
        self.inputs = inputs
        self._embed = programs.get(steps.embed, (inputs.token_ids,))
        self.output = self._embed.output
        self._encode = [
            programs.get(
                steps.encode_images, (self.output, *group.arguments), static=(backend,), donate=(0,)
            )
            for group in inputs.image_groups
        ]
        self.stages = [Stage("embed", self._embed)]
        for index, program in enumerate(self._encode):
            # While a group runs, the pixels of the next are on their way.
            following = inputs.image_groups[index + 1 : index + 2]
            beside = sum(size_in_bytes(group.arguments[0]) for group in following)
            self.stages.append(Stage("vision", program, beside))

    def run(self) -> tuple[jax.Array, float]:
        """The embeddings, and the seconds that the vision tower took."""
        embeddings = self._embed(self.inputs.token_ids)
        start = time.perf_counter()
        for group, encode in zip(self.inputs.image_groups, self._encode, strict=True):
            pixel_values = jax.device_put(group.pixel_values())
            # Pixels of two groups at most are on the device: these, and those of the one at work.
            jax.block_until_ready(embeddings)
            embeddings = encode(embeddings, pixel_values, group.plan, group.image_rows)
        jax.block_until_ready(embeddings)
        return embeddings, time.perf_counter() - start


class Generation:
    """From a prompt to an answer.

    Attributes:
      stages: in the order in which they run.
      embedding: the first of them.
      cache: shapes and dtypes of the cache.
    """

    def __init__(
        self,
        programs: Programs,
        inputs: ModelInputs,
        *,
        new_tokens: int,
        end_tokens: Int32[np.ndarray, "end_tokens"],
        sampling: Sampling,
        backend: str,
    ) -> None:
        self.embedding = Embedding(programs, inputs, backend)
        self._prefill_arguments = (
            inputs.position_ids,
            inputs.schedules,
            inputs.head_category,
            inputs.last_row,
            sampling,
        )
        self._prefill = programs.get(
            steps.prefill,
            (self.embedding.output, *self._prefill_arguments),
            static=(cache_rows(inputs.tokens + new_tokens), backend),
            donate=(0,),
        )
        self._decode_arguments = (
            np.int32(inputs.tokens),
            np.int32(inputs.next_position),
            end_tokens,
            sampling,
        )
        state, _ = self._prefill.output
        self.cache = state.cache
        self._decode = programs.get(
            steps.decode,
            (state, np.int32(0), *self._decode_arguments),
            static=(backend,),
            donate=(0,),
        )
        self.stages = [
            *self.embedding.stages,
            Stage("prefill", self._prefill),
            Stage("decode", self._decode),
        ]

    def prefill(self, embeddings: jax.Array) -> steps.DecodeState:
        """The first token and the cache. Takes the embeddings' memory."""
        return self._prefill(embeddings, *self._prefill_arguments)[0]

    def decode(self, state: steps.DecodeState, limit: int) -> tuple[list[int], steps.DecodeState]:
        """Up to `limit` tokens more, and what the next call starts from; `state` is used up."""
        chunk, count, state = self._decode(state, np.int32(limit), *self._decode_arguments)
        return np.asarray(chunk)[: int(count)].tolist(), state


class Scoring:
    """From a prompt to the logits of all its tokens.

    Attributes:
      stages: in the order in which they run.
      result_bytes: what the result takes of the host.
    """

    def __init__(self, programs: Programs, inputs: ModelInputs, backend: str) -> None:
        self._inputs = inputs
        self._embedding = Embedding(programs, inputs, backend)
        self._arguments = (inputs.position_ids, inputs.schedules, inputs.head_category)
        self._hidden_states = programs.get(
            steps.hidden_states,
            (self._embedding.output, *self._arguments),
            static=(backend,),
            donate=(0,),
        )
        self._logits = programs.get(steps.logits, (self._hidden_states.output, np.int32(0)))
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
        """First and end of each run of rows that one call computes; together all real rows."""
        chunk = self._logits.output.shape[0]
        for first in range(0, self._inputs.tokens, chunk):
            first = min(first, rows - chunk)
            yield first, min(first + chunk, self._inputs.tokens)


def check_memory(inputs: ModelInputs, stages: list[Stage], available: int | None) -> None:
    """Refuses a prompt that cannot fit before any of its programs has run.

    Args:
      inputs: of the prompt.
      stages: that it goes through.
      available: free bytes of the device beside the weights; None where that is not known.

    Raises:
      CapacityError: says what is wanted, where, what there is, and what to change.
    """
    worst = max(stages, key=lambda stage: stage.peak)
    if available is not None and worst.peak > available:
        raise CapacityError(
            f"The prompt of {inputs.tokens} tokens ({describe_images(inputs.template)}) wants "
            f"{_gib(worst.peak)} of memory beside the weights, at its peak in {worst.name}, and "
            f"{_gib(available)} are available. {inputs.how_to_shorten}"
        )


def check_host_memory(inputs: ModelInputs, wanted: int, available: int | None) -> None:
    """Refuses to return logits that the host cannot hold.

    Raises:
      CapacityError: as `check_memory`.
    """
    if available is not None and wanted > available:
        raise CapacityError(
            f"The logits of {inputs.tokens} tokens ({describe_images(inputs.template)}) take "
            f"{_gib(wanted)} of the host's memory, and {_gib(available)} are available. "
            f"{inputs.how_to_shorten}"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
