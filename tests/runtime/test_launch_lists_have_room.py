"""The launch lists of all chunks of a size have one shape: no chunk compiles a program anew."""

from dataclasses import replace
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import HeadCategory
from bsjax.masks import schedule as schedules
from bsjax.masks.template import Image, Template, Text
from bsjax.masks.visibility import CAUSAL, Visibility
from bsjax.runtime.chunks import CacheLayout, Chunks, PlacedPrompt
from tests.support.chunks import inputs_of_template
from tests.support.schedules import check_launch_list

prompts = st.lists(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 70)).map(
            lambda lengths: [Text(lengths[0]), Image(lengths[1])]
        ),
        max_size=20,
    ).map(lambda turns: Template.from_segments([*sum(turns, []), Text(3)])),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25)
@given(
    templates=prompts,
    categories=st.lists(st.sampled_from(HeadCategory), min_size=1, max_size=4),
    visibility=st.sampled_from([CAUSAL, Visibility(window=3), Visibility(window=20)]),
    devices=st.integers(1, 3),
    group=st.sampled_from([1, 2, 7]),
    most_parts=st.sampled_from([0, 12]),
)
def test_for_every_chunk(templates, categories, visibility, devices, group, most_parts):
    built = []

    def build(*arguments, capacity, **options):
        schedule = schedules.build_span_schedule(*arguments, capacity=capacity, **options)
        built.append((schedule, capacity))
        return schedule

    of_template = [
        replace(
            inputs_of_template(template),
            head_category=np.asarray([categories] * 2, np.int32),
            visibilities=(visibility,),
        )
        for template in templates
    ]
    chunks = Chunks(
        [PlacedPrompt(each, sequence=index) for index, each in enumerate(of_template)],
        CacheLayout(2048 * devices, 4),
        (64 * devices, 256 * devices),
        group,
        feature_rows=10**6,
        most_parts=most_parts,
        devices=devices,
        on_a_mesh=devices > 1,
    )
    with (
        mock.patch("bsjax.runtime.chunks.build_span_schedule", build),
        mock.patch("bsjax.masks.schedule.LONGEST_TILE", 3),
    ):
        list(chunks)
    # Of each device's rows, and of the rows whose outputs are needed.
    assert len(built) == len(chunks.borders) * (devices + 1)
    for schedule, capacity in built:
        assert schedule.launch_columns.shape[0] == capacity.items
        assert schedule.tile_columns.shape[1] == capacity.tiles
        check_launch_list(schedule)
