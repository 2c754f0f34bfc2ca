"""Query rows that are dealt to devices: none is lost, and shares are alike."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import HeadCategory, Image, Template, Text
from bsjax.masks.dealing import Attending, deal
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import build_span_schedule, category_tables, uses_packed_order
from bsjax.masks.visibility import CAUSAL
from tests.support.schedules import check_invariants
from tests.support.templates import categories, spans, visibilities


@pytest.mark.slow
@settings(max_examples=150)
@given(
    of=spans,
    categories=categories,
    block_q=st.integers(1, 12),
    block_kv=st.integers(1, 12),
    visibility=visibilities,
    devices=st.integers(1, 5),
    stacked_heads=st.sampled_from((0, 3)),
    spare=st.integers(0, 3),
)
def test_every_row_is_on_one_device_which_covers_what_it_sees(
    of, categories, block_q, block_kv, visibility, devices, stacked_heads, spare
):
    tables = [category.groups for category in categories]
    packed = uses_packed_order(tables)
    keys = Rows(of.templates, of.keys, packed=packed, first_row=of.first_key_rows)
    queries = Rows(of.templates, of.queries, packed=packed, sinks_apart=False)
    heads = np.bincount(categories, minlength=len(HeadCategory))
    most_rows = -(-queries.tokens // devices) + spare
    dealt = deal(
        queries,
        [Attending(keys, visibility, heads)],
        devices,
        most_rows,
        block_q=block_q,
        block_kv=block_kv,
        stacked_heads=max(1, stacked_heads),
    )
    assert max(rows.size for rows in dealt.rows) <= most_rows
    np.testing.assert_array_equal(np.sort(np.concatenate(dealt.rows)), np.arange(queries.tokens))
    for rows in dealt.rows:
        kept = [
            np.sort(queries.position[rows[(rows >= own.start) & (rows < own.stop)]])
            for own in map(queries.rows_of, range(len(of.queries)))
        ]
        own = queries.taken(rows)
        for index, positions in enumerate(kept):
            found = own.position[own.rows_of(index)]
            np.testing.assert_array_equal(np.sort(found), positions)
        schedule = build_span_schedule(
            own,
            keys,
            tables,
            block_q=block_q,
            block_kv=block_kv,
            visibility=visibility,
            query_rows=most_rows,
            stacked_heads=stacked_heads,
        )
        check_invariants(schedule, len(schedule.groups), block_q, packed)


@pytest.mark.parametrize(
    ("images", "tokens", "devices", "most"),
    [
        *((36, 1000, devices, 1.05) for devices in (2, 4, 8)),
        *((90, 400, devices, 1.05) for devices in (2, 4)),
        # Each device has five tiles of text rows, whose lengths cannot be made equal.
        (90, 400, 8, 1.07),
        *((20, 1800, devices, 1.10) for devices in (2, 4, 8)),
        (300, 1000, 64, 1.05),
    ],
)
@pytest.mark.parametrize("category", HeadCategory)
def test_devices_visit_about_as_many_blocks(images, tokens, most, devices, category):
    """Greatest over mean, of the schedules that are built for the rows of a whole prompt."""
    template = Template.from_segments([Text(8), Image(tokens)] * images + [Text(20)])
    tables = category_tables([category])
    packed = uses_packed_order(tables)
    spans = [Span(0, template.tokens)]
    keys = Rows([template], spans, packed=packed)
    queries = Rows([template], spans, packed=packed, sinks_apart=False)
    heads = 28 * (np.arange(len(HeadCategory)) == category)
    dealt = deal(
        queries,
        [Attending(keys, CAUSAL, heads)],
        devices,
        -(-template.tokens // devices),
        block_q=128,
        block_kv=64,
        stacked_heads=7,
    )
    blocks = []
    for rows in dealt.rows:
        own = queries.taken(rows)
        schedule = build_span_schedule(own, keys, tables, block_q=128, block_kv=64, stacked_heads=7)
        visited = schedule.tiles.blocks.sum(axis=1)
        blocks.append(28 * int(visited[:-1].sum()) + 4 * int(visited[-1]))
    assert max(blocks) <= most * np.mean(blocks)
