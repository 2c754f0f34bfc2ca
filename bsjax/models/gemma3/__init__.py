"""Gemma 3: local and global layers, images that see themselves whole, a SigLIP tower."""

from bsjax.models.family import Family
from bsjax.models.gemma3.model import Gemma3ForConditionalGeneration
from bsjax.models.gemma3.parameters import parameter_table
from bsjax.models.gemma3.positions import positions
from bsjax.models.gemma3.prompts import PROMPTS, reference_inputs
from bsjax.models.gemma3.text import layer_kinds, visibilities
from bsjax.models.gemma3.vision_plan import vision_plan

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
)

__all__ = ["GEMMA3"]
