"""Which source tensors Qwen2.5-VL's parameters are made from."""

from transformers import PretrainedConfig

from bsjax.models.parameters import ParameterRule, linear_rules
from bsjax.models.qwen2_vl.parameters import language_rules, tower_rules


def parameter_table(config: PretrainedConfig) -> list[ParameterRule]:
    """All rules of a Qwen2.5-VL model: gated MLPs and norms without biases in the tower."""
    depth = config.vision_config.depth
    rules = tower_rules(depth, norm_bias=False)
    for name in ("gate_proj", "up_proj", "down_proj"):
        rules += linear_rules(
            ("visual", "blocks", "mlp", name),
            f"model.visual.blocks.{{layer}}.mlp.{name}",
            bias=True,
            layers=depth,
        )
    return rules + language_rules(config)
