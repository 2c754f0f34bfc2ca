"""Templates say which token belongs to which image; packed order sorts tokens accordingly."""

import numpy as np
import pytest
from hypothesis import given

from bsjax import Image, Sinks, Template, TemplateError, Text
from tests.support.templates import templates

IMAGE = 151655


def test_images_are_runs_of_the_placeholder():
    ids = [1, 2, IMAGE, IMAGE, IMAGE, 3, IMAGE, 4]
    template = Template.from_tokens(ids, IMAGE)
    assert template.image.tolist() == [-1, -1, 0, 0, 0, -1, 1, -1]
    assert template.sink.tolist() == [False, False, True, False, False, False, True, False]
    assert template.image_tokens == (3, 1)
    assert template.num_images == 2


def test_adjacent_images_are_distinguished_by_their_sizes():
    template = Template.from_tokens([IMAGE] * 5 + [7], IMAGE, image_tokens=[2, 3])
    assert template.image.tolist() == [0, 0, 1, 1, 1, -1]
    assert template.sink.tolist() == [True, False, True, False, False, False]


def test_tokens_and_segments_give_the_same_template():
    ids = [5] * 3 + [IMAGE] * 4 + [5] + [IMAGE] * 2
    from_tokens = Template.from_tokens(ids, IMAGE, Sinks(first=2))
    from_segments = Template.from_segments([Text(3), Image(4), Text(1), Image(2)], Sinks(first=2))
    np.testing.assert_array_equal(from_tokens.image, from_segments.image)
    np.testing.assert_array_equal(from_tokens.sink, from_segments.sink)


def test_equal_sinks_are_equal_whatever_the_order():
    assert Sinks(offsets=(9, 4, 9)) == Sinks(offsets=(4, 9))


def test_offsets_beyond_a_small_image_are_ignored():
    template = Template.from_segments([Image(6), Image(2)], Sinks(first=1, offsets=(3, 5)))
    assert np.flatnonzero(template.sink).tolist() == [0, 3, 5, 6]


@pytest.mark.parametrize(
    "segments",
    [
        [],
        [Text(0)],
        [Text(4)],
        [Image(3)],
        [Image(1)] * 5,
        [Image(2), Text(1)],
        [Text(1), Image(2)],
    ],
)
def test_degenerate_prompts_have_a_template(segments):
    template = Template.from_segments(segments)
    assert template.tokens == sum(segment.tokens for segment in segments)
    assert template.num_images == sum(isinstance(segment, Image) for segment in segments)
    assert sorted(template.packed_order) == list(range(template.tokens))


def test_two_hundred_images_are_counted():
    template = Template.from_segments([Text(3)] + [Image(40), Text(2)] * 200)
    assert template.num_images == 200
    assert template.image_tokens == (40,) * 200


@given(templates)
def test_packed_order_is_text_then_sinks_then_image_by_image(template):
    order = template.packed_order
    assert sorted(order) == list(range(template.tokens))
    kind = np.where(template.image < 0, 0, np.where(template.sink, 1, 2))[order]
    assert (np.diff(kind) >= 0).all()
    for part in range(3):
        assert (np.diff(order[kind == part]) > 0).all()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Sinks(first=0), "at least 1"),
        (lambda: Sinks(offsets=(-1,)), "at least 0"),
        (lambda: Template.from_segments([Image(0)]), "at least 1"),
        (lambda: Template.from_segments([Text(-1)]), "at least 0"),
        (lambda: Template.from_tokens([IMAGE] * 3, IMAGE, image_tokens=[2]), "3 image placeholder"),
        (lambda: Template.from_tokens([IMAGE, 1, IMAGE], IMAGE, image_tokens=[2]), "contiguous"),
        (lambda: Template(np.array([1, 0]), np.zeros(2, bool)), "contiguous"),
        (lambda: Template(np.array([-1]), np.ones(1, bool)), "text token"),
    ],
)
def test_bad_input_is_refused_with_a_reason(call, words):
    with pytest.raises(TemplateError, match=words):
        call()
