"""Qwen2-VL. Its language model, positions and outer model are Qwen2.5-VL's as well."""

from functools import partial

from bsjax.models.family import Family, causal, one_kind
from bsjax.models.qwen2_vl.model import Qwen2VLForConditionalGeneration
from bsjax.models.qwen2_vl.parameters import parameter_table
from bsjax.models.qwen2_vl.positions import positions
from bsjax.models.qwen2_vl.prompts import PROMPTS, reference_inputs
from bsjax.models.qwen2_vl.text import head_dim
from bsjax.models.qwen2_vl.vision import Qwen2VisionTransformer
from bsjax.models.qwen2_vl.vision_plan import vision_plan

QWEN2_VL = Family(
    name="qwen2_vl",
    build=partial(Qwen2VLForConditionalGeneration.from_config, tower=Qwen2VisionTransformer),
    parameter_table=parameter_table,
    vision_plan=vision_plan,
    text_head_dim=lambda config: head_dim(config.text_config),
    vision_head_dim=lambda config: config.vision_config.embed_dim // config.vision_config.num_heads,
    prompts=PROMPTS,
    reference_inputs=reference_inputs,
    positions=positions,
    visibilities=causal,
    layer_kinds=one_kind,
)

__all__ = ["QWEN2_VL"]
