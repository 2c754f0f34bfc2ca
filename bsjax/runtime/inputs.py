"""From a prompt to the arrays that the programs take: packed, padded to buckets, checked to fit."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import block_sizes
from bsjax.errors import CapacityError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops, flops_per_kind, head_flops
from bsjax.masks.schedule import Schedule, bucket, build_schedule, category_tables
from bsjax.masks.template import Sinks, Template
from bsjax.models import Architecture
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt

PADDING_ROW = np.iinfo(np.int32).max
"""The row of image tokens made of padding: out of bounds, so that their features are dropped."""

_SMALLEST_TOKENS = 64
GROUP_PATCHES = 65536
"""Patches that go through the vision tower together: its memory does not grow with the images."""
# Eight sizes between powers of two: at most 12.5 % of padding.
_STEPS = 8


@dataclass(frozen=True)
class ImageGroup:
    """Consecutive images of a prompt that go through the vision tower together."""

    patches: Float32[np.ndarray, "patches pixels"]
    """Of these images: a part of the prompt's, not a copy."""
    plan: Any
    """From the family's `vision_plan`: for these images, padded to a bucket."""
    image_rows: Int32[np.ndarray, "merged"]
    """The row of each image token, then `PADDING_ROW`s."""
    padded_patches: int

    def pixel_values(self) -> Float32[np.ndarray, "padded_patches pixels"]:
        """The padded patches: made when they are needed, as those of all groups are gigabytes."""
        padded = np.zeros((self.padded_patches, self.patches.shape[1]), np.float32)
        padded[: len(self.patches)] = self.patches
        return padded

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `encode_images` after the embeddings; of pixel values only the shape."""
        shape = (self.padded_patches, self.patches.shape[1])
        return jax.ShapeDtypeStruct(shape, np.float32), self.plan, self.image_rows


@dataclass(frozen=True)
class ModelInputs:
    """One prompt as the programs take it: NumPy arrays, rows in the schedules' order.

    `tokens` rows are real, the others padding at the end.
    """

    template: Template
    tokens: int
    next_position: int
    """Position of the first token after the prompt."""
    schedules: tuple[Schedule, ...]
    """One for each of the family's `visibilities`, all in one row order."""
    order: Int32[np.ndarray, "tokens"]
    """The prompt index of every row that is not padding."""
    head_category: Int32[np.ndarray, "layers q_heads"]
    token_ids: Int32[np.ndarray, "rows"]
    position_ids: Int32[np.ndarray, "axes rows"]
    last_row: np.int32
    """The row of the prompt's last token."""
    image_groups: tuple[ImageGroup, ...]
    flops_per_kind: tuple[LayerFlops, ...]
    """Of the language model's layers, by kind."""
    how_to_shorten: str
    """A sentence for messages about prompts that are too long."""

    @property
    def rows(self) -> int:
        """Rows of the programs, padding included."""
        return self.token_ids.shape[0]

    @property
    def flops_dense(self) -> int:
        """Attention FLOPs of prefill in the language model if all heads were dense."""
        return sum(kind.dense for kind in self.flops_per_kind)

    @property
    def flops_sparse(self) -> int:
        """Attention FLOPs of prefill in the language model with these head categories."""
        return sum(kind.sparse for kind in self.flops_per_kind)


