"""Random templates and masks for property tests, and what every mask must equal."""

import numpy as np
from hypothesis import strategies as st

from bsjax import HeadCategory, Image, Sinks, Template, Text
from bsjax.masks.categories import KeyGroup
from bsjax.masks.visibility import CAUSAL, TokenInfo, Visibility, visible

segments = st.lists(
    st.one_of(st.integers(0, 9).map(Text), st.integers(1, 24).map(Image)), max_size=9
)
sinks = st.builds(
    Sinks, first=st.integers(1, 3), offsets=st.lists(st.integers(0, 20), max_size=3).map(tuple)
)
templates = st.builds(Template.from_segments, segments, sinks)
categories = st.lists(st.sampled_from(HeadCategory), min_size=1, max_size=4)
visibilities = st.builds(Visibility, st.booleans(), st.none() | st.integers(1, 40))


def visible_matrix(
    template: Template, groups: KeyGroup | int, visibility: Visibility = CAUSAL
) -> np.ndarray:
    """The predicate, evaluated for every pair, in prompt order."""
    query = TokenInfo(*(part[:, None] for part in template.info))
    key = TokenInfo(*(part[None, :] for part in template.info))
    seen = visible(query, key, groups, visibility)
    return np.broadcast_to(seen, (template.tokens, template.tokens))
