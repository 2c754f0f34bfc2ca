"""An answer as it grows: its tokens, its text, and whether it has ended."""

from typing import Any

import numpy as np

from bsjax.runtime.decoding import AnswerSettings
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.results import IncrementalText, Result, Stats, Token, TokenScores
from bsjax.runtime.sampling import Chosen


class Answer:
    """An answer as it grows.

    Args:
      tokenizer: decodes the tokens.
      settings: how the prompt is answered.

    Attributes:
      token_ids: the tokens so far.
    """

    def __init__(self, tokenizer: Any, settings: AnswerSettings) -> None:
        self._settings = settings
        self._text = IncrementalText(tokenizer, settings.stop)
        self._scores: list[TokenScores] = []
        self._stopped = False
        self.token_ids: list[int] = []

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, by itself or because it has as many tokens as it may have."""
        return self._stopped or len(self.token_ids) == self._settings.new_tokens

    @property
    def is_cut(self) -> bool:
        """Whether the text lacks the end of the tokens: a stop text, or what may become one."""
        return self._text.stopped or self._text.holds_back

    def add(self, chosen: Chosen) -> Token:
        """Adds a token, and returns it with the text that it completes.

        Args:
          chosen: the token; the fields have no axis of sequences.
        """
        token_id = int(chosen.token)
        self.token_ids.append(token_id)
        top_tokens = self._settings.top_tokens
        if top_tokens is not None:
            top = zip(
                chosen.top_tokens[:top_tokens].tolist(),
                chosen.top_log_probabilities[:top_tokens].tolist(),
                strict=True,
            )
            self._scores.append(TokenScores(float(chosen.log_probability), tuple(top)))
        self._stopped = bool(np.isin(token_id, self._settings.end_tokens))
        piece = self._text.add(token_id, last=self.has_ended)
        self._stopped |= self._text.stopped
        return Token(piece, token_id)

    def result(self, inputs: ModelInputs, stats: Stats) -> Result:
        """The answer, when it has ended."""
        return Result(
            text=self._text.whole,
            token_ids=tuple(self.token_ids),
            prompt_tokens=inputs.tokens,
            finish_reason="stop" if self._stopped else "length",
            stats=stats,
            log_probabilities=None if self._settings.top_tokens is None else tuple(self._scores),
        )


def tokens_of(chosen: Chosen) -> list[Chosen]:
    """Several tokens of one sequence, one by one."""
    return [Chosen(*fields) for fields in zip(*chosen, strict=True)]