def prepare_inputs(
    architecture: Architecture,
    prompt: Prompt,
    profile: Profile | None,
    *,
    backend: str,
    new_tokens: int = 0,
) -> ModelInputs:
    """Computes template, schedules, positions and vision plans of a prompt on the host.

    Args:
      architecture: of the model that runs it.
      prompt: token ids and pixel values.
      profile: head categories and sinks; None is dense.
      backend: of the attention, already resolved.
      new_tokens: how many tokens will follow the prompt.

    Raises:
      CapacityError: prompt and new tokens need more positions than the model has.
      TemplateError: placeholders and images do not agree.
    """
    family, config, dtype = architecture
    text_config = config.get_text_config()
    template = Template.from_tokens(
        prompt.token_ids,
        family.image_token_id(config),
        Sinks() if profile is None else profile.sinks,
        prompt.image_tokens,
    )
    position_ids, next_position = family.positions(prompt.token_ids, prompt.grid_thw, config)
    limit = text_config.max_position_embeddings
    if next_position + new_tokens > limit:
        raise CapacityError(
            f"The prompt takes {next_position} positions ({template.tokens} tokens, "
            f"{describe_images(template)}) and {new_tokens} new tokens follow, but the model has "
            f"{limit}. {family.how_to_shorten}"
        )

    layers, q_heads = text_config.num_hidden_layers, text_config.num_attention_heads
    head_dim = family.text_head_dim(config)
    if profile is None:
        head_category = np.full((layers, q_heads), HeadCategory.DENSE, np.int32)
    else:
        head_category = profile.categories.astype(np.int32)
    block_q, block_kv = block_sizes(
        backend, head_dim, dtype, sparse=bool((head_category != HeadCategory.DENSE).any())
    )
    rows = bucket(template.tokens, smallest=_SMALLEST_TOKENS, steps=_STEPS)
    visibilities = family.visibilities(config)
    # The same tables for all kinds of layers: then all schedules have one row order.
    schedules = tuple(
        build_schedule(
            template,
            category_tables(head_category),
            block_q=block_q,
            block_kv=block_kv,
            visibility=visibility,
            tokens=rows,
        )
        for visibility in visibilities
    )
    layer_kinds = family.layer_kinds(config)
    flops = head_flops(
        template,
        visibilities,
        layer_kinds,
        head_dim,
        [HeadCategory.DENSE, *np.unique(head_category).tolist()],
    )
    order = schedules[0].position[: template.tokens]

    def by_row(values: np.ndarray, padding: int) -> np.ndarray:
        padded = np.full((*values.shape[:-1], rows), padding, np.int32)
        padded[..., : order.size] = values[..., order]
        return padded

    row_of_token = np.argsort(order).astype(np.int32)
    return ModelInputs(
        template=template,
        tokens=template.tokens,
        next_position=next_position,
        schedules=schedules,
        order=order,
        head_category=head_category,
        token_ids=by_row(prompt.token_ids, 0),
        position_ids=by_row(position_ids, 0),
        last_row=row_of_token[-1],
        image_groups=_image_groups(
            architecture, prompt, row_of_token[template.image >= 0], backend
        ),
        flops_per_kind=flops_per_kind(head_category, flops, visibilities, layer_kinds),
        how_to_shorten=family.how_to_shorten,
    )


def cache_rows(tokens: int) -> int:
    """Rows of a cache that holds `tokens` tokens, prompt and answer."""
    return bucket(tokens, smallest=_SMALLEST_TOKENS, steps=_STEPS)


def _image_groups(
    architecture: Architecture,
    prompt: Prompt,
    rows: Int32[np.ndarray, "image_tokens"],
    backend: str,
) -> tuple[ImageGroup, ...]:
    """The groups that the images of a prompt go through the vision tower in."""
    if prompt.pixel_values is None:
        return ()
    family, config, dtype = architecture
    block_q, block_kv = block_sizes(backend, family.vision_head_dim(config), dtype, sparse=True)
    patches = prompt.grid_thw.prod(axis=1, dtype=np.int64)
    first_patch = np.append(0, np.cumsum(patches))
    first_token = np.append(0, np.cumsum(prompt.image_tokens))
    patches_per_token = int(first_patch[-1] // first_token[-1])
    groups = []
    for first, end in group_borders(patches.tolist(), GROUP_PATCHES):
        count = int(first_patch[end] - first_patch[first])
        padded_tokens = bucket(count // patches_per_token, smallest=_SMALLEST_TOKENS, steps=_STEPS)
        padded = padded_tokens * patches_per_token
        image_rows = np.full(padded_tokens, PADDING_ROW, np.int32)
        tokens = slice(first_token[first], first_token[end])
        image_rows[: tokens.stop - tokens.start] = rows[tokens]
        plan = family.vision_plan(
            prompt.grid_thw[first:end], config, patches=padded, block_q=block_q, block_kv=block_kv
        )
        group_patches = prompt.pixel_values[first_patch[first] : first_patch[end]]
        groups.append(ImageGroup(group_patches, plan, image_rows, padded))
    return tuple(groups)


def group_borders(patches: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """First and end of runs of images with at most `limit` patches, or of one larger image."""
    borders = []
    first = total = 0
    for number, size in enumerate(patches):
        if number > first and total + size > limit:
            borders.append((first, number))
            first, total = number, 0
        total += size
    return [*borders, (first, len(patches))]


def describe_images(template: Template) -> str:
    """How many images a prompt has and how many tokens each takes, for messages."""
    sizes = template.image_tokens
    if not sizes:
        return "no images"
    shown = ", ".join(map(str, sizes[:20])) + (", ..." if len(sizes) > 20 else "")
    return f"{len(sizes)} image{'s' * (len(sizes) > 1)} of {shown} tokens"
