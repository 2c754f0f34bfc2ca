"""Decoding: generates the tokens of answers after the first, which prefill has chosen.

    prefill -> decode -> decode -> ...

Each call of `decode` updates the cache in place. All sequences of the cache advance together, each
with its own length; those whose answers have ended wait.

Like the modules of the other stages, this one has a function that is compiled, whose arguments are
a model and arrays, and a class that compiles and runs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int32

from bsjax.models import ImageTextModel
from bsjax.models.collectives import of_first_context
from bsjax.models.sharding import replicated
from bsjax.runtime.chunks import CacheLayout
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.programs import Programs, Stage
from bsjax.runtime.sampling import GREEDY, MOST_TOP_TOKENS, Chosen, Sampling, choose, stacked

MAX_END_TOKENS = 8
"""How many end-of-sequence tokens `decode` has room for. Published models have at most two."""

DECODE_CHUNK = 64
"""The most tokens of each sequence that one call of `decode` generates."""

STEPS_BEFORE_STOP = 16
"""Tokens of each answer between two looks for stop texts."""


@dataclass(frozen=True, eq=False)
class AnswerSettings:
    """How a prompt is to be answered.

    Attributes:
      new_tokens: the most tokens to generate.
      sampling: how tokens are chosen.
      stop: texts that end an answer.
      end_tokens: ids of end-of-sequence tokens, padded with -1.
      backend: attention backend, already resolved.
      top_tokens: of how many tokens, the likeliest ones, log-probabilities are wanted beside that
        of the chosen one; None for no log-probabilities.
    """

    new_tokens: int
    backend: str
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    end_tokens: Int32[np.ndarray, "end_tokens"] = field(
        default_factory=lambda: np.full(MAX_END_TOKENS, -1, np.int32)
    )
    top_tokens: int | None = None

    @property
    def steps(self) -> int:
        """The most tokens to generate before the text is looked at."""
        return STEPS_BEFORE_STOP if self.stop else DECODE_CHUNK


class DecodeState(NamedTuple):
    """What prefill passes to decode, and each call of decode to the next call.

    Attributes:
      token: int32 [sequences], the last token chosen, which is not in the cache yet.
      chosen: int32 [sequences], how many tokens have been chosen.
      occurred: bool [sequences, vocabulary], which tokens are in the prompt or have been chosen
        before the last one.
      cache: the family's cache, a pytree of arrays.
    """

    token: Any
    chosen: Any
    occurred: Any
    cache: Any

    @classmethod
    def empty(cls, module: ImageTextModel, layout: CacheLayout) -> "DecodeState":
        """Without any tokens."""
        return cls.before(module, layout, module.language_model.empty_cache(*layout))

    @classmethod
    def before(cls, module: ImageTextModel, layout: CacheLayout, cache: Any) -> "DecodeState":
        """Before any token of an answer has been chosen, with a cache."""
        vocabulary = module.language_model.embed_tokens.num_embeddings
        sequences = layout.sequences
        zeros = partial(jnp.zeros, device=replicated(module.language_model.mesh))
        return cls(
            zeros(sequences, jnp.int32),
            zeros(sequences, jnp.int32),
            zeros((sequences, vocabulary), jnp.bool_),
            cache,
        )


class Answers(NamedTuple):
    """What decoding needs to know about the answer of each sequence.

    Attributes:
      limit: int32 [sequences], the most tokens of the answer; 0 for a sequence that has none.
      prompt_tokens: int32 [sequences], how many tokens the prompt has.
      next_position: int32 [sequences], position id of the first token after the prompt.
      sampling: how tokens are chosen; each field is an array [sequences].
      end_tokens: int32, ids of end-of-sequence tokens, padded with -1.
      scored: bool, whether log-probabilities are computed.
    """

    limit: Any
    prompt_tokens: Any
    next_position: Any
    sampling: Sampling
    end_tokens: Any
    scored: Any

    @classmethod
    def of(
        cls, prompts: Sequence[ModelInputs | None], settings: Sequence[AnswerSettings]
    ) -> "Answers":
        """The answers to some prompts.

        Args:
          prompts: the prompt of each sequence; None for one without an answer.
          settings: how each is answered. They share end tokens.
        """
        limits = [each.new_tokens for each in settings]
        tokens = [0 if prompt is None else prompt.tokens for prompt in prompts]
        next_position = [0 if prompt is None else prompt.next_position for prompt in prompts]
        return cls(
            limit=np.where([prompt is None for prompt in prompts], 0, limits).astype(np.int32),
            prompt_tokens=np.asarray(tokens, np.int32),
            next_position=np.asarray(next_position, np.int32),
            sampling=stacked([each.sampling for each in settings]),
            end_tokens=settings[0].end_tokens,
            scored=np.bool_(any(each.top_tokens is not None for each in settings)),
        )


def decode(
    module: ImageTextModel,
    state: DecodeState,
    answers: Answers,
    steps: Int[Array, ""],
    ends: Int[Array, ""],
    backend: str,
) -> tuple[Chosen, DecodeState]:
    """Generates the next tokens of all answers that have not ended.

    An answer ends with an end-of-sequence token, or when it has as many tokens as it may have.

    Args:
      module: the model.
      state: the first tokens and the cache, both from prefill, or the state that the previous call
        returned. Donate it so that the cache is updated in place.
      answers: the answers.
      steps: the most tokens to generate for each, at most `DECODE_CHUNK`.
      ends: the call returns once this many answers have ended, even if others have not.
      backend: attention backend.

    Returns:
      What was chosen, each field [sequences, DECODE_CHUNK, ...], and the state for the next call.
      Of a sequence, as many entries are valid as its `state.chosen` has grown.
    """

    def active(state: DecodeState) -> Bool[Array, "sequences"]:
        is_end = jnp.any(answers.end_tokens == state.token[:, None], axis=1)
        return (state.chosen < answers.limit) & ~is_end

    began = active(state)

    def continues(carry: tuple[Chosen, Array, DecodeState]) -> Array:
        _, count, state = carry
        left = active(state)
        return (count < steps) & jnp.any(left) & (jnp.sum(began & ~left) < ends)

    def step(carry: tuple[Chosen, Array, DecodeState]) -> tuple[Chosen, Array, DecodeState]:
        tokens, count, state = carry
        advances = active(state)
        # The index of `state.token` among the tokens of the answer.
        index = state.chosen - 1
        logits, cache = module.decode_step(
            state.token,
            answers.next_position + index,
            state.cache,
            jnp.where(advances, answers.prompt_tokens + index, -1),
            backend=backend,
        )
        occurred = state.occurred.at[jnp.arange(sequences), state.token].set(True)
        chosen = choose(logits, answers.sampling, state.chosen, occurred, answers.scored)
        chosen = jax.tree.map(of_first_context, chosen)
        return (
            jax.tree.map(lambda all_, new: all_.at[:, count].set(new), tokens, chosen),
            count + 1,
            DecodeState(
                jnp.where(advances, chosen.token, state.token),
                state.chosen + advances,
                occurred,
                cache,
            ),
        )

    sequences, vocabulary = state.occurred.shape
    most = min(MOST_TOP_TOKENS, vocabulary)
    none_chosen = Chosen(
        jnp.zeros((sequences, DECODE_CHUNK), jnp.int32),
        jnp.zeros((sequences, DECODE_CHUNK)),
        jnp.zeros((sequences, DECODE_CHUNK, most), jnp.int32),
        jnp.zeros((sequences, DECODE_CHUNK, most)),
    )
    tokens, _, state = jax.lax.while_loop(continues, step, (none_chosen, jnp.int32(0), state))
    return tokens, state


class Decoding:
    """The stage that continues answers.

    Attributes:
      stages: a list of this one stage.
    """

    def __init__(
        self, programs: Programs, layout: CacheLayout, end_tokens: Any, backend: str
    ) -> None:
        """Compiles the program.

        Args:
          programs: the programs of the model.
          layout: the shape of the cache.
          end_tokens: ids of end-of-sequence tokens, padded with -1.
          backend: attention backend.
        """
        settings = AnswerSettings(1, backend, end_tokens=end_tokens)
        answers = Answers.of([None] * layout.sequences, [settings] * layout.sequences)
        state = jax.eval_shape(lambda: DecodeState.empty(programs.module, layout))
        self._decode = programs.get(
            decode,
            (state, answers, np.int32(0), np.int32(0)),
            static=(backend,),
            donate=(0,),
        )
        self.stages = [Stage("decode", self._decode)]

    def run(
        self, state: DecodeState, answers: Answers, *, steps: int = DECODE_CHUNK, ends: int = 1
    ) -> tuple[list[Chosen], DecodeState]:
        """Generates up to `steps` tokens of each answer; donates `state`.

        Returns:
          What was chosen for each sequence: NumPy arrays whose first axis is that of the tokens.
          And the next state.
        """
        old_counts = np.asarray(state.chosen)
        chosen, state = self._decode(state, answers, np.int32(steps), np.int32(ends))
        counts = np.asarray(state.chosen) - old_counts
        chosen = jax.tree.map(np.asarray, chosen)
        return [
            Chosen(*(values[sequence, :count] for values in chosen))
            for sequence, count in enumerate(counts)
        ], state
