"""Which source tensors Gemma 3's parameters are made from."""

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
    """All rules of a Gemma 3 model."""
    return [*tower_rules(config), *projector_rules(), *language_rules(config)]


def tower_rules(config: PretrainedConfig) -> list[ParameterRule]:
    """The rules of the vision tower."""
    depth = config.vision_config.num_hidden_layers
    tower, source = ("vision_tower",), "model.vision_tower"
    layers, layer_source = (*tower, "layers"), f"{source}.encoder.layers.{{layer}}"
    embeddings, embeddings_source = (*tower, "embeddings"), f"{source}.embeddings"
    rules = [
        ParameterRule(
            (*embeddings, "patch_embedding", "kernel"),
            f"{embeddings_source}.patch_embedding.weight",
            None,
            "flatten_patch",
        ),
        ParameterRule(
            (*embeddings, "patch_embedding", "bias"),
            f"{embeddings_source}.patch_embedding.bias",
            None,
            "copy",
        ),
        ParameterRule(
            (*embeddings, "position_embedding", "embedding"),
            f"{embeddings_source}.position_embedding.weight",
            None,
            "copy",
        ),
        *norm_rules(("layer_norm1", "layer_norm2"), layers, layer_source, bias=True, layers=depth),
        *norm_rules(("post_layernorm",), tower, source, bias=True, layers=None),
    ]
    for part, name in (
        *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
        ("mlp", "fc1"),
        ("mlp", "fc2"),
    ):
        rules += linear_rules(
            (*layers, part, name), f"{layer_source}.{part}.{name}", bias=True, layers=depth
        )
    return rules


def projector_rules() -> list[ParameterRule]:
    """The rules of the projector, whose matrix is stored [in, out]."""
    projector, source = ("multi_modal_projector",), "model.multi_modal_projector"
    return [
        ParameterRule(
            (*projector, "mm_input_projection", "kernel"),
            f"{source}.mm_input_projection_weight",
            None,
            "copy",
        ),
        *norm_rules(("mm_soft_emb_norm",), projector, source, bias=False, layers=None),
    ]


def language_rules(config: PretrainedConfig) -> list[ParameterRule]:
    """The rules of the language model and the output projection."""
    text = config.get_text_config()
    count = text.num_hidden_layers
    model, source = ("language_model",), "model.language_model"
    layers, layer_source = (*model, "layers"), f"{source}.layers.{{layer}}"
    rules = [
        EMBEDDING,
        *norm_rules(
            (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            ),
            layers,
            layer_source,
            bias=False,
            layers=count,
        ),
        *norm_rules(
            ("q_norm", "k_norm"),
            (*layers, "self_attn"),
            f"{layer_source}.self_attn",
            bias=False,
            layers=count,
        ),
        *norm_rules(("norm",), model, source, bias=False, layers=None),
    ]
    biases = ("q_proj", "k_proj", "v_proj", "o_proj") if text.attention_bias else ()
    return rules + decoder_linear_rules(count, biases) + output_rules(config)
