"""Decoding: generates the tokens of an answer after the first, which prefill has chosen.

    prefill -> decode -> decode -> ...

Each call of `decode` updates the cache in place.

Like the modules of the other stages, this one has a function that is compiled, whose arguments are
a model and arrays, and a class that compiles and runs it.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from bsjax.models import ImageTextModel
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.programs import Programs, Stage
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
      stop: texts that end an answer.
      end_tokens: ids of end-of-sequence tokens, padded with -1.
      backend: attention backend, already resolved.
    """

    new_tokens: int
    backend: str
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    end_tokens: Int32[np.ndarray, "end_tokens"] = field(
        default_factory=lambda: np.full(MAX_END_TOKENS, -1, np.int32)
    )


class DecodeState(NamedTuple):
    """What prefill passes to decode, and each call of decode to the next call."""

    token: Any
    """int32, the last token chosen, which is not in the cache yet."""
    chosen: Any
    """int32, how many tokens have been chosen."""
    occurred: Any
    """bool [vocabulary], which tokens are in the prompt or have been chosen before the last one."""
    cache: Any
    """The family's cache, a pytree of arrays."""


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
      state: the first token and the cache, both from prefill, or the state that the previous call
        returned. Donate it so that the cache is updated in place.
      limit: the most tokens to generate, at most `DECODE_CHUNK`.
      prompt_tokens: how many tokens the prompt has.
      next_position: position id of the first token after the prompt.
      end_tokens: ids of end-of-sequence tokens, padded with -1.
      sampling: how tokens are chosen.
      backend: attention backend.

    Returns:
      The tokens, int32 [DECODE_CHUNK]; how many of them are valid; the state for the next call.
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
        occurred = state.occurred.at[state.token].set(True)
        token = sample(logits, sampling, state.chosen, occurred)
        return (
            tokens.at[count].set(token),
            count + 1,
            DecodeState(token, state.chosen + 1, occurred, cache),
        )

    start = (jnp.zeros(DECODE_CHUNK, jnp.int32), jnp.int32(0), state)
    return jax.lax.while_loop(continues, step, start)


class Decoding:
    """The stage that continues an answer.

    Attributes:
      stages: a list of this one stage.
    """

    def __init__(
        self, programs: Programs, inputs: ModelInputs, cache: Any, settings: AnswerSettings
    ) -> None:
        """Compiles the program.

        Args:
          programs: the programs of the model.
          inputs: the prompt.
          cache: the cache, or its shapes and dtypes.
          settings: how the prompt is answered.
        """
        self._arguments = (
            np.int32(inputs.tokens),
            np.int32(inputs.next_position),
            settings.end_tokens,
            settings.sampling,
        )
        scalar = jax.ShapeDtypeStruct((), np.int32)
        vocabulary = programs.module.language_model.embed_tokens.num_embeddings
        occurred = jax.ShapeDtypeStruct((vocabulary,), np.bool_)
        self._decode = programs.get(
            decode,
            (DecodeState(scalar, scalar, occurred, cache), np.int32(0), *self._arguments),
            static=(settings.backend,),
            donate=(0,),
        )
        self.stages = [Stage("decode", self._decode)]

    def run(self, state: DecodeState, limit: int) -> tuple[list[int], DecodeState]:
        """Generates up to `limit` tokens. Returns them and the next state; donates `state`."""
        chunk, count, state = self._decode(state, np.int32(limit), *self._arguments)
        return np.asarray(chunk)[: int(count)].tolist(), state
