"""The family of Qwen2.5-VL."""

from typing import Any

from transformers import PretrainedConfig
from typing_extensions import override

from bsjax.models.parameters import ParameterRule
from bsjax.models.qwen2_5_vl.parameters import parameter_table
from bsjax.models.qwen2_5_vl.vision import Qwen2_5VisionTransformer
from bsjax.models.qwen2_5_vl.vision_plan import vision_plan
from bsjax.models.qwen2_vl.family import Qwen2VLFamily
from bsjax.models.qwen2_vl.model import Qwen2VLForConditionalGeneration


class Qwen2_5VLFamily(Qwen2VLFamily):
    """Qwen2-VL with a different vision tower."""

    name = "qwen2_5_vl"

    @override
    def build(self, config: PretrainedConfig, dtype: Any) -> Qwen2VLForConditionalGeneration:
        return Qwen2VLForConditionalGeneration.from_config(
            config, dtype, tower=Qwen2_5VisionTransformer
        )

    @override
    def parameter_table(self, config: PretrainedConfig) -> list[ParameterRule]:
        return parameter_table(config)

    @override
    def vision_head_dim(self, config: PretrainedConfig) -> int:
        return config.vision_config.hidden_size // config.vision_config.num_heads

    vision_plan = staticmethod(vision_plan)
