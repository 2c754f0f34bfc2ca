"""Random transformers models, small by default, and our ports with the same parameters.

The ports are filled through their families' parameter tables, so that whatever uses these models
tests the tables as well.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from bsjax.models import FAMILIES
from bsjax.models.gemma3.vision_plan import grid_side, pooled_side
from bsjax.models.parameters import TRANSFORMS, canonical_key, tied_keys
from tests.support.parity import torch

TEXT_TOKENS = 250
VIDEO, IMAGE, IMAGE_START, IMAGE_END = range(TEXT_TOKENS, TEXT_TOKENS + 4)
VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """What distinguishes one random model from another. The defaults make a small one."""

    family: str
    layers: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    inner: int = 96
    vocabulary: int = VOCABULARY
    tied: bool = False
    vision_depth: int = 2
    vision_heads: int = 2
    vision_head_dim: int = 16
    vision_inner: int = 48
    patch_size: int = 4
    full_attention_blocks: tuple[int, ...] = (1,)
    """Of Qwen2.5-VL's tower."""
    hidden: int | None = None
    """Width of Gemma 3's language model; by default three quarters of its heads' width."""
    window: int = 12
    """Of Gemma 3's local layers: less than an image."""
    pattern: int = 3
    """Of Gemma 3: every `pattern`-th layer is global."""
    image_side: int = 8
    """Patches along a side of Gemma 3's images."""
    pooled: int = 2
    """Patches along a side of the blocks that become Gemma 3's image tokens."""
    softcap: float | None = None
    """Of Gemma 3's logits."""

    def with_family(self, family: str) -> Shape:
        return replace(self, family=family)


def small_config(shape: Shape) -> transformers.PretrainedConfig:
    """A config as on the hub."""
    if shape.family == "gemma3_text":
        return _gemma3_config(shape).text_config
    return _gemma3_config(shape) if shape.family == "gemma3" else _qwen_config(shape)


