"""Configurations of published models, with the sizes that are on the Hugging Face hub."""

from collections.abc import Callable
from typing import Any

from transformers import Gemma3Config, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

_ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}


def _qwen_text(
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    inner: int,
    vocabulary: int,
    positions: int,
    *,
    tied: bool,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": 1e-6,
        "rope_parameters": _ROPE,
        "tie_word_embeddings": tied,
    }


def _qwen2_vl(text: dict[str, Any]) -> PretrainedConfig:
    return Qwen2VLConfig(
        text_config=text,
        vision_config={
            "hidden_size": text["hidden_size"],
            "embed_dim": 1280,
            "depth": 32,
            "num_heads": 16,
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _qwen2_5_vl(text: dict[str, Any]) -> PretrainedConfig:
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            "hidden_size": 1280,
            "out_hidden_size": text["hidden_size"],
            "intermediate_size": 3420,
            "depth": 32,
            "num_heads": 16,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _gemma_3(
    hidden: int, layers: int, heads: tuple[int, int], head_dim: int, inner: int, scalar: int
) -> PretrainedConfig:
    return Gemma3Config(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "head_dim": head_dim,
            "query_pre_attn_scalar": scalar,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        vision_config={
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 896,
            "patch_size": 14,
            "vision_use_head": False,
        },
    )


PUBLISHED_MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "Qwen2-VL-2B": lambda: _qwen2_vl(_qwen_text(1536, 28, (12, 2), 8960, 151936, 32768, tied=True)),
    "Qwen2-VL-7B": lambda: _qwen2_vl(
        _qwen_text(3584, 28, (28, 4), 18944, 152064, 32768, tied=False)
    ),
    "Qwen2-VL-72B": lambda: _qwen2_vl(
        _qwen_text(8192, 80, (64, 8), 29568, 152064, 32768, tied=False)
    ),
    "Qwen2.5-VL-3B": lambda: _qwen2_5_vl(
        _qwen_text(2048, 36, (16, 2), 11008, 151936, 128000, tied=True)
    ),
    "Qwen2.5-VL-7B": lambda: _qwen2_5_vl(
        _qwen_text(3584, 28, (28, 4), 18944, 152064, 128000, tied=False)
    ),
    "Qwen2.5-VL-72B": lambda: _qwen2_5_vl(
        _qwen_text(8192, 80, (64, 8), 29568, 152064, 128000, tied=False)
    ),
    "Gemma-3-4B": lambda: _gemma_3(2560, 34, (8, 4), 256, 10240, 256),
    "Gemma-3-12B": lambda: _gemma_3(3840, 48, (16, 8), 256, 15360, 256),
    "Gemma-3-27B": lambda: _gemma_3(5376, 62, (32, 16), 128, 21504, 168),
}
"""Functions that make a model's configuration, by the model's name."""
