"""Models of published sizes with random weights, which answer prompts like any loaded model.

No checkpoint has to be downloaded: tokenizer, chat template and image settings are those of
examples/tiny-qwen2.5-vl, whose token ids are valid in any vocabulary that is at least as large.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from PIL import Image
from transformers import (
    Gemma3Config,
    Gemma3ImageProcessorPil,
    GenerationConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
)

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax.checkpoint.loading import LoadedModel, read_processor
from bsjax.models import FAMILIES

_TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny-qwen2.5-vl"
_IMAGE_IN_TEMPLATE = "<|vision_start|><|image_pad|><|vision_end|>"


_SMALL_TEXT = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 1408,
    "vocab_size": 8192,
}


def _qwen(
    kind: type[PretrainedConfig], text: dict[str, Any], vision: dict[str, Any]
) -> PretrainedConfig:
    quarter = text["hidden_size"] // text["num_attention_heads"] // 8
    return kind(
        text_config={
            **text,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                # 16, 24 and 24 of the 64 frequencies of the published head dimension of 128.
                "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
            },
            "tie_word_embeddings": True,
        },
        vision_config=vision,
        tie_word_embeddings=True,
    )


def _small() -> PretrainedConfig:
    return _qwen(
        Qwen2_5_VLConfig,
        _SMALL_TEXT,
        {
            "depth": 4,
            "hidden_size": 320,
            "num_heads": 4,
            "intermediate_size": 860,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "out_hidden_size": 512,
        },
    )


def _small_qwen2_vl() -> PretrainedConfig:
    return _qwen(
        Qwen2VLConfig,
        _SMALL_TEXT,
        {"depth": 4, "embed_dim": 320, "num_heads": 4, "mlp_ratio": 4, "hidden_size": 512},
    )


def _tiny() -> PretrainedConfig:
    return _qwen(
        Qwen2_5_VLConfig,
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 128,
            "vocab_size": 1024,
        },
        {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 1,
            "intermediate_size": 64,
            "fullatt_block_indexes": [1],
            "window_size": 112,
            "out_hidden_size": 128,
        },
    )


def _gemma_3(text: dict[str, Any], image_side: int, image_tokens: int = 256) -> PretrainedConfig:
    return Gemma3Config(
        text_config={"head_dim": 64, "query_pre_attn_scalar": 64, "intermediate_size": 512, **text},
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 64,
            "image_size": image_side,
            "patch_size": 14,
            "vision_use_head": False,
        },
        mm_tokens_per_image=image_tokens,
    )


def _small_gemma_3() -> PretrainedConfig:
    """Five local layers and a global one; 256 tokens per image, one for each patch."""
    return _gemma_3(
        {
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 8192,
            "sliding_window": 1024,
        },
        image_side=224,
    )


def _tiny_gemma_3() -> PretrainedConfig:
    """A local layer with a window of 8, and a global one; 4 tokens per image, each of 4 patches."""
    return _gemma_3(
        {
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 1024,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
        },
        image_side=56,
        image_tokens=4,
    )


SIZES: dict[str, Callable[[], PretrainedConfig]] = {
    **{name.lower(): create for name, create in PUBLISHED_MODELS.items()},
    "small": _small,
    "tiny": _tiny,
    "small-qwen2-vl": _small_qwen2_vl,
    "small-gemma-3": _small_gemma_3,
    "tiny-gemma-3": _tiny_gemma_3,
}
"""Published sizes, and sizes for CPUs: `small` takes a minute, `tiny` a second."""


def model_config(size: str) -> PretrainedConfig:
    """The configuration of a size, with the special tokens of the tiny checkpoint."""
    config, special = SIZES[size](), read_processor(_TINY).config
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, name, getattr(special.text_config, name))
    # More positions than published, so that prompts of any length can be measured.
    text.max_position_embeddings = 2**20
    if config.model_type == "gemma3":
        config.image_token_index = special.image_token_id
        config.boi_token_index = special.vision_start_token_id
        config.eoi_token_index = special.vision_end_token_id
    else:
        for name in ("image", "video", "vision_start", "vision_end"):
            setattr(config, f"{name}_token_id", getattr(special, f"{name}_token_id"))
    return config


def random_module(config: PretrainedConfig, dtype: Any) -> nnx.Module:
    """Random parameters, made on the device, at a scale that keeps sums finite."""
    family = FAMILIES[config.model_type]
    graph, state = nnx.split(nnx.eval_shape(lambda: family.build(config, dtype)))
    variables = nnx.to_flat_state(state)

    @jax.jit
    def draw() -> list[jax.Array]:
        # XLA's own generator takes one operation per parameter, JAX's default about a hundred.
        keys = jax.random.split(jax.random.key(0, impl="rbg"), len(variables))
        return [
            _parameter(str(path[-1]), key, variable.shape, variable.dtype)
            for key, (path, variable) in zip(keys, variables, strict=True)
        ]

    filled = {
        path: variable.replace(array)
        for (path, variable), array in zip(variables, draw(), strict=True)
    }
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _parameter(name: str, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    # Matrices are [..., in, out], embeddings [vocabulary, hidden].
    mean, deviation = {
        "scale": (1.0, 0.1),
        "bias": (0.0, 0.1),
        "embedding": (0.0, shape[-1] ** -0.5),
    }.get(name, (0.0, shape[-2] ** -0.5 if len(shape) > 1 else 1.0))
    return (mean + deviation * jax.random.normal(key, shape)).astype(dtype)


def noise_image(
    model: LoadedModel, size: tuple[int, int], random: np.random.Generator
) -> dict[str, Any]:
    """The part of a message with an image of noise.

    Args:
      model: the model that reads it.
      size: width and height in pixels, which it keeps if the model scales images.
      random: draws it.
    """
    pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    scaled = {}
    if "max_pixels" in model.family.image_options:
        scaled = {"max_pixels": size[0] * size[1], "min_pixels": size[0] * size[1]}
    return {"type": "image", "image": Image.fromarray(pixels), **scaled}


def loaded_model(config: PretrainedConfig, module: nnx.Module, dtype: Any) -> LoadedModel:
    """A model ready to answer, as `bsjax.load` returns it."""
    processor = read_processor(_TINY)
    tokenizer, image_processor = processor.tokenizer, processor.image_processor
    if config.model_type == "gemma3":
        # Gemma 3's chat templates write only the start token of an image.
        template = tokenizer.chat_template
        assert isinstance(template, str) and _IMAGE_IN_TEMPLATE in template
        tokenizer.chat_template = template.replace(_IMAGE_IN_TEMPLATE, "<|vision_start|>")
        side = config.vision_config.image_size
        image_processor = Gemma3ImageProcessorPil(size={"height": side, "width": side})
    return LoadedModel(
        module=module,
        config=config,
        family=FAMILIES[config.model_type],
        tokenizer=tokenizer,
        image_processor=image_processor,
        # No token ends an answer: benchmarks generate just one.
        generation_config=GenerationConfig(),
        dtype=np.dtype(dtype),
        stored_dtype=np.dtype(dtype).name,
        path=_TINY,
        fingerprint="0" * 64,
    )
