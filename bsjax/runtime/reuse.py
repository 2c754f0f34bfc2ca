"""What a cache holds after a call, and how much of it the next prompt can use again.

    first prompt   T T A a a a T T | T T             a prompt and its answer
    next prompt    T T A a a a T T   T T T B b b T   the same, and more
                   span 1          | span 2

Causality makes the keys and values of a shared prefix exactly those that the next prompt would
compute. The rows of a span are packed together (see `bsjax.masks.rows`). Text that follows a span
with images starts a span of its own; text that follows text stays in its span, because in packed
order text comes first.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from bsjax.masks.template import Template
from bsjax.masks.visibility import Visibility
from bsjax.models.cache import ring_rows
from bsjax.prompts.prompt import Prompt


@dataclass(frozen=True, eq=False)
class Reuse:
    """How much of a prompt a cache holds already.

    Attributes:
      start: how many tokens it holds: the position of the first token that has to run.
      span_starts: first position of each span of the prompt. In packed order, the last span may
        begin before `start` if it has only text up to there.
      moved: int32 [start], the row in which each kept row is now; None if all are in their places.
      conversation: which of a session's conversations holds them; 0 if there are none.
    """

    start: int = 0
    span_starts: tuple[int, ...] = (0,)
    moved: Int32[np.ndarray, "start"] | None = None
    conversation: int = 0


MOST_SPANS = 2
"""The most spans. A tile has ranges in each, and the programs have room for a few. Before there are
more, the rows that are kept are moved into one span."""

NOTHING = Reuse()
"""The prompt runs from its first token on, in a cache of its own."""


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """The tokens whose keys and values are in a cache.

    Attributes:
      token_ids: int32 [tokens].
      images: a digest of the pixels of each image.
      template: the structure of these tokens.
      span_starts: first position of each span.
    """

    token_ids: Int32[np.ndarray, "tokens"]
    images: tuple[str, ...]
    template: Template
    span_starts: tuple[int, ...]

    @classmethod
    def of(
        cls,
        prompt: Prompt,
        template: Template,
        answer: Sequence[int],
        span_starts: tuple[int, ...],
        image_token_id: int,
    ) -> "CachedTokens":
        """The tokens of a prompt and of its answer.

        Args:
          prompt: the prompt.
          template: its template.
          answer: the tokens of the answer that are in the cache.
          span_starts: the spans of the prompt.
          image_token_id: answers end before this token: in a prompt it would be an image.
        """
        ids = np.asarray(answer, np.int32)
        ids = ids[: next(iter(np.flatnonzero(ids == image_token_id)), ids.size)]
        grown = Template(
            np.append(template.image, np.full(ids.size, -1, np.int32)),
            np.append(template.sink, np.zeros(ids.size, bool)),
        )
        return cls(
            np.append(prompt.token_ids, ids),
            tuple(image.digest for image in prompt.images),
            grown,
            extended(span_starts, template.tokens, grown) if ids.size else span_starts,
        )

    def reuse(
        self,
        prompt: Prompt,
        template: Template,
        visibilities: Sequence[Visibility],
        rows: int,
        *,
        packed: bool,
    ) -> Reuse:
        """How much of a prompt these tokens are a prefix of. At least its last token has to run.

        Args:
          prompt: the next prompt.
          template: its template.
          visibilities: what each kind of layer lets a query see. Where a window has moved on, the
            rows before it are gone: then only a prompt that continues all of the tokens can use
            them.
          rows: rows of the cache.
          packed: whether the rows of a span are in packed order.
        """
        limit = min(self.token_ids.size, prompt.token_ids.size - 1)
        differs = np.flatnonzero(self.token_ids[:limit] != prompt.token_ids[:limit])
        start = int(differs[0]) if differs.size else limit
        for digest, image, first in zip(
            self.images, prompt.images, self.template.image_first.tolist(), strict=False
        ):
            # Images behind the first difference need not have been read yet.
            if first >= start:
                break
            if digest != image.digest:
                start = first
        if template.image[start] >= 0:  # An image is computed as a whole.
            start = min(start, int(template.image_first[template.image[start]]))
        if start < self.token_ids.size and has_moved_on(visibilities, rows, self.token_ids.size):
            start = 0
        if start == 0:
            return NOTHING
        if not packed:
            return Reuse(start)
        kept = tuple(first for first in self.span_starts if first < start)
        if len(extended(kept, start, template)) > MOST_SPANS:
            kept = (0,)
        span_starts = extended(kept, start, template)
        return Reuse(start, span_starts, self._moved(kept, start))

    def _moved(self, span_starts: Sequence[int], end: int) -> Int32[np.ndarray, "end"] | None:
        """Where the rows of tokens before `end` are, in the order that these spans give them.

        None if they are in that order already.
        """
        template = self.template
        row = np.empty(template.tokens, np.int32)
        row[_packed_order(template, self.span_starts, template.tokens)] = np.arange(
            template.tokens, dtype=np.int32
        )
        rows = row[_packed_order(template, span_starts, end)]
        return None if np.array_equal(rows, np.arange(end)) else rows


def _packed_order(
    template: Template, span_starts: Sequence[int], end: int
) -> Int32[np.ndarray, "end"]:
    """The position of each row, if the tokens before `end` are in these spans."""
    spans = itertools.pairwise((*span_starts, end))
    return np.concatenate([template.packed_order_of(*span) for span in spans])


def has_moved_on(visibilities: Sequence[Visibility], rows: int, tokens: int) -> bool:
    """Whether some layers with a window no longer keep all of the tokens written to their ring.

    Args:
      visibilities: what each kind of layer lets a query see.
      rows: rows of the cache of layers that keep all tokens.
      tokens: how many tokens have been written.
    """
    windows = [visibility.window for visibility in visibilities if visibility.window is not None]
    return any(tokens > ring_rows(window, rows) for window in windows)


def extended(span_starts: tuple[int, ...], end: int, template: Template) -> tuple[int, ...]:
    """The spans when more tokens follow at `end`."""
    only_text = bool((template.image[span_starts[-1] : end] < 0).all())
    return span_starts if only_text else (*span_starts, end)
