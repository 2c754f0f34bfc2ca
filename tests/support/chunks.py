"""A prompt as the chunks that a model runs, without a checkpoint."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bsjax.masks.template import Sinks, Template
from bsjax.models import Family
from bsjax.runtime.chunks import Chunks
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.sizes import Sizes

EVERY_TOKEN = Sinks(first=10**6)
"""With these sinks, a SINK head sees what a DENSE head sees."""


def chunks_of(
    family: Family,
    config: Any,
    prompt: Any,
    head_category: np.ndarray,
    *,
    sinks: Sinks | None = None,
    blocks: tuple[int, int] = (16, 16),
    rows: Sequence[int] = (64,),
    new_tokens: int = 0,
    all_outputs: bool = True,
) -> Chunks:
    """The chunks of a prompt with these head categories, of at most `rows[-1]` rows."""
    text = config.get_text_config()
    template = Template.from_tokens(
        prompt.token_ids,
        family.image_token_id(config),
        sinks or Sinks(),
        prompt.image_tokens,
    )
    position_ids, next_position = family.positions(prompt.token_ids, prompt.grid_thw, config)
    inputs = ModelInputs(
        template=template,
        next_position=next_position,
        token_ids=np.asarray(prompt.token_ids, np.int32),
        position_ids=position_ids,
        head_category=head_category,
        visibilities=family.visibilities(config),
        last_kind=int(family.layer_kinds(config)[-1]),
        blocks=blocks,
        # Each image token has a row of its own for its features.
        group_tokens=10**6,
        image_groups=(),
        flops_per_kind=(),
        how_to_shorten="",
    )
    stacked_heads = text.num_attention_heads // text.num_key_value_heads
    sizes = Sizes(tuple(rows), (256,))
    return Chunks(inputs, sizes, stacked_heads, new_tokens, all_outputs=all_outputs)
