"""Ports of vision-language models. `FAMILIES` maps a config's `model_type` to its family."""

from bsjax.models.cache import Cache
from bsjax.models.family import Architecture, Family
from bsjax.models.gemma3.family import Gemma3Family, Gemma3TextFamily
from bsjax.models.image_text_model import ImageTextModel
from bsjax.models.parameters import ParameterRule
from bsjax.models.qwen2_5_vl.family import Qwen2_5VLFamily
from bsjax.models.qwen2_vl.family import Qwen2VLFamily

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (Qwen2VLFamily(), Qwen2_5VLFamily(), Gemma3Family(), Gemma3TextFamily())
}

__all__ = ["FAMILIES", "Architecture", "Cache", "Family", "ImageTextModel", "ParameterRule"]
