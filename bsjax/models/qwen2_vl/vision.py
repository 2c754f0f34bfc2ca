"""Qwen2-VL's vision tower (transformers: Qwen2VisionTransformerPretrainedModel)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig

from bsjax.models.layers import Attend, activation, frequencies, rotate, scan_layers, stack_layers
from bsjax.models.pixels import Pixels, embedded
from bsjax.models.qwen2_vl.vision_plan import VisionPlan
from bsjax.models.vision import VisionMLP, segment_attention

EPSILON = 1e-6
"""Epsilon of all norms in the towers; the configs have no field for it."""

Norm = Callable[..., nnx.Module]
"""Creates a norm from its width, `param_dtype` and `rngs`."""

layer_norm = partial(nnx.LayerNorm, epsilon=EPSILON, use_fast_variance=False)


@dataclass(frozen=True)
class VisionRotaryEmbedding:
    """Rotary embedding of patches (transformers: Qwen2VLVisionRotaryEmbedding).

    Half of the frequencies use the patch's row, the other half its column.

    Attributes:
      theta: base of the frequencies.
      head_dim: a multiple of 4.
    """

    theta: float
    head_dim: int

    def __call__(
        self, positions: Int[Array, "patches 2"]
    ) -> tuple[Float[Array, "patches half"], Float[Array, "patches half"]]:
        """Cosines and sines, float32: first the row's, then the column's."""
        frequency = frequencies(self.theta, self.head_dim // 4)
        angle = positions[:, :, None].astype(jnp.float32) * frequency
        angle = angle.reshape(positions.shape[0], -1)
        return jnp.cos(angle), jnp.sin(angle)


class VisionAttention(nnx.Module):
    """Multi-head self-attention with one projection for q, k and v (VisionAttention)."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.heads = heads
        self.qkv = nnx.Linear(width, 3 * width, param_dtype=dtype, rngs=rngs)
        self.proj = nnx.Linear(width, width, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden: Float[Array, "patches width"],
        cos: Float[Array, "patches half"],
        sin: Float[Array, "patches half"],
        attend: Attend,
    ) -> Float[Array, "patches width"]:
        """The attention output of each patch."""
        patches = hidden.shape[0]
        q, k, v = jnp.moveaxis(self.qkv(hidden).reshape(patches, 3, self.heads, -1), 1, 0)
        attended = attend(rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.proj(attended.reshape(patches, -1))


class VisionBlock(nnx.Module):
    """Attention and MLP, each after a norm and with a residual (Qwen2VLVisionBlock)."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp: nnx.Module,
        *,
        norm: Norm,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.norm1 = norm(width, param_dtype=dtype, rngs=rngs)
        self.attn = VisionAttention(width, heads, dtype, rngs)
        self.norm2 = norm(width, param_dtype=dtype, rngs=rngs)
        self.mlp = mlp

    def __call__(
        self,
        hidden: Float[Array, "patches width"],
        cos: Float[Array, "patches half"],
        sin: Float[Array, "patches half"],
        attend: Attend,
    ) -> Float[Array, "patches width"]:
        """The next hidden state."""
        hidden = hidden + self.attn(self.norm1(hidden), cos, sin, attend)
        return hidden + self.mlp(self.norm2(hidden))


class PatchEmbed(nnx.Module):
    """Linear projection of flat patches: a convolution with stride equal to its kernel."""

    def __init__(self, config: PretrainedConfig, width: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.frames = config.temporal_patch_size
        pixels = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.proj = nnx.Linear(pixels, width, use_bias=False, param_dtype=dtype, rngs=rngs)

    def __call__(
        self, pixels: Pixels | Float[Array, "patches values"]
    ) -> Float[Array, "patches width"]:
        """Each patch's embedding, in the dtype of the parameters."""
        return embedded(pixels, self.proj.kernel[...], frames=self.frames)


class PatchMerger(nnx.Module):
    """Merges consecutive patches into one image token (transformers: PatchMerger)."""

    def __init__(
        self, width: int, hidden: int, merge: int, *, norm: Norm, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.merged_width = width * merge**2
        self.ln_q = norm(width, param_dtype=dtype, rngs=rngs)
        self.mlp_0 = nnx.Linear(self.merged_width, self.merged_width, param_dtype=dtype, rngs=rngs)
        self.mlp_2 = nnx.Linear(self.merged_width, hidden, param_dtype=dtype, rngs=rngs)
        self.act = activation("gelu")

    def __call__(self, hidden: Float[Array, "patches width"]) -> Float[Array, "merged hidden"]:
        """One row per `spatial_merge_size ** 2` patches."""
        merged = self.ln_q(hidden).reshape(-1, self.merged_width)
        return self.mlp_2(self.act(self.mlp_0(merged)))


class Qwen2VisionTransformer(nnx.Module):
    """Patch embedding, stacked blocks that attend within each image, and the merger."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        width, heads = config.embed_dim, config.num_heads
        inner = int(width * config.mlp_ratio)

        def create_block(rngs: nnx.Rngs) -> VisionBlock:
            mlp = VisionMLP(width, inner, config.hidden_act, dtype, rngs)
            return VisionBlock(width, heads, mlp, norm=layer_norm, dtype=dtype, rngs=rngs)

        self.heads = heads
        self.patch_embed = PatchEmbed(config, width, dtype, rngs)
        self.rotary_pos_emb = VisionRotaryEmbedding(
            config.rope_parameters["rope_theta"], width // heads
        )
        self.blocks = stack_layers(create_block, config.depth, rngs)
        self.merger = PatchMerger(
            width,
            config.hidden_size,
            config.spatial_merge_size,
            norm=layer_norm,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, pixels: Pixels | Float[Array, "patches values"], plan: VisionPlan, *, backend: str
    ) -> Float[Array, "merged hidden"]:
        """Features of image tokens; see `ImageTextModel.encode_images`."""
        attend = segment_attention(plan.schedule, self.heads, backend)
        cos, sin = self.rotary_pos_emb(plan.positions)

        def step(block: VisionBlock, hidden: Array, _: None) -> tuple[Array, None]:
            return block(hidden, cos, sin, attend), None

        hidden, _ = scan_layers(self.blocks, step, self.patch_embed(pixels))
        return self.merger(hidden)
