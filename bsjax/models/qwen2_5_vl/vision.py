"""Qwen2.5-VL's vision tower (transformers: Qwen2_5_VisionTransformerPretrainedModel)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from transformers import PretrainedConfig

from bsjax.models.layers import Attend, GatedMLP, scan_layers, stack_layers
from bsjax.models.pixels import Pixels, in_order
from bsjax.models.qwen2_vl.vision import (
    EPSILON,
    PatchEmbed,
    PatchMerger,
    VisionBlock,
    VisionRotaryEmbedding,
)
from bsjax.models.qwen2_vl.vision_plan import VisionPlan
from bsjax.models.vision import segment_attention

_rms_norm = partial(nnx.RMSNorm, epsilon=EPSILON)


class Qwen2_5VisionTransformer(nnx.Module):
    """Blocks with RMS norms and gated MLPs. Most attend within windows, some within images."""

    def __init__(self, config: PretrainedConfig, dtype: Any, rngs: nnx.Rngs) -> None:
        width, heads = config.hidden_size, config.num_heads

        def create_block(rngs: nnx.Rngs) -> VisionBlock:
            mlp = GatedMLP(
                width,
                config.intermediate_size,
                config.hidden_act,
                bias=True,
                dtype=dtype,
                rngs=rngs,
            )
            return VisionBlock(width, heads, mlp, norm=_rms_norm, dtype=dtype, rngs=rngs)

        self.heads = heads
        self.depth = config.depth
        self.fullatt_block_indexes = tuple(config.fullatt_block_indexes)
        self.patch_embed = PatchEmbed(config, width, dtype, rngs)
        self.rotary_pos_emb = VisionRotaryEmbedding(
            config.rope_parameters["rope_theta"], width // heads
        )
        self.blocks = stack_layers(create_block, config.depth, rngs)
        self.merger = PatchMerger(
            width,
            config.out_hidden_size,
            config.spatial_merge_size,
            norm=_rms_norm,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, pixels: Pixels | Float[Array, "patches values"], plan: VisionPlan, *, backend: str
    ) -> Float[Array, "merged hidden"]:
        """Features of image tokens; see `ImageTextModel.encode_images`."""
        assert plan.window_schedule is not None, "the plan must come from this family's vision_plan"
        attend_image = segment_attention(plan.schedule, self.heads, backend)
        attend_window = segment_attention(plan.window_schedule, self.heads, backend)
        return self.run_blocks(pixels, plan, (attend_image, attend_window))

    def run_blocks(
        self,
        pixels: Pixels | Float[Array, "patches values"],
        plan: VisionPlan,
        attends: Sequence[Attend],
    ) -> Float[Array, "merged hidden"]:
        """Runs the tower with the caller's attention; the plan's schedules are not used.

        Args:
          pixels: as for `ImageTextModel.encode_images`.
          plan: from this family's `vision_plan`.
          attends: attention within images, and attention within windows.
        """
        attend_image, attend_window = attends
        cos, sin = self.rotary_pos_emb(plan.positions)

        def step(block: VisionBlock, hidden: Array, sees_image: Array) -> tuple[Array, None]:
            # The choice is data, so that both kinds of blocks share one compiled block.
            def attend(q: Array, k: Array, v: Array) -> Array:
                return jax.lax.cond(sees_image, attend_image, attend_window, q, k, v)

            return block(hidden, cos, sin, attend), None

        sees_image = np.isin(np.arange(self.depth), self.fullatt_block_indexes)
        hidden, _ = scan_layers(
            self.blocks, step, self.patch_embed(in_order(pixels, plan.order)), sees_image
        )
        return self.merger(hidden)[plan.merged_row]
