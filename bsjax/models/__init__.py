"""Ports of vision-language models. `FAMILIES` finds one by its config's `model_type`."""

from bsjax.models.cache import Cache
from bsjax.models.family import Family
from bsjax.models.gemma3 import GEMMA3, GEMMA3_TEXT
from bsjax.models.image_text_model import ImageTextModel
from bsjax.models.parameters import ParameterRule
from bsjax.models.qwen2_5_vl import QWEN2_5_VL
from bsjax.models.qwen2_vl import QWEN2_VL

FAMILIES: dict[str, Family] = {
    family.name: family for family in (QWEN2_VL, QWEN2_5_VL, GEMMA3, GEMMA3_TEXT)
}

__all__ = ["FAMILIES", "Cache", "Family", "ImageTextModel", "ParameterRule"]
