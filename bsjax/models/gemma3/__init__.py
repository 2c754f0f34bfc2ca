"""Gemma 3: local and global layers, images that see themselves whole, a SigLIP tower.

The 1B of the series reads no images: it is a family of its own, the language model alone.
"""

from bsjax.models.family import Family
from bsjax.models.gemma3.model import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    reference_logits,
)
from bsjax.models.gemma3.parameters import language_rules, parameter_table
from bsjax.models.gemma3.positions import positions
from bsjax.models.gemma3.prompts import PROMPTS, TEXT_PROMPTS, reference_inputs
from bsjax.models.gemma3.text import layer_kinds, visibilities
from bsjax.models.gemma3.vision_plan import vision_plan

# The residual stream of the published models is beyond float16's range.
DTYPES = ("float32", "bfloat16")

GEMMA3 = Family(
    name="gemma3",
    build=Gemma3ForConditionalGeneration.from_config,
    parameter_table=parameter_table,
    vision_plan=vision_plan,
    text_head_dim=lambda config: config.text_config.head_dim,
    vision_head_dim=lambda config: (
        config.vision_config.hidden_size // config.vision_config.num_attention_heads
    ),
    prompts=PROMPTS,
    reference_inputs=reference_inputs,
    positions=positions,
    visibilities=visibilities,
    layer_kinds=layer_kinds,
    dtypes=DTYPES,
    reference_logits=reference_logits,
)

GEMMA3_TEXT = Family(
    name="gemma3_text",
    build=Gemma3ForCausalLM.from_config,
    parameter_table=language_rules,
    vision_plan=None,
    text_head_dim=lambda config: config.head_dim,
    vision_head_dim=None,
    prompts=TEXT_PROMPTS,
    reference_inputs=reference_inputs,
    positions=positions,
    visibilities=visibilities,
    layer_kinds=layer_kinds,
    dtypes=DTYPES,
)

__all__ = ["GEMMA3", "GEMMA3_TEXT"]
