"""Random templates and masks for property tests, and what every mask must equal."""

import itertools
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from bsjax import HeadCategory, Image, Sinks, Template, Text
from bsjax.masks.categories import KeyGroup
from bsjax.masks.rows import Span
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility, visible

segments = st.lists(
    st.one_of(st.integers(0, 9).map(Text), st.integers(1, 24).map(Image)), max_size=9
)
sinks = st.builds(
    Sinks, first=st.integers(1, 3), offsets=st.lists(st.integers(0, 20), max_size=3).map(tuple)
)
templates = st.builds(Template.from_segments, segments, sinks)
categories = st.lists(st.sampled_from(HeadCategory), min_size=1, max_size=4)


class Spans(NamedTuple):
    """What a batch of chunks or of turns may look like."""

    templates: tuple[Template, ...]
    queries: tuple[Span, ...]
    keys: tuple[Span, ...]
    first_key_rows: tuple[int, ...]
    """The first row of each span of keys. There is padding between some of them."""


@st.composite
def _spans(draw) -> Spans:
    """Some tokens of up to three conversations, against keys in rows of up to three turns each."""
    several = tuple(draw(st.lists(templates, min_size=1, max_size=3)))
    queries, keys = [], []
    for index, template in enumerate(several):
        positions = st.integers(0, template.tokens)
        cuts = sorted({0, template.tokens, *draw(st.lists(positions, max_size=2))})
        keys += [Span(start, end, index) for start, end in itertools.pairwise(cuts)]
        start, end = sorted(draw(st.tuples(positions, positions)))
        if draw(st.booleans()):
            queries.append(Span(start, end, index))
    keys = draw(st.permutations(keys))
    first_key_rows, end = [], 0
    for span in keys:
        first_key_rows.append(end + draw(st.sampled_from((0, 0, 1, 7))))
        end = first_key_rows[-1] + span.end - span.start
    return Spans(several, tuple(draw(st.permutations(queries))), tuple(keys), tuple(first_key_rows))


spans = _spans()
visibilities = st.builds(Visibility, st.booleans(), st.none() | st.integers(1, 40))


def visible_matrix(
    template: Template, groups: KeyGroup | int, visibility: Visibility = CAUSAL
) -> np.ndarray:
    """The predicate, evaluated for every pair, in prompt order."""
    query = TokenInfo(*(part[:, None] for part in template.info))
    key = TokenInfo(*(part[None, :] for part in template.info))
    seen = visible(query, key, groups, visibility)
    return np.broadcast_to(seen, (template.tokens, template.tokens))
