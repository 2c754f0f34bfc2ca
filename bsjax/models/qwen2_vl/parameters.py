"""Which source tensors Qwen2-VL's parameters are made from; Qwen2.5-VL reuses most rules."""

from transformers import PretrainedConfig

from bsjax.models.parameters import (
    EMBEDDING,
    ParameterRule,
    decoder_linear_rules,
    linear_rules,
    norm_rules,
    output_rules,
)


def parameter_table(config: PretrainedConfig) -> list[ParameterRule]:
    """All rules of a Qwen2-VL model."""
    depth = config.vision_config.depth
    target, source = ("visual", "blocks"), "model.visual.blocks.{layer}"
    return [
        *tower_rules(depth, norm_bias=True),
        *linear_rules((*target, "mlp", "fc1"), f"{source}.mlp.fc1", bias=True, layers=depth),
        *linear_rules((*target, "mlp", "fc2"), f"{source}.mlp.fc2", bias=True, layers=depth),
        *language_rules(config),
    ]


def tower_rules(depth: int, *, norm_bias: bool) -> list[ParameterRule]:
    """The rules of a vision tower, except for the MLPs of its blocks."""
    visual, blocks = ("visual",), ("visual", "blocks")
    source = "model.visual.blocks.{layer}"
    merger, merger_source = ("visual", "merger"), "model.visual.merger"
    return [
        ParameterRule(
            (*visual, "patch_embed", "proj", "kernel"),
            "model.visual.patch_embed.proj.weight",
            None,
            "flatten_patch",
        ),
        *norm_rules(("norm1", "norm2"), blocks, source, bias=norm_bias, layers=depth),
        *linear_rules((*blocks, "attn", "qkv"), f"{source}.attn.qkv", bias=True, layers=depth),
        *linear_rules((*blocks, "attn", "proj"), f"{source}.attn.proj", bias=True, layers=depth),
        *norm_rules(("ln_q",), merger, merger_source, bias=norm_bias, layers=None),
        *linear_rules((*merger, "mlp_0"), f"{merger_source}.mlp.0", bias=True),
        *linear_rules((*merger, "mlp_2"), f"{merger_source}.mlp.2", bias=True),
    ]


def language_rules(config: PretrainedConfig) -> list[ParameterRule]:
    """The rules of the language model and the output projection."""
    layers = config.text_config.num_hidden_layers
    model, source = ("language_model",), "model.language_model"
    target, layer_source = ("language_model", "layers"), f"{source}.layers.{{layer}}"
    rules = [
        EMBEDDING,
        *norm_rules(
            ("input_layernorm", "post_attention_layernorm"),
            target,
            layer_source,
            bias=False,
            layers=layers,
        ),
        *norm_rules(("norm",), model, source, bias=False, layers=None),
    ]
    biases = ("q_proj", "k_proj", "v_proj")
    return rules + decoder_linear_rules(layers, biases) + output_rules(config)
