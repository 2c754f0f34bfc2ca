"""Parameter tables cover what transformers saves, in every layout on the hub."""

import jax.numpy as jnp
import pytest
from flax import nnx
from transformers import CONFIG_MAPPING

from bsjax.errors import CheckpointError
from bsjax.models import FAMILIES
from bsjax.models.parameters import canonical_key, tied_keys
from tests.support.small_models import Shape, random_reference, small_config

FAMILY_NAMES = ("qwen2_vl", "qwen2_5_vl", "gemma3")
QWEN_FAMILIES = FAMILY_NAMES[:2]
LAYOUTS = {
    "nested": {},
    "flat": {
        "model.visual.": "visual.",
        "model.vision_tower.": "vision_tower.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "model.",
    },
    "language model first": {
        "model.visual.": "visual.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    },
    "nested, tower in a tower": {"model.vision_tower.": "model.vision_tower.vision_model."},
}

for_families = pytest.mark.parametrize("family", FAMILY_NAMES)


@pytest.mark.parity
@for_families
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tied", [False, True])
def test_every_key_of_every_layout_is_read(family, layout, tied):
    config = small_config(Shape(family, tied=tied))
    keys = list(random_reference(config).state_dict())
    renamed = []
    for key in keys:
        prefix = next((prefix for prefix in LAYOUTS[layout] if key.startswith(prefix)), "")
        renamed.append(LAYOUTS[layout].get(prefix, "") + key.removeprefix(prefix))
    is_same = layout.startswith("nested") if "qwen" in family else layout == "nested"
    assert (renamed == keys) == is_same

    rules = FAMILIES[family].parameter_table(config)
    sources = [source for rule in rules for source in rule.sources]
    assert len(sources) == len(set(sources))
    assert {canonical_key(key) for key in renamed} - tied_keys(config).keys() == set(sources)


@pytest.mark.parity
@for_families
@pytest.mark.parametrize("top", [False, True])
@pytest.mark.parametrize("text", [False, True])
def test_embeddings_are_tied_as_in_transformers(family, top, text):
    """config.json can say so at its top or in text_config; families differ in which one counts."""
    contents = small_config(Shape(family)).to_dict()
    contents["tie_word_embeddings"] = top
    contents["text_config"]["tie_word_embeddings"] = text
    config = CONFIG_MAPPING[family].from_dict(contents)
    reference = random_reference(config)
    tied = reference.lm_head.weight is reference.get_input_embeddings().weight
    targets = {rule.target for rule in FAMILIES[family].parameter_table(config)}
    assert (("lm_head", "kernel") in targets) == (not tied)
    assert ("lm_head.weight" in tied_keys(config)) == tied


@for_families
def test_building_creates_nothing_under_eval_shape(family):
    """Tested at the size of a real model, whose parameters would not fit in memory."""
    shape = Shape(
        family, layers=80, q_heads=64, kv_heads=8, head_dim=128, inner=29568, vocabulary=152064
    )
    config = small_config(shape)
    model = nnx.eval_shape(lambda: FAMILIES[family].build(config, jnp.bfloat16))
    state = dict(nnx.to_flat_state(nnx.state(model)))
    assert state["language_model", "layers", "mlp", "up_proj", "kernel"].shape[::2] == (80, 29568)
    assert {parameter.dtype for parameter in state.values()} == {jnp.dtype(jnp.bfloat16)}
    assert set(state) == {rule.target for rule in FAMILIES[family].parameter_table(config)}


@pytest.mark.parametrize("family", QWEN_FAMILIES)
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_type 'yarn'"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 4, 4]}},
            "add up to half the head dimension, 8",
        ),
        ({"hidden_act": "tanh"}, "activation function 'tanh'"),
        ({"hidden_size": 66}, "66 is not a multiple of its 4"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of its 3"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a number above 0, got 0"),
    ],
)
def test_configs_that_are_refused(family, setting, message):
    config = small_config(Shape(family))
    for name, value in setting.items():
        setattr(config.text_config, name, value)
    with pytest.raises(CheckpointError, match=message):
        nnx.eval_shape(lambda: FAMILIES[family].build(config, jnp.float32))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"sliding_window": None}, "sliding_window must be"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types must name"),
        ({"layer_types": ["full_attention"]}, "for each of its 2 layers"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4},
                                 "sliding_attention": {"rope_theta": 1e4}}},
            "rope_type 'yarn' in full_attention layers",
        ),
        ({"hidden_activation": "tanh"}, "activation function 'tanh'"),
        ({"num_key_value_heads": 3}, "4 attention heads are not a multiple of its 3"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"head_dim": 0}, "head_dim must be a number above 0"),
        ({"query_pre_attn_scalar": -4}, "query_pre_attn_scalar must be a number above 0, got -4"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping must be a number above 0"),
        ({"num_hidden_layers": 0, "layer_types": []}, "num_hidden_layers must be a number above 0"),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 1e4},
                                 "sliding_attention": {"rope_theta": 1e4}}},
            "factor of the rotary embedding in full_attention layers must be a number above 0",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4},
                                 "sliding_attention": {"rope_theta": 0}}},
            "rope_theta of the rotary embedding in sliding_attention layers must be",
        ),
    ],
)  # fmt: skip
def test_text_configs_of_gemma3_that_are_refused(setting, message):
    config = small_config(Shape("gemma3"))
    for name, value in setting.items():
        setattr(config.text_config, name, value)
    with pytest.raises(CheckpointError, match=message):
        nnx.eval_shape(lambda: FAMILIES["gemma3"].build(config, jnp.float32))


@pytest.mark.parametrize(
    ("place", "setting", "message"),
    [
        ("vision_config", {"vision_use_head": True}, "vision_use_head"),
        ("vision_config", {"num_attention_heads": 3}, "32 is not a multiple of its 3"),
        (None, {"mm_tokens_per_image": 9}, "9 tokens per image"),
        (None, {"mm_tokens_per_image": 15}, "15 tokens per image"),
    ],
)
def test_vision_configs_of_gemma3_that_are_refused(place, setting, message):
    config = small_config(Shape("gemma3"))
    for name, value in setting.items():
        setattr(getattr(config, place) if place else config, name, value)
    with pytest.raises(CheckpointError, match=message):
        nnx.eval_shape(lambda: FAMILIES["gemma3"].build(config, jnp.float32))
