"""Prompts as the chunks that a model runs."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import CAUSAL
from bsjax.models import FAMILIES, Architecture, Family
from bsjax.runtime.chunks import CacheLayout, Chunks, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings, Decoding
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Programs
from bsjax.runtime.sampling import GREEDY, Sampling
from bsjax.runtime.scoring import Scoring
from bsjax.runtime.sizes import Sizes, cache_rows
from tests.support.small_models import Shape, small_config

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
        architecture=Architecture(family, config, np.dtype(np.float32)),
        template=template,
        next_position=next_position,
        token_ids=np.asarray(prompt.token_ids, np.int32),
        position_ids=position_ids,
        head_category=head_category,
        visibilities=family.visibilities(config),
        last_kind=int(family.layer_kinds(config)[-1]),
        blocks=blocks,
        images=(),
        start=0,
        how_to_shorten="",
    )
    stacked_heads = text.num_attention_heads // text.num_key_value_heads
    layout = CacheLayout(cache_rows(inputs.tokens + new_tokens))
    return Chunks(
        [PlacedPrompt(inputs)],
        layout,
        Sizes(tuple(rows), (256,)).chunks_for(layout.rows),
        stacked_heads,
        # Each image token has a row of its own for its features.
        feature_rows=10**6,
        all_outputs=all_outputs,
    )


def inputs_of_template(template: Template) -> ModelInputs:
    """A prompt of which nothing but the template matters, for a small model."""
    family, config = FAMILIES["qwen2_vl"], small_config(Shape("qwen2_vl"))
    zeros = np.zeros((3, template.tokens), np.int32)
    return ModelInputs(
        architecture=Architecture(family, config, np.dtype(np.float32)),
        template=template,
        next_position=template.tokens,
        token_ids=zeros[0],
        position_ids=zeros,
        head_category=np.zeros((1, 2), np.int32),
        visibilities=(CAUSAL,),
        last_kind=0,
        blocks=(16, 16),
        images=(),
        start=0,
        how_to_shorten="",
    )


def prefill_of(
    programs: Programs,
    inputs: ModelInputs,
    *,
    new_tokens: int = 8,
    sampling: Sampling = GREEDY,
    backend: str = "xla",
) -> Prefill:
    """The prefill of one prompt, as `bsjax.generate` runs it."""
    settings = AnswerSettings(new_tokens, backend, sampling)
    layout = CacheLayout(cache_rows(inputs.tokens + new_tokens))
    return Prefill(programs, [PlacedPrompt(inputs)], layout, [settings], backend)


def decoding_of(programs: Programs, prefill: Prefill, backend: str = "xla") -> Decoding:
    """The decoding that follows a prefill."""
    settings = AnswerSettings(1, backend)
    return Decoding(programs, prefill.chunks.layout, settings.end_tokens, backend)


def logits_of(programs: Programs, inputs: ModelInputs) -> np.ndarray:
    """Logits of all tokens of a prompt, as `bsjax.forward` computes them."""
    layout = CacheLayout(cache_rows(inputs.tokens))
    scoring = Scoring(programs, PlacedPrompt(inputs), layout, "xla")
    return scoring.logits(programs.module.language_model.empty_cache(*layout))[0]
