"""Long tiles of text rows are split along the keys in the models that run on GPUs, too."""

import numpy as np
import pytest
from PIL import Image

import bsjax
from bsjax.masks import schedule
from bsjax.runtime import chunks, sizes

QUESTION = [
    {
        "role": "user",
        "content": [
            *({"type": "image", "image": Image.new("RGB", (56, 56), c)} for c in ("red", "blue")),
            {"type": "text", "text": "What is in these images? " * 30},
        ],
    }
]


@pytest.mark.slow
def test_split_tiles_change_no_logits(tiny_checkpoint, monkeypatch):
    """Whole model, in bfloat16: the kernel with tiles split at two blocks is as exact as `xla`."""
    model = bsjax.load(tiny_checkpoint, "bfloat16")
    profile = bsjax.Profile.uniform("INTRA_IMAGE_SINK", model)
    split = []
    build = chunks.Chunks.chunk

    def counted(self, *borders):
        chunk = build(self, *borders)
        for rows in chunk.arguments.cached_rows:
            tile = rows.schedule.parts.tile
            split.append(int((tile < tile.size).sum()))
        return chunk

    monkeypatch.setattr(chunks.Chunks, "chunk", counted)
    # The interpreter takes as long for tiles without rows.
    monkeypatch.setattr(chunks, "MOST_IMAGES", 2)
    monkeypatch.setattr(sizes, "_MOST_PARTS", 8)
    monkeypatch.setattr(sizes, "_ON_CPU", sizes.Sizes(chunks=(128,), patches=(64,)))
    monkeypatch.setattr(schedule, "LONGEST_TILE", 2)
    in_parts = bsjax.forward(model, QUESTION, profile=profile, backend="pallas")
    assert sum(split) > 4
    monkeypatch.undo()
    whole = bsjax.forward(model, QUESTION, profile=profile, backend="xla")
    exact = bsjax.forward(bsjax.load(tiny_checkpoint), QUESTION, profile=profile)
    errors = [np.abs(np.asarray(logits) - exact) for logits in (in_parts, whole)]
    assert errors[0].max() < 1.2 * errors[1].max()
    assert errors[0].mean() < 1.1 * errors[1].mean()
