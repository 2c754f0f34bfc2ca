"""Models of published sizes with random weights, which answer prompts like any loaded model.

No checkpoint is needed: the tokenizer, the chat template and the image settings are those of the
small random checkpoint in tests/. Its ids fit any vocabulary that is as long as its own.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from transformers import GenerationConfig, PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

from bsjax.checkpoint import LoadedModel, read_prompt_files
from bsjax.models import FAMILIES

_TINY = Path(__file__).resolve().parent.parent / "tests" / "tiny-qwen2.5-vl"


def _size(
    family: str,
    hidden: int,
    layers: int,
    heads: tuple[int, int],
    inner: int,
    vocabulary: int,
    tied: bool,
    vision: dict[str, Any],
) -> dict[str, Any]:
    return {
        "family": family,
        "text": {
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads[0],
            "num_key_value_heads": heads[1],
            "intermediate_size": inner,
            "vocab_size": vocabulary,
        },
        "tied": tied,
        "vision": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, **vision},
    }


_QWEN2_TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4}
_QWEN2_5_TOWER = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
_SMALL_TOWER = {
    "depth": 4,
    "hidden_size": 320,
    "num_heads": 4,
    "intermediate_size": 860,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
}
#: Published sizes, and two for CPUs: `small` takes a minute, `tiny` a second.
SIZES = {
    "qwen2-vl-2b": _size("qwen2_vl", 1536, 28, (12, 2), 8960, 151936, True, _QWEN2_TOWER),
    "qwen2-vl-7b": _size("qwen2_vl", 3584, 28, (28, 4), 18944, 152064, False, _QWEN2_TOWER),
    "qwen2.5-vl-3b": _size("qwen2_5_vl", 2048, 36, (16, 2), 11008, 151936, True, _QWEN2_5_TOWER),
    "qwen2.5-vl-7b": _size("qwen2_5_vl", 3584, 28, (28, 4), 18944, 152064, False, _QWEN2_5_TOWER),
    "small": _size("qwen2_5_vl", 512, 6, (8, 2), 1408, 8192, True, _SMALL_TOWER),
    "tiny": _size(
        "qwen2_5_vl",
        128,
        2,
        (2, 1),
        128,
        1024,
        True,
        _SMALL_TOWER
        | {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 1,
            "intermediate_size": 64,
            "fullatt_block_indexes": [1],
        },
    ),
}


def model_config(size: str) -> PretrainedConfig:
    """The configuration of a size, with the special tokens of the small checkpoint."""
    chosen = SIZES[size]
    special = read_prompt_files(_TINY).config
    text = chosen["text"]
    quarter = text["hidden_size"] // text["num_attention_heads"] // 8
    is_qwen2 = chosen["family"] == "qwen2_vl"
    width = {"hidden_size" if is_qwen2 else "out_hidden_size": text["hidden_size"]}
    create = Qwen2VLConfig if is_qwen2 else Qwen2_5_VLConfig
    return create(
        text_config={
            **text,
            # More than published: prompts of any length are measured.
            "max_position_embeddings": 2**20,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1_000_000.0,
                # 16, 24 and 24 of the 64 frequencies of the published head dimension of 128.
                "mrope_section": [quarter, 3 * quarter // 2, 3 * quarter // 2],
            },
            "tie_word_embeddings": chosen["tied"],
            "bos_token_id": special.text_config.bos_token_id,
            "eos_token_id": special.text_config.eos_token_id,
            "pad_token_id": special.text_config.pad_token_id,
        },
        vision_config={**chosen["vision"], **width},
        image_token_id=special.image_token_id,
        video_token_id=special.video_token_id,
        vision_start_token_id=special.vision_start_token_id,
        vision_end_token_id=special.vision_end_token_id,
        tie_word_embeddings=chosen["tied"],
    )


def random_module(config: PretrainedConfig, dtype: Any) -> nnx.Module:
    """Random parameters made where they stay, at a scale that keeps sums finite."""
    family = FAMILIES[config.model_type]
    graph, state = nnx.split(nnx.eval_shape(lambda: family.build(config, dtype)))
    variables = nnx.to_flat_state(state)

    @jax.jit
    def draw() -> list[jax.Array]:
        # XLA's own generator: one operation for each parameter, where JAX's default is a hundred.
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


def loaded_model(config: PretrainedConfig, module: nnx.Module, dtype: Any) -> LoadedModel:
    """A model ready to answer, as `bsjax.load` gives."""
    files = read_prompt_files(_TINY)
    return LoadedModel(
        module=module,
        config=config,
        family=FAMILIES[config.model_type],
        tokenizer=files.tokenizer,
        image_processor=files.image_processor,
        # No token ends an answer: there is just one.
        generation_config=GenerationConfig(),
        dtype=np.dtype(dtype),
        path=_TINY,
        fingerprint="0" * 64,
    )
