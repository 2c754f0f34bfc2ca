"""What the programs of a model compute: embeddings, image features, prefill, decoding, logits.

Functions of a module and arrays, without state: `bsjax.runtime.programs` compiles them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from bsjax.masks.schedule import Schedule
from bsjax.runtime.sampling import Sampling, sample

DECODE_CHUNK = 64
"""Tokens that one call of `decode` generates at most."""

LOGIT_ROWS = 1024
"""Rows that one call of `logits` computes: only the host holds tokens x vocabulary."""

PADDING_ROW = np.iinfo(np.int32).max
"""Where `encode_images` puts features of padding: beyond all rows, that is nowhere."""


class DecodeState(NamedTuple):
    """What goes from prefill to decode, and from one call of decode to the next."""

    token: Int[Array, ""]
    """The token chosen last; it is not in the cache yet."""
    chosen: Int[Array, ""]
    """How many tokens have been chosen."""
    cache: Any
    """What the family keeps of the tokens before: a pytree of arrays."""


def embed(module: Any, token_ids: Int[Array, "rows"]) -> Float[Array, "rows hidden"]:
    """Embeddings of a prompt's rows; those of image tokens are placeholders."""
    return module.embed(token_ids)


def encode_images(
    module: Any,
    embeddings: Float[Array, "rows hidden"],
    pixel_values: Float[Array, "patches pixels"],
    plan: Any,
    image_rows: Int[Array, "merged"],
    backend: str,
) -> Float[Array, "rows hidden"]:
    """Puts the features of some of a prompt's images into its embeddings.

    Donate `embeddings`: they are updated in place.

    Args:
      module: the model.
      embeddings: of all rows.
      pixel_values: patches of the images, padded.
      plan: from the family's `vision_plan`.
      image_rows: the row of each image token; `PADDING_ROW` for those of padding patches.
      backend: of the attention.
    """
    features = module.encode_images(pixel_values, plan, backend=backend)
    return embeddings.at[image_rows].set(features.astype(embeddings.dtype), mode="drop")


def prefill(
    module: Any,
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

    Returns:
      What `decode` starts from, and the hidden states: whoever donates the embeddings gives these
      a place, and the prompt one array of their size less.
    """
    hidden, cache = module.prefill(
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
    module: Any,
    state: DecodeState,
    limit: Int[Array, ""],
    prompt_tokens: Int[Array, ""],
    next_position: Int[Array, ""],
    end_tokens: Int[Array, "end_tokens"],
    sampling: Sampling,
    backend: str,
) -> tuple[Int[Array, "chunk"], Int[Array, ""], DecodeState]:
    """Generates up to `limit` tokens (at most `DECODE_CHUNK`), until an end-of-sequence token.

    Args:
      module: the model.
      state: from `prefill` or from the call before.
      limit: how many tokens to generate, if none of them ends the answer.
      prompt_tokens: tokens of the prompt, which the cache starts with.
      next_position: position of the first token after the prompt.
      end_tokens: ids that end an answer; -1 for none.
      sampling: how tokens are chosen.
      backend: of the attention.

    Returns:
      The tokens, how many of them are valid, and what the next call starts from.
    """

    def going_on(carry: tuple[Array, Array, DecodeState]) -> Array:
        _, count, state = carry
        return (count < limit) & ~jnp.any(end_tokens == state.token)

    def step(carry: tuple[Array, Array, DecodeState]) -> tuple[Array, Array, DecodeState]:
        tokens, count, state = carry
        # The token chosen last is the answer's number `chosen - 1`, counted from 0.
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
    return jax.lax.while_loop(going_on, step, start)


def hidden_states(
    module: Any,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: Sequence[Schedule],
    head_category: Int[Array, "layers q_heads"],
    backend: str,
) -> Float[Array, "rows hidden"]:
    """Hidden states of every row of a prompt. Donate the embeddings, as for `prefill`."""
    hidden, _ = module.prefill(
        embeddings, position_ids, schedules, head_category, cache_length=0, backend=backend
    )
    return hidden


def logits(
    module: Any, hidden: Float[Array, "rows hidden"], first_row: Int[Array, ""]
) -> Float32[Array, "chunk vocabulary"]:
    """Logits after `LOGIT_ROWS` rows (or all, if there are fewer) from `first_row` on.

    The last such chunk that fits is taken when `first_row` is beyond it.
    """
    chunk = min(LOGIT_ROWS, hidden.shape[0])
    return module.logits(jax.lax.dynamic_slice_in_dim(hidden, first_row, chunk))
