"""Rows: tokens in the order in which the model runs them, packed span by span.

    prompt order   T T A a a a T T B b b T | T C c c T      two spans: a prompt and its next turn
    rows           T T T T T A B a a a b b | T T C c c

A *span* is a run of tokens of one conversation whose rows are packed together. A whole prompt is
one span; the queries of a chunk are a span that begins and ends inside a prompt; rows of several
conversations have at least one span for each. Queries and keys are two lists of spans, and need not
be the same tokens.

The keys of a span form *segments*, each sorted by position: text, sinks and other image tokens in
packed order, all of them together in prompt order.

If queries and keys are not the same rows, queries may leave sinks in their images, as those of a
chunk do: T T T A a a a B b b b. Kept apart, the few sinks of a chunk would fill only a small part
of a tile, and that tile would still visit as many keys as a full one.
"""

import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.errors import MaskError
from bsjax.masks.categories import ALL_KEY_GROUPS, KeyGroup
from bsjax.masks.template import Template
from bsjax.masks.visibility import PADDING, TokenInfo


class Span(NamedTuple):
    """Consecutive tokens of a conversation whose rows are packed together.

    Attributes:
      start: position of the first token.
      end: one past the position of the last token.
      conversation: index of the conversation's template.
    """

    start: int
    end: int
    conversation: int = 0


class KeySegment(NamedTuple):
    """Key rows sorted by position, so that a query row sees one range of them.

    Attributes:
      start: position at which the segment's span starts.
      before: int32; for each position of the span, the first key row of the segment at or after it.
        The last entry is one past the segment's last key row.
      own: the group of its keys for queries of their own image; all groups where keys of all groups
        are mixed.
      other: the group of its keys for all other image queries.
    """

    start: int
    before: Int[np.ndarray, "tokens+1"]
    own: KeyGroup
    other: KeyGroup

    def first_at(self, position: Int[np.ndarray, "rows"]) -> Int[np.ndarray, "rows"]:
        """The first key row of the segment at or after each position."""
        return self.before[np.clip(position - self.start, 0, self.before.size - 1)]


class Rows:
    """The tokens of some spans, one span after the other.

    Args:
      templates: one for each conversation.
      spans: the spans, in the order of their rows.
      packed: whether each span is in packed order; otherwise it is in prompt order.
      sinks_apart: whether packed spans have sinks before all other image tokens, as keys must;
        otherwise sinks stay in their images.
      first_row: the first row of each span, ascending, if there may be padding between them, as in
        a cache of several conversations; None if each span begins where the one before it ends.
      kept: for each span, the positions of the tokens that have rows, ascending, as those of
        queries that are dealt to several devices; None if all have.

    Attributes:
      templates: as given.
      spans: as given.
      packed: as given.
      sinks_apart: as given.
      first_row: the first row of each span.

    Raises:
      MaskError: a span is not within its template.
    """

    def __init__(
        self,
        templates: Sequence[Template],
        spans: Sequence[Span],
        *,
        packed: bool,
        sinks_apart: bool = True,
        first_row: Sequence[int] | None = None,
        kept: Sequence[Int[np.ndarray, "_"]] | None = None,
    ) -> None:
        self.templates, self.spans = tuple(templates), tuple(spans)
        self._kept = kept
        self.packed, self.sinks_apart = packed, sinks_apart
        for span in self.spans:
            tokens = self.templates[span.conversation].tokens
            if not 0 <= span.start <= span.end <= tokens:
                raise MaskError(
                    f"Tokens {span.start} to {span.end} are not within a template of {tokens} "
                    "tokens."
                )
        if kept is None:
            self._lengths = [span.end - span.start for span in self.spans]
        else:
            self._lengths = [positions.size for positions in kept]
        if first_row is None:
            first_row = [0, *itertools.accumulate(self._lengths)][:-1]
        self.first_row = tuple(first_row)
        ends = [first + length for first, length in zip(self.first_row, self._lengths, strict=True)]
        self._tokens = ends[-1] if ends else 0

    def taken(self, rows: Int[np.ndarray, "_"]) -> "Rows":
        """The same spans with some of these rows only, such as the queries of one device."""
        spans = [self.rows_of(index) for index in range(len(self.spans))]
        kept = [
            np.sort(self.position[rows[(rows >= span.start) & (rows < span.stop)]])
            for span in spans
        ]
        return Rows(
            self.templates,
            self.spans,
            packed=self.packed,
            sinks_apart=self.sinks_apart,
            kept=kept,
        )

    @property
    def tokens(self) -> int:
        """How many rows there are, padding between spans included."""
        return self._tokens

    @cached_property
    def position(self) -> Int[np.ndarray, "rows"]:
        """int32: the position of each row in its conversation."""
        return self.info.position

    @cached_property
    def info(self) -> TokenInfo:
        """What the predicate needs to know about each row."""
        dtypes = TokenInfo(np.int32, np.int32, np.bool_, np.int32)
        padding = zip(PADDING, dtypes, strict=True)
        info = TokenInfo(*(np.full(self.tokens, value, dtype) for value, dtype in padding))
        for index, (start, end, conversation) in enumerate(self.spans):
            rows, template = self.rows_of(index), self.templates[conversation]
            if self.packed:
                order = template.packed_order_of(start, end, sinks_apart=self.sinks_apart)
            else:
                order = np.arange(start, end, dtype=np.int32)
            if self._kept is not None:
                is_kept = np.zeros(end - start, bool)
                is_kept[self._kept[index] - start] = True
                order = order[is_kept[order - start]]
            info.position[rows] = order
            info.image[rows] = template.image[order]
            info.sink[rows] = template.sink[order]
            info.conversation[rows] = conversation
        return info

    def rows_of(self, index: int) -> slice:
        """The rows of one span."""
        first = self.first_row[index]
        return slice(first, first + self._lengths[index])

    @cached_property
    def segments(self) -> tuple[tuple[KeySegment, ...], ...]:
        """For each conversation, its key segments.

        Packed rows must have `sinks_apart` set, and all tokens must have rows.
        """
        assert self._kept is None and (self.sinks_apart or not self.packed)
        segments: list[list[KeySegment]] = [[] for _ in self.templates]
        for first_row, span in zip(self.first_row, self.spans, strict=True):
            template = self.templates[span.conversation]
            image = template.image[span.start : span.end]
            sink = template.sink[span.start : span.end]
            if self.packed:
                parts = [
                    (image < 0, KeyGroup.TEXT, KeyGroup.TEXT),
                    (sink, KeyGroup.OWN_SINK, KeyGroup.OTHER_SINK),
                    ((image >= 0) & ~sink, KeyGroup.OWN, KeyGroup.OTHER),
                ]
            else:
                parts = [(np.ones(image.size, bool), ALL_KEY_GROUPS, ALL_KEY_GROUPS)]
            for member, own, other in parts:
                before = np.full(image.size + 1, first_row, np.int32)
                before[1:] += np.cumsum(member, dtype=np.int32)
                first_row = int(before[-1])
                if before[0] < before[-1]:
                    segments[span.conversation].append(KeySegment(span.start, before, own, other))
        return tuple(map(tuple, segments))