def _gemma3_config(shape: Shape) -> transformers.PretrainedConfig:
    return transformers.Gemma3Config(
        text_config={
            "hidden_size": shape.hidden or 3 * shape.q_heads * shape.head_dim // 4,
            "intermediate_size": shape.inner,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.q_heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            # Different from the head dimension, as in the published 27B.
            "query_pre_attn_scalar": shape.head_dim + 8,
            "vocab_size": shape.vocabulary,
            "sliding_window": shape.window,
            "sliding_window_pattern": shape.pattern,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1e5,
            "rope_local_base_freq": 1e3,
            "final_logit_softcapping": shape.softcap,
            "bos_token_id": 0,
            "eos_token_id": VOCABULARY - 1,
            "tie_word_embeddings": shape.tied,
        },
        vision_config={
            "hidden_size": shape.vision_heads * shape.vision_head_dim,
            "intermediate_size": shape.vision_inner,
            "num_hidden_layers": shape.vision_depth,
            "num_attention_heads": shape.vision_heads,
            "image_size": shape.image_side * shape.patch_size,
            "patch_size": shape.patch_size,
            "vision_use_head": False,
        },
        mm_tokens_per_image=(shape.image_side // shape.pooled) ** 2,
        image_token_index=IMAGE,
        boi_token_index=IMAGE_START,
        eoi_token_index=IMAGE_END,
        tie_word_embeddings=shape.tied,
    )


def _qwen_config(shape: Shape) -> transformers.PretrainedConfig:
    hidden = shape.q_heads * shape.head_dim
    vision_width = shape.vision_heads * shape.vision_head_dim
    section = 3 * shape.head_dim // 16
    vision = {
        "depth": shape.vision_depth,
        "num_heads": shape.vision_heads,
        "patch_size": shape.patch_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    if shape.family == "qwen2_vl":
        create = transformers.Qwen2VLConfig
        vision |= {
            "embed_dim": vision_width,
            "hidden_size": hidden,
            "mlp_ratio": max(shape.vision_inner // vision_width, 1),
        }
    else:
        create = transformers.Qwen2_5_VLConfig
        vision |= {
            "hidden_size": vision_width,
            "out_hidden_size": hidden,
            "intermediate_size": shape.vision_inner,
            "window_size": 8 * shape.patch_size,
            "fullatt_block_indexes": list(shape.full_attention_blocks),
        }
    return create(
        hidden_size=hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.q_heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        rope_scaling={
            "type": "mrope",
            "mrope_section": [shape.head_dim // 2 - 2 * section, section, section],
        },
        tie_word_embeddings=shape.tied,
        bos_token_id=0,
        eos_token_id=VOCABULARY - 1,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        vision_config=vision,
    )


def random_reference(config: transformers.PretrainedConfig, seed: int = 0) -> torch.nn.Module:
    """A transformers model in float32 with random values for all parameters.

    Biases are not 0 and norms are not 1, so that a test notices a missing one.
    """
    classes = {
        "qwen2_vl": transformers.Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": transformers.Qwen2_5_VLForConditionalGeneration,
        "gemma3": transformers.Gemma3ForConditionalGeneration,
        "gemma3_text": transformers.Gemma3ForCausalLM,
    }
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = classes[config.model_type]._from_config(config, dtype=torch.float32)
    model = model.to_empty(device="cpu").eval()
    model.tie_weights()
    from_one = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if "Gemma3RMS" in repr(type(module))
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                if config.tie_word_embeddings and "embed_tokens" in name:
                    fan_in = parameter.shape[1]
                parameter.normal_(std=fan_in**-0.5)
            else:
                from_zero = name.endswith("bias") or name in from_one
                parameter.normal_(mean=0.0 if from_zero else 1.0, std=0.2)
    _reset_buffers(model)
    return model


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`model` itself, with parameters of `dtype` and float32 rotary frequencies, as when loaded."""
    model.to(dtype)
    _reset_buffers(model)
    return model


def _reset_buffers(model: torch.nn.Module) -> None:
    """Restores buffers outside the state dict, which `to_empty` loses and a cast rounds.

    They are rotary frequencies, Gemma 3's embedding scale and its tower's position numbers.
    """
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.num_positions)[None]
        if hasattr(module, "full_attention_inv_freq") or hasattr(
            module, "sliding_attention_inv_freq"
        ):
            for name, buffer in type(module)(module.config).named_buffers():
                setattr(module, name, buffer)
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.original_inv_freq


def ported(reference: torch.nn.Module, dtype: Any = jnp.float32) -> nnx.Module:
    """Our port with the parameters of `reference`. Checks that all are used and none is missing."""
    config = reference.config
    family = FAMILIES[config.model_type]
    source = {
        canonical_key(name): tensor.float().numpy()
        for name, tensor in reference.state_dict().items()
    }
    unused = set(source) - tied_keys(config).keys()

    graph, state = nnx.split(nnx.eval_shape(lambda: family.build(config, dtype)))
    ours = dict(nnx.to_flat_state(state))
    unset = set(ours)
    for rule in family.parameter_table(config):
        tensors = [TRANSFORMS[rule.transform](source[key]) for key in rule.sources]
        array = tensors[0] if rule.layers is None else np.stack(tensors)
        assert array.shape == ours[rule.target].shape, rule
        ours[rule.target] = ours[rule.target].replace(jnp.asarray(array, dtype))
        unused -= set(rule.sources)
        unset.discard(rule.target)
    assert not unused, f"parameters of transformers that no rule reads: {sorted(unused)}"
    assert not unset, f"parameters of ours that no rule sets: {sorted(unset)}"
    return nnx.merge(graph, nnx.from_flat_state(ours))


def reference_inputs(reference: torch.nn.Module, prompt: Any) -> dict[str, torch.Tensor]:
    """The arguments of a transformers model for a prompt."""
    inputs = FAMILIES[reference.config.model_type].reference_inputs(prompt, reference.config)
    return {name: torch.tensor(array) for name, array in inputs.items()}


def reference_features(reference: torch.nn.Module, prompt: Any) -> np.ndarray:
    """Features of every image token of a prompt, float32 [image tokens, hidden]."""
    inputs = reference_inputs(reference, prompt)
    pixels = inputs["pixel_values"].to(reference.dtype)
    with torch.no_grad():
        if reference.config.model_type == "gemma3":
            features = reference.get_image_features(pixels, return_dict=True).pooler_output
            return features.flatten(0, 1).float().numpy()
        grid = inputs["image_grid_thw"]
        return reference.model.visual(pixels, grid_thw=grid).pooler_output.float().numpy()


@dataclass(frozen=True)
class RandomPrompt:
    """Token ids with image placeholders, and the pixels for them."""

    token_ids: np.ndarray
    grid_thw: np.ndarray
    pixel_values: np.ndarray | None
    image_tokens: tuple[int, ...]

    @property
    def pixels(self) -> np.ndarray | None:
        """As in a `Prompt`, but floats: any values, and every frame its own."""
        return self.pixel_values


def random_prompt(
    config: transformers.PretrainedConfig,
    merged_sizes: list[tuple[int, int]],
    *,
    adjacent: bool = False,
    seed: int = 0,
) -> RandomPrompt:
    """A prompt with an image of each of `merged_sizes` (rows and columns of image tokens).

    Gemma 3's images are all of the config's size. There is text of random length before, between
    and after the images; with `adjacent` nothing is between them, not even their delimiters.
    """
    random = np.random.default_rng(seed)
    vision = config.vision_config
    if config.model_type == "gemma3":
        merge, frames, channels = pooled_side(config), 1, vision.num_channels
        side = grid_side(config) // merge
        merged_sizes = [(side, side)] * len(merged_sizes)
    else:
        merge, frames = vision.spatial_merge_size, vision.temporal_patch_size
        channels = vision.in_channels

    def text(low: int, high: int) -> list[int]:
        return random.integers(1, TEXT_TOKENS, random.integers(low, high)).tolist()

    tokens = text(4, 9)
    for rows, columns in merged_sizes:
        image = [IMAGE] * (rows * columns)
        tokens += image if adjacent else [IMAGE_START, *image, IMAGE_END, *text(0, 5)]
    tokens += text(3, 9)
    grids = [(1, rows * merge, columns * merge) for rows, columns in merged_sizes]
    grid = np.asarray(grids, np.int64).reshape(-1, 3)
    pixels = channels * frames * vision.patch_size**2
    patches = int(grid.prod(axis=1).sum())
    return RandomPrompt(
        token_ids=np.asarray(tokens, np.int32),
        grid_thw=grid,
        pixel_values=random.standard_normal((patches, pixels), np.float32) if patches else None,
        image_tokens=tuple(rows * columns for rows, columns in merged_sizes),
    )
