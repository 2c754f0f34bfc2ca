"""Gemma 3's vision tower and projector (SiglipVisionModel, Gemma3MultiModalProjector)."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from transformers import PretrainedConfig

from bsjax.errors import CheckpointError
from bsjax.models.gemma3.text import RMSNorm
from bsjax.models.gemma3.vision_plan import VisionPlan, grid_side, pooled_side
from bsjax.models.layers import Attend, scan_layers, stack_layers
from bsjax.models.pixels import Pixels, embedded
from bsjax.models.vision import VisionMLP, segment_attention


class SiglipVisionEmbeddings(nnx.Module):
    """Linear projection of flat patches plus learned positions (SiglipVisionEmbeddings)."""

    def __init__(self, config: PretrainedConfig, patches: int, dtype: Any, rngs: nnx.Rngs) -> None:
        pixels = config.num_channels * config.patch_size**2
        self.patch_embedding = nnx.Linear(pixels, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.position_embedding = nnx.Embed(
            patches, config.hidden_size, param_dtype=dtype, rngs=rngs
        )

    def __call__(
        self, pixels: Pixels | Float[Array, "patches values"], position: Int[Array, "patches"]
    ) -> Float[Array, "patches width"]:
        """Each patch's embedding, in the dtype of the parameters."""
        assert self.patch_embedding.bias is not None
        embeddings = embedded(pixels, self.patch_embedding.kernel[...])
        return embeddings + self.patch_embedding.bias[...] + self.position_embedding(position)


class SiglipAttention(nnx.Module):
    """Multi-head self-attention (transformers: SiglipAttention)."""

    def __init__(self, width: int, heads: int, dtype: Any, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, width, width, param_dtype=dtype, rngs=rngs)
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))

    def __call__(
        self, hidden: Float[Array, "patches width"], attend: Attend
    ) -> Float[Array, "patches width"]:
        """The attention output of each patch."""
        patches = hidden.shape[0]
        q, k, v = (
            projection(hidden).reshape(patches, self.heads, -1)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(attend(q, k, v).reshape(patches, -1))


class SiglipEncoderLayer(nnx.Module):
    """Attention and MLP, each after a norm and with a residual (SiglipEncoderLayer)."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        width = config.hidden_size
        norm = partial(layer_norm, config, dtype, rngs)
        self.layer_norm1 = norm()
        self.self_attn = SiglipAttention(width, config.num_attention_heads, dtype, rngs)
        self.layer_norm2 = norm()
        self.mlp = VisionMLP(width, config.intermediate_size, config.hidden_act, dtype, rngs)

    def __call__(
        self, hidden: Float[Array, "patches width"], attend: Attend
    ) -> Float[Array, "patches width"]:
        """The next hidden state."""
        hidden = hidden + self.self_attn(self.layer_norm1(hidden), attend)
        return hidden + self.mlp(self.layer_norm2(hidden))


class SiglipVisionModel(nnx.Module):
    """Patch embedding, stacked layers that attend within images, final norm (SiglipVisionModel).

    Raises:
      CheckpointError: the config asks for a pooling head, or its sizes do not match.
    """

    def __init__(self, config: PretrainedConfig, patches: int, dtype: Any, rngs: nnx.Rngs) -> None:
        if config.vision_use_head:
            raise CheckpointError(
                "The config asks for vision_use_head, a pooling head that Gemma 3 does not use."
            )
        if config.hidden_size % config.num_attention_heads:
            raise CheckpointError(
                f"The vision config's hidden_size {config.hidden_size} is not a multiple of its "
                f"{config.num_attention_heads} attention heads."
            )
        self.heads = config.num_attention_heads
        self.embeddings = SiglipVisionEmbeddings(config, patches, dtype, rngs)
        self.layers = stack_layers(
            lambda rngs: SiglipEncoderLayer(config, dtype, rngs), config.num_hidden_layers, rngs
        )
        self.post_layernorm = layer_norm(config, dtype, rngs)

    def __call__(
        self, pixels: Pixels | Float[Array, "patches values"], plan: VisionPlan, *, backend: str
    ) -> Float[Array, "patches width"]:
        """Hidden states of every patch, after the final norm."""
        attend = segment_attention(plan.schedule, self.heads, backend)

        def step(layer: SiglipEncoderLayer, hidden: Array, _: None) -> tuple[Array, None]:
            return layer(hidden, attend), None

        hidden, _ = scan_layers(self.layers, step, self.embeddings(pixels, plan.position))
        return self.post_layernorm(hidden)


class Gemma3MultiModalProjector(nnx.Module):
    """Pools blocks of patches into image tokens of the language model's width."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        vision = config.vision_config
        self.patches_per_token = pooled_side(config) ** 2
        self.mm_soft_emb_norm = RMSNorm(vision.hidden_size, vision.layer_norm_eps, dtype)
        self.mm_input_projection = nnx.Linear(
            vision.hidden_size,
            config.text_config.hidden_size,
            use_bias=False,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, hidden: Float[Array, "patches width"]) -> Float[Array, "merged hidden"]:
        """The mean of each block, normalised and projected."""
        blocks = hidden.reshape(-1, self.patches_per_token, hidden.shape[-1])
        pooled = jnp.mean(blocks, axis=1, dtype=jnp.float32).astype(hidden.dtype)
        return self.mm_input_projection(self.mm_soft_emb_norm(pooled))


def layer_norm(config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm with the tower's settings."""
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        param_dtype=dtype,
        rngs=rngs,
    )


def vision_tower(config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> SiglipVisionModel:
    """The tower that a whole model's config asks for."""
    return SiglipVisionModel(config.vision_config, grid_side(config) ** 2, dtype, rngs)
