"""The predicate against a second formulation of the semantics, written out pair by pair."""

import pytest
from hypothesis import given

from bsjax import HeadCategory, Image, Template, Text
from bsjax.masks.categories import KeyGroup
from bsjax.masks.visibility import Visibility
from tests.support.templates import templates, visibilities, visible_matrix


def sees(template, category, i, j, visibility):
    same_image = template.image[i] == template.image[j] and template.image[i] >= 0
    if not (j <= i or (visibility.bidirectional_images and same_image)):
        return False
    if visibility.window is not None and not j > i - visibility.window:
        return False
    if template.image[i] < 0 or template.image[j] < 0:
        return True
    if category is HeadCategory.DENSE:
        return True
    if category is HeadCategory.SINK:
        return bool(template.sink[j])
    if category is HeadCategory.INTRA_IMAGE:
        return bool(same_image)
    return bool(same_image or template.sink[j])


@given(template=templates, visibility=visibilities)
def test_every_pair_of_every_category_is_seen_as_designed(template, visibility):
    for category in HeadCategory:
        seen = visible_matrix(template, category.groups, visibility)
        for i in range(template.tokens):
            for j in range(template.tokens):
                assert seen[i, j] == sees(template, category, i, j, visibility), (category, i, j)


@given(template=templates, visibility=visibilities)
def test_groups_are_disjoint_and_together_dense(template, visibility):
    image_rows = template.image >= 0
    together = sum(
        visible_matrix(template, group, visibility)[image_rows].astype(int) for group in KeyGroup
    )
    dense = visible_matrix(template, HeadCategory.DENSE.groups, visibility)[image_rows]
    assert (together == dense).all()


@pytest.mark.parametrize("window", [None, 3])
def test_gemma_sees_ahead_inside_an_image_but_nothing_before_the_window(window):
    template = Template.from_segments([Text(2), Image(6), Text(2)])
    seen = visible_matrix(
        template, HeadCategory.DENSE.groups, Visibility(bidirectional_images=True, window=window)
    )
    assert seen[2, 7] and seen[3, 7]
    assert seen[7, 2] == (window is None)
    assert not seen[2, 8]
