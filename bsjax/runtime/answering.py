"""Answering a prompt: prefill chooses the first token, decoding the remaining ones.

    embedding -> prefill -> decode -> decode -> ...

Prefill overwrites the embeddings with its hidden states. The cache is allocated once, by prefill,
and updated in place by each call of decode.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from bsjax.masks.schedule import Schedule
from bsjax.models import ImageTextModel
from bsjax.runtime.embedding import Embedding
from bsjax.runtime.inputs import ModelInputs, cache_rows
from bsjax.runtime.memory import Stage
from bsjax.runtime.programs import Programs
from bsjax.runtime.sampling import GREEDY, Sampling, sample

MAX_END_TOKENS = 8
"""How many end-of-sequence tokens `decode` has room for. Published models have at most two."""

DECODE_CHUNK = 64
"""The most tokens that one call of `decode` generates."""


@dataclass(frozen=True, eq=False)
class AnswerSettings:
    """How a prompt is to be answered.

    Attributes:
      new_tokens: the most tokens to generate.
      sampling: how tokens are chosen.
      end_tokens: ids of end-of-sequence tokens, padded with -1.
      backend: attention backend, already resolved.
    """

    new_tokens: int
    backend: str
    sampling: Sampling = GREEDY
    end_tokens: Int32[np.ndarray, "end_tokens"] = field(
        default_factory=lambda: np.full(MAX_END_TOKENS, -1, np.int32)
    )


class DecodeState(NamedTuple):
    """What prefill passes to decode, and each call of decode to the next call."""

    token: Int[Array, ""]
    """The last token chosen, which is not in the cache yet."""
    chosen: Int[Array, ""]
    """How many tokens have been chosen."""
    cache: Any
    """The family's cache, a pytree of arrays."""


def prefill(
    module: ImageTextModel,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: Sequence[Schedule],
    head_category: Int[Array, "layers q_heads"],
    last_row: Int[Array, ""],
    sampling: Sampling,
    cache_length: int,
    backend: str,
) -> tuple[DecodeState, Float[Array, "rows hidden"]]:
    """Runs a prompt and chooses the first token of the answer.

    Donate `embeddings` so that the hidden states reuse their buffer.

    Returns:
      The state that `decode` starts from, and the hidden states. The caller drops the hidden
      states: they are returned so that XLA can place them in the donated buffer.
    """
    hidden, cache = module.language_model.prefill(
        embeddings,
        position_ids,
        schedules,
        head_category,
        cache_length=cache_length,
        backend=backend,
    )
    chosen = jnp.int32(0)
    token = sample(module.logits(hidden[last_row]), sampling, chosen)
    return DecodeState(token, chosen + 1, cache), hidden


def decode(
    module: ImageTextModel,
    state: DecodeState,
    limit: Int[Array, ""],
    prompt_tokens: Int[Array, ""],
    next_position: Int[Array, ""],
    end_tokens: Int[Array, "end_tokens"],
    sampling: Sampling,
    backend: str,
) -> tuple[Int[Array, "chunk"], Int[Array, ""], DecodeState]:
    """Generates `limit` tokens, or fewer if an end-of-sequence token comes first.

    Args:
      module: the model.
      state: from `prefill` or the previous call. Donate it so that the cache is updated in place.
      limit: the most tokens to generate, at most `DECODE_CHUNK`.
      prompt_tokens: how many tokens the prompt has; they are the first rows of the cache.
      next_position: position of the first token after the prompt.
      end_tokens: ids of end-of-sequence tokens, padded with -1.
      sampling: how tokens are chosen.
      backend: attention backend.

    Returns:
      The tokens, how many of them are valid, and the state for the next call.
    """

    def continues(carry: tuple[Array, Array, DecodeState]) -> Array:
        _, count, state = carry
        return (count < limit) & ~jnp.any(end_tokens == state.token)

    def step(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        tokens, count, state = carry
        # How many tokens of the answer come before `state.token`.
        before = state.chosen - 1
        logits, cache = module.decode_step(
            state.token,
            next_position + before,
            state.cache,
            prompt_tokens + before,
            backend=backend,
        )
        token = sample(logits, sampling, state.chosen)
        return (
            tokens.at[count].set(token),
            count + 1,
            DecodeState(token, state.chosen + 1, cache),
        )

    start = (jnp.zeros(DECODE_CHUNK, jnp.int32), jnp.int32(0), state)
    return jax.lax.while_loop(continues, step, start)


class Answering:
    """The stages from a prompt to its answer.

    Attributes:
      stages: all stages, in the order in which they run.
      embedding: the first stages, from token ids and pixels to embeddings.
      cache: shapes and dtypes of the cache.
    """

    def __init__(
        self,
        programs: Programs,
        inputs: ModelInputs,
        settings: AnswerSettings,
    ) -> None:
        backend = settings.backend
        self.embedding = Embedding(programs, inputs, backend)
        self._prefill_arguments = (
            inputs.position_ids,
            inputs.schedules,
            inputs.head_category,
            inputs.last_row,
            settings.sampling,
        )
        self._prefill = programs.get(
            prefill,
            (self.embedding.output, *self._prefill_arguments),
            static=(cache_rows(inputs.tokens + settings.new_tokens), backend),
            donate=(0,),
        )
        self._decode_arguments = (
            np.int32(inputs.tokens),
            np.int32(inputs.next_position),
            settings.end_tokens,
            settings.sampling,
        )
        state, _ = self._prefill.output
        self.cache = state.cache
        self._decode = programs.get(
            decode,
            (state, np.int32(0), *self._decode_arguments),
            static=(backend,),
            donate=(0,),
        )
        self.stages = [
            *self.embedding.stages,
            Stage("prefill", self._prefill),
            Stage("decode", self._decode),
        ]

    def prefill(self, embeddings: jax.Array) -> DecodeState:
        """Returns the first token and the cache; donates `embeddings`."""
        return self._prefill(embeddings, *self._prefill_arguments)[0]

    def decode(self, state: DecodeState, limit: int) -> tuple[list[int], DecodeState]:
        """Returns up to `limit` more tokens and the state for the next call; donates `state`."""
        chunk, count, state = self._decode(state, np.int32(limit), *self._decode_arguments)
        return np.asarray(chunk)[: int(count)].tolist(), state
