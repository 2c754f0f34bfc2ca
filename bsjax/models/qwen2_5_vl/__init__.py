"""Qwen2.5-VL: Qwen2-VL with another vision tower, most of whose blocks attend within windows."""

from functools import partial

from bsjax.models.family import Family, causal, one_kind
from bsjax.models.qwen2_5_vl.parameters import parameter_table
from bsjax.models.qwen2_5_vl.vision import Qwen2_5VisionTransformer
from bsjax.models.qwen2_5_vl.vision_plan import vision_plan
from bsjax.models.qwen2_vl.model import Qwen2VLForConditionalGeneration
from bsjax.models.qwen2_vl.positions import positions
from bsjax.models.qwen2_vl.prompts import PROMPTS, reference_inputs
from bsjax.models.qwen2_vl.text import head_dim

QWEN2_5_VL = Family(
    name="qwen2_5_vl",
    build=partial(Qwen2VLForConditionalGeneration.from_config, tower=Qwen2_5VisionTransformer),
    parameter_table=parameter_table,
    vision_plan=vision_plan,
    text_head_dim=lambda config: head_dim(config.text_config),
    vision_head_dim=lambda config: (
        config.vision_config.hidden_size // config.vision_config.num_heads
    ),
    prompts=PROMPTS,
    reference_inputs=reference_inputs,
    positions=positions,
    visibilities=causal,
    layer_kinds=one_kind,
)

__all__ = ["QWEN2_5_VL"]
