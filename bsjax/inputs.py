"""From a prompt to the arrays that the programs take: packed, padded to buckets, checked to fit."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import block_sizes
from bsjax.categories import HeadCategory
from bsjax.checkpoint import LoadedModel
from bsjax.errors import CapacityError
from bsjax.profile_file import Profile
from bsjax.prompts import Prompt
from bsjax.schedule import Schedule, bucket, build_schedule, category_tables, visible_pairs
from bsjax.template import Sinks, Template

_SMALLEST_TOKENS = 64
_SMALLEST_PATCHES = 256
# Eight sizes between powers of two: at most 12.5 % of padding.
_STEPS = 8


@dataclass(frozen=True)
class ModelInputs:
    """One prompt as the programs take it: NumPy arrays, rows in the schedule's order.

    `tokens` rows are real, the others padding at the end.
    """

    template: Template
    tokens: int
    next_position: int
    """Position of the first token after the prompt."""
    schedule: Schedule
    head_category: Int32[np.ndarray, "layers q_heads"]
    token_ids: Int32[np.ndarray, "rows"]
    position_ids: Int32[np.ndarray, "3 rows"]
    image_feature_index: Int32[np.ndarray, "rows"]
    """Which image feature each row takes; -1 for text."""
    last_row: np.int32
    """The row of the prompt's last token."""
    pixel_values: Float32[np.ndarray, "patches pixels"] | None
    """None without images."""
    vision_plan: Any
    flops_dense: int
    """Attention FLOPs of prefill in the language model if all heads were dense."""
    flops_sparse: int
    """Attention FLOPs of prefill in the language model with these head categories."""


def prepare_inputs(
    model: LoadedModel, prompt: Prompt, profile: Profile | None, backend: str, new_tokens: int
) -> ModelInputs:
    """Computes template, schedule, positions and vision plan of a prompt on the host.

    Args:
      model: what runs it.
      prompt: token ids and pixel values.
      profile: head categories and sinks; None is dense.
      backend: of the attention, already resolved.
      new_tokens: how many tokens will follow the prompt.

    Raises:
      CapacityError: prompt and new tokens need more positions than the model has.
      TemplateError: placeholders and images do not agree.
    """
    config = model.config
    text_config = config.text_config
    template = Template.from_tokens(
        prompt.token_ids,
        config.image_token_id,
        Sinks() if profile is None else profile.sinks,
        prompt.image_tokens,
    )
    position_ids, next_position = model.family.positions(
        prompt.token_ids, config.image_token_id, prompt.grid_thw, config
    )
    _check_positions(template, next_position, new_tokens, text_config.max_position_embeddings)

    layers, q_heads = text_config.num_hidden_layers, text_config.num_attention_heads
    head_dim = getattr(text_config, "head_dim", None) or text_config.hidden_size // q_heads
    if profile is None:
        head_category = np.full((layers, q_heads), HeadCategory.DENSE, np.int32)
    else:
        head_category = profile.categories.astype(np.int32)
    block_q, block_kv = block_sizes(
        backend, head_dim, model.dtype, sparse=bool((head_category != HeadCategory.DENSE).any())
    )
    rows = bucket(template.tokens, smallest=_SMALLEST_TOKENS, steps=_STEPS)
    schedule = build_schedule(
        template, category_tables(head_category), block_q=block_q, block_kv=block_kv, tokens=rows
    )
    order = schedule.position[: template.tokens]

    def by_row(values: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full((*values.shape[:-1], rows), padding, np.int32)
        padded[..., : order.size] = values[..., order]
        return padded

    is_image = template.image >= 0
    feature_index = np.where(is_image, np.cumsum(is_image) - 1, -1)
    pixel_values, plan = _vision_inputs(model, prompt, backend)
    pairs = {
        category: visible_pairs(template, category.groups)
        for category in {HeadCategory.DENSE, *map(HeadCategory, np.unique(head_category).tolist())}
    }
    heads = np.bincount(head_category.ravel(), minlength=len(HeadCategory))
    flops_per_pair = 4 * head_dim
    return ModelInputs(
        template=template,
        tokens=template.tokens,
        next_position=next_position,
        schedule=schedule,
        head_category=head_category,
        token_ids=by_row(prompt.token_ids, 0),
        position_ids=by_row(position_ids, 0),
        image_feature_index=by_row(feature_index, -1),
        last_row=np.int32(np.flatnonzero(order == template.tokens - 1)[0]),
        pixel_values=pixel_values,
        vision_plan=plan,
        flops_dense=flops_per_pair * pairs[HeadCategory.DENSE] * head_category.size,
        flops_sparse=flops_per_pair * sum(pairs[c] * int(heads[c]) for c in pairs),
    )


def cache_rows(tokens: int) -> int:
    """Rows of a cache that holds `tokens` tokens, prompt and answer."""
    return bucket(tokens, smallest=_SMALLEST_TOKENS, steps=_STEPS)


def _vision_inputs(model: LoadedModel, prompt: Prompt, backend: str) -> tuple[Any, Any]:
    if prompt.pixel_values is None:
        return None, None
    head_dim = model.family.vision_head_dim(model.config)
    block_q, block_kv = block_sizes(backend, head_dim, model.dtype, sparse=True)
    patches = bucket(len(prompt.pixel_values), smallest=_SMALLEST_PATCHES, steps=_STEPS)
    plan = model.family.vision_plan(
        prompt.grid_thw, model.config, patches=patches, block_q=block_q, block_kv=block_kv
    )
    pixel_values = np.zeros((patches, prompt.pixel_values.shape[1]), np.float32)
    pixel_values[: len(prompt.pixel_values)] = prompt.pixel_values
    return pixel_values, plan


def _check_positions(template: Template, next_position: int, new_tokens: int, limit: int) -> None:
    if next_position + new_tokens > limit:
        raise CapacityError(
            f"The prompt takes {next_position} positions ({template.tokens} tokens, "
            f"{describe_images(template)}) and {new_tokens} new tokens follow, but the model has "
            f"{limit}. Lower max_pixels, pass fewer images or ask for fewer tokens."
        )


def describe_images(template: Template) -> str:
    """How many images a prompt has and how many tokens each takes, for messages."""
    sizes = template.image_tokens
    if not sizes:
        return "no images"
    shown = ", ".join(map(str, sizes[:20])) + (", ..." if len(sizes) > 20 else "")
    return f"{len(sizes)} image{'s' * (len(sizes) > 1)} of {shown} tokens"
