"""Chooses the next token: the likeliest, or drawn with temperature, top-k, top-p and min-p."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bsjax.checks import argument, as_number, shown, whole_number
from bsjax.errors import GenerationError

_GREATEST = float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).tiny)


class Sampling(NamedTuple):
    """How tokens are chosen. Programs get it as data, so changing it needs no compilation."""

    temperature: Any
    """float32; 0 chooses the likeliest token."""
    top_k: Any
    """int32; draws only from the k likeliest tokens, 0 from all."""
    top_p: Any
    """float32; draws only from the likeliest tokens that together reach this probability."""
    seed: Any
    """uint32; seed of the draws."""
    min_p: Any
    """float32; draws only from tokens of at least this share of the likeliest one's probability."""
    repetition_penalty: Any
    """float32; divides positive logits of tokens that occurred, and multiplies negative ones."""

    @classmethod
    def checked(
        cls,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        *,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
    ) -> "Sampling":
        """Checks a user's arguments; see `bsjax.generate`.

        Raises:
          GenerationError: an argument is out of range.
        """
        # NaN fails both comparisons.
        if not 0.0 <= as_number(temperature) <= _GREATEST:
            raise GenerationError(
                f"{argument('temperature')} must be a number, 0 (greedy) or above, got "
                f"{shown(temperature)}."
            )
        if top_p is not None and not 0.0 < as_number(top_p) <= 1.0:
            raise GenerationError(
                f"{argument('top_p')} must be a number above 0 and at most 1, or None, got "
                f"{shown(top_p)}."
            )
        if min_p is not None and not 0.0 <= as_number(min_p) <= 1.0:
            raise GenerationError(
                f"{argument('min_p')} must be a number from 0 to 1, or None, got {shown(min_p)}."
            )
        if repetition_penalty is not None and not (
            _LEAST <= as_number(repetition_penalty) <= _GREATEST
        ):
            raise GenerationError(
                f"{argument('repetition_penalty')} must be a number above 0, or None, got "
                f"{shown(repetition_penalty)}."
            )
        seed = whole_number("seed", seed, least=0, most=2**32 - 1, error=GenerationError)
        if top_k is not None:
            top_k = whole_number("top_k", top_k, least=1, error=GenerationError)
        return cls(
            np.float32(temperature),
            # No vocabulary has more tokens: more than that keeps all of them.
            np.int32(min(top_k or 0, np.iinfo(np.int32).max)),
            np.float32(1.0 if top_p is None else top_p),
            np.uint32(seed),
            np.float32(0.0 if min_p is None else min_p),
            np.float32(1.0 if repetition_penalty is None else repetition_penalty),
        )


def stacked(samplings: Sequence[Sampling]) -> Sampling:
    """Several ways to choose tokens, one for each sequence: every field is an array."""
    return Sampling(*(np.stack(field) for field in zip(*samplings, strict=True)))


GREEDY = Sampling.checked(temperature=0.0, top_k=None, top_p=None, seed=0)
"""Always chooses the likeliest token."""


MOST_TOP_TOKENS = 20
"""The most tokens whose log-probabilities are returned in addition to the chosen one's."""


class Chosen(NamedTuple):
    """A token for each sequence, chosen from its logits.

    Log-probabilities are those of the model: before the repetition penalty, the temperature and all
    filters. They are zeros if nobody asked for them.

    Attributes:
      token: int32 [sequences].
      log_probability: float32 [sequences].
      top_tokens: int32 [sequences, `MOST_TOP_TOKENS`], the likeliest tokens, likeliest first.
      top_log_probabilities: float32 [sequences, `MOST_TOP_TOKENS`].
    """

    token: Any
    log_probability: Any
    top_tokens: Any
    top_log_probabilities: Any


def choose(
    logits: Float[Array, "sequences vocabulary"],
    sampling: Sampling,
    step: Int[Array, "sequences"],
    occurred: Bool[Array, "sequences vocabulary"],
    scored: Bool[Array, ""],
) -> Chosen:
    """Chooses the next token of each sequence.

    Args:
      logits: float32.
      sampling: how to choose; each field is an array [sequences].
      step: how many tokens have been chosen so far. Draws depend only on the seed and on this.
      occurred: which tokens are in the prompt or have been chosen.
      scored: whether log-probabilities are computed.
    """
    penalized_logits = jax.vmap(penalized)(logits, sampling, occurred)

    def greedy() -> Array:
        return jnp.argmax(penalized_logits, axis=-1).astype(jnp.int32)

    def drawn() -> Array:
        tokens = jax.vmap(_drawn)(penalized_logits, sampling, step)
        return jnp.where(sampling.temperature > 0, tokens, greedy())

    token = jax.lax.cond(jnp.any(sampling.temperature > 0), drawn, greedy)
    most = min(MOST_TOP_TOKENS, logits.shape[1])

    def scores() -> tuple[Array, Array, Array]:
        log_probabilities = jax.nn.log_softmax(logits)
        top, top_tokens = jax.lax.top_k(log_probabilities, most)
        of_token = jnp.take_along_axis(log_probabilities, token[:, None], axis=-1)[:, 0]
        return of_token, top_tokens.astype(jnp.int32), top

    def no_scores() -> tuple[Array, Array, Array]:
        shape, dtype = (logits.shape[0], most), logits.dtype
        return jnp.zeros(shape[:1], dtype), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, dtype)

    return Chosen(token, *jax.lax.cond(scored, scores, no_scores))


def _drawn(
    logits: Float[Array, "vocabulary"], sampling: Sampling, step: Int[Array, ""]
) -> Int[Array, ""]:
    tokens, scores = filtered(logits, sampling)
    key = jax.random.fold_in(jax.random.key(sampling.seed), step)
    return tokens[jax.random.categorical(key, scores)].astype(jnp.int32)


def penalized(
    logits: Float[Array, "vocabulary"], sampling: Sampling, occurred: Bool[Array, "vocabulary"]
) -> Float[Array, "vocabulary"]:
    """Logits after the repetition penalty (transformers: RepetitionPenaltyLogitsProcessor)."""
    penalty = sampling.repetition_penalty
    return jnp.where(occurred, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(
    logits: Float[Array, "vocabulary"], sampling: Sampling
) -> tuple[Int[Array, "vocabulary"], Float[Array, "vocabulary"]]:
    """What is drawn from, in the order of transformers: temperature, top-k, top-p, then min-p.

    Returns:
      The tokens, likeliest first, and their scores: -inf for those that are not drawn.
    """
    order = jnp.argsort(-logits, stable=True)
    descending = logits[order] / jnp.maximum(sampling.temperature, 1e-6)
    # Ties with the k-th likeliest token are kept, as in transformers.
    rank = jnp.clip(sampling.top_k - 1, 0, logits.shape[0] - 1)
    kept = (sampling.top_k == 0) | (descending >= descending[rank])
    descending = jnp.where(kept, descending, -jnp.inf)
    probability = jax.nn.softmax(descending)
    reached_before = jnp.cumsum(probability) - probability
    # The sum of all probabilities may come out as 1 before the last token.
    kept = (reached_before < sampling.top_p) | (sampling.top_p >= 1)
    kept &= probability >= sampling.min_p * probability[0]
    # The likeliest token is always kept.
    kept |= jnp.arange(logits.shape[0]) == 0
    return order, jnp.where(kept, descending, -jnp.inf)
