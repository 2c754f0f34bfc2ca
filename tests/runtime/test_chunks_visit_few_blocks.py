"""Chunks of a prompt visit hardly more blocks than the whole prompt would in one schedule."""

from dataclasses import replace

import numpy as np
import pytest

from bsjax import HeadCategory, Image, Template, Text
from bsjax.masks.schedule import build_schedule, category_tables
from bsjax.runtime.chunks import CacheLayout, Chunks, PlacedPrompt
from bsjax.runtime.sizes import cache_rows, most_parts
from tests.support.chunks import inputs_of_template
from tools.speed.launches import launch_of

BLOCKS = (128, 64)
Q_HEADS, KV_HEADS = 28, 4
"""Of Qwen2.5-VL-7B."""

SPARSE = [category for category in HeadCategory if category is not HeadCategory.DENSE]


def visits_of_chunks(template: Template, category: HeadCategory) -> int:
    """Blocks of all chunks of a layer whose heads have one category."""
    inputs = replace(
        inputs_of_template(template),
        head_category=np.full((1, Q_HEADS), category, np.int32),
        blocks=BLOCKS,
    )
    layout = CacheLayout(cache_rows(template.tokens))
    group = Q_HEADS // KV_HEADS
    chunks = Chunks(
        [PlacedPrompt(inputs)], layout, (512, 4096), group, feature_rows=10**6, all_outputs=True
    )
    visits = 0
    for chunk in chunks:
        (rows,) = chunk.arguments.cached_rows
        blocks = rows.schedule.tiles.blocks.sum(axis=1)
        # Image rows have tiles for each query head, text rows for each key head.
        visits += Q_HEADS * int(blocks[category]) + KV_HEADS * int(blocks[-1])
    return visits


@pytest.mark.parametrize("category", SPARSE, ids=lambda category: category.name)
@pytest.mark.parametrize(
    ("images", "tokens", "most"),
    [
        (36, 1000, 1.05),
        (90, 400, 1.05),
        (140, 256, 1.05),
        # Chunks of 4096 rows cut images of 300K tokens so often that short tiles show.
        (300, 1000, 1.08),
        (1170, 256, 1.06),
    ],
)
def test_for_every_sparse_category(images, tokens, most, category):
    template = Template.from_segments([Text(8), Image(tokens)] * images + [Text(20)])
    whole = build_schedule(
        template, category_tables([category]), block_q=BLOCKS[0], block_kv=BLOCKS[1]
    )
    visits = visits_of_chunks(template, category)
    assert visits <= most * Q_HEADS * int(whole.tiles.blocks.sum())


@pytest.mark.parametrize("backend", ["pallas", "triton"])
def test_launches_begin_with_the_longest_tiles_of_all_tables(backend):
    heads = [HeadCategory.DENSE, HeadCategory.SINK] * (Q_HEADS // 2)
    template = Template.from_segments([Text(8), Image(1000)] * 20)
    inputs = replace(
        inputs_of_template(template), head_category=np.asarray([heads], np.int32), blocks=BLOCKS
    )
    parts = most_parts(backend, "bfloat16")
    assert parts > 0 == most_parts("xla", "bfloat16") == most_parts(backend, "float32")
    chunks = Chunks(
        [PlacedPrompt(inputs)],
        CacheLayout(cache_rows(template.tokens)),
        (512, 4096),
        Q_HEADS // KV_HEADS,
        feature_rows=10**6,
        most_parts=parts,
        all_outputs=True,
    )
    longest_part = 0
    for chunk in chunks:
        schedule = chunk.arguments.cached_rows[0].schedule
        tiles, launch = schedule.tiles, launch_of(schedule, heads, KV_HEADS)
        started = (launch.full + launch.partial)[~launch.empty]
        assert (started <= 1.05 * np.minimum.accumulate(started)).all()
        longest_part = max(longest_part, int(tiles.blocks[tiles.part >= 0].max(initial=0)))
    # Whole tiles of text rows would visit up to 315 blocks.
    assert 0 < longest_part <= 64
