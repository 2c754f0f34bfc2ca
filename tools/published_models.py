"""The sizes of published models, as the configurations on the Hugging Face hub state them."""

from collections.abc import Callable

from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen2_vl_2b() -> PretrainedConfig:
    return Qwen2VLConfig(
        text_config={
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": True,
        },
        vision_config={"hidden_size": 1536, "embed_dim": 1280, "depth": 32, "num_heads": 16},
        tie_word_embeddings=True,
    )


def _qwen2_5_vl_7b() -> PretrainedConfig:
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "rope_parameters": _ROPE,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 1280,
            "out_hidden_size": 3584,
            "intermediate_size": 3420,
            "depth": 32,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=False,
    )


PUBLISHED_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen2-VL-2B": _qwen2_vl_2b,
    "Qwen2.5-VL-7B": _qwen2_5_vl_7b,
}
"""By name: what makes a model's configuration."""
