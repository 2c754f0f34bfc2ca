"""Turns a prompt into the arrays that the programs need: packed, and padded to buckets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32, Int32

from bsjax.attention import block_sizes
from bsjax.checks import shown
from bsjax.errors import CapacityError, MessageError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops, flops_per_kind, head_flops
from bsjax.masks.schedule import Schedule, bucket, build_schedule, category_tables
from bsjax.masks.template import Template
from bsjax.models import Architecture
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt

PADDING_ROW = np.iinfo(np.int32).max
"""The row of image tokens made of padding: out of bounds, so that their features are dropped."""

GROUP_PATCHES = 65536
"""The most patches that go through the vision tower together; bounds the tower's memory."""

_SMALLEST_TOKENS = 64
# Eight sizes per power of two: padding adds at most 12.5 %.
_BUCKETS = 8


@dataclass(frozen=True)
class ImageGroup:
    """Consecutive images of a prompt that go through the vision tower together."""

    patches: Float32[np.ndarray, "patches pixels"]
    """Patches of these images; a view of the prompt's patches."""
    plan: Any
    """The family's `vision_plan` for these images, padded to a bucket."""
    image_rows: Int32[np.ndarray, "merged"]
    """The row of each image token, padded with `PADDING_ROW`."""
    padded_patches: int

    def pixel_values(self) -> Float32[np.ndarray, "padded_patches pixels"]:
        """The padded patches, made on demand: for all groups together they could take gigabytes."""
        padded = np.zeros((self.padded_patches, self.patches.shape[1]), np.float32)
        padded[: len(self.patches)] = self.patches
        return padded

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The arguments of `encode_images` after the embeddings, with a shape for pixel values."""
        shape = (self.padded_patches, self.patches.shape[1])
        return jax.ShapeDtypeStruct(shape, np.float32), self.plan, self.image_rows


@dataclass(frozen=True)
class ModelInputs:
    """One prompt as input of the programs: NumPy arrays with rows in the order of the schedules.

    The first `tokens` rows are those of the prompt, the others are padding.
    """

    template: Template
    tokens: int
    next_position: int
    """Position of the first token after the prompt."""
    schedules: tuple[Schedule, ...]
    """One for each of the family's `visibilities`, all with the same row order."""
    order: Int32[np.ndarray, "tokens"]
    """The prompt position of every row before the padding."""
    head_category: Int32[np.ndarray, "layers q_heads"]
    token_ids: Int32[np.ndarray, "rows"]
    position_ids: Int32[np.ndarray, "axes rows"]
    last_row: np.int32
    """The row of the prompt's last token."""
    image_groups: tuple[ImageGroup, ...]
    flops_per_kind: tuple[LayerFlops, ...]
    """Attention FLOPs of the language model, by kind of layer."""
    how_to_shorten: str
    """Advice for error messages about prompts that are too long."""

    @property
    def rows(self) -> int:
        """Number of rows, padding included."""
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
    """Computes a prompt's template, schedules, positions and vision plans, on the host.

    Args:
      architecture: architecture of the model that runs the prompt.
      prompt: token ids and pixel values.
      profile: head categories and sinks; None is dense.
      backend: attention backend, already resolved.
      new_tokens: how many tokens may follow the prompt.

    Raises:
      MessageError: the prompt has tokens that the model has no embeddings for.
      CapacityError: the prompt and the new tokens need more positions than the model has.
      TemplateError: image tokens and images do not match.
    """
    family, config, dtype = architecture
    text_config = config.get_text_config()
    _check_vocabulary(prompt.token_ids, family.image_token_id(config), text_config.vocab_size)
    template = family.template(prompt, config, None if profile is None else profile.sinks)
    position_ids, next_position = family.positions(prompt.token_ids, prompt.grid_thw, config)
    limit = text_config.max_position_embeddings
    how_to_shorten = _how_to_shorten(template, family.fewer_image_tokens, new_tokens)
    if next_position + new_tokens > limit:
        if next_position < limit:
            advice = f"Lower max_new_tokens to {limit - next_position} or less."
        else:  # It would not fit even without new tokens.
            advice = _how_to_shorten(template, family.fewer_image_tokens, new_tokens=0)
        follow = f" and up to {shown(new_tokens)} new tokens follow" if new_tokens else ""
        raise CapacityError(
            f"The prompt needs {next_position} positions ({template.tokens} tokens, "
            f"{describe_images(template)}){follow}, but the model has {limit}. {advice}"
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
    rows = bucket(template.tokens, smallest=_SMALLEST_TOKENS, steps=_BUCKETS)
    visibilities = family.visibilities(config)
    # With the same tables for all kinds of layers, all schedules have the same row order.
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
    order = schedules[0].queries.position[: template.tokens]

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
        how_to_shorten=how_to_shorten,
    )


def _check_vocabulary(
    token_ids: Int32[np.ndarray, "tokens"], image_token_id: int, vocabulary: int
) -> None:
    """Rejects tokens without an embedding, which would make all logits NaN."""
    unknown = token_ids[(token_ids >= vocabulary) & (token_ids != image_token_id)]
    if unknown.size:
        raise MessageError(
            f"The tokenizer makes the token {unknown[0]} from the text, but the model has "
            f"embeddings only up to {vocabulary - 1}. Either the tokenizer's files belong to "
            "another model, or the text names a special token that this model does not have: leave "
            "it out."
        )


def cache_rows(tokens: int) -> int:
    """The number of rows of a cache for `tokens` tokens, prompt and answer included."""
    return bucket(tokens, smallest=_SMALLEST_TOKENS, steps=_BUCKETS)


def _image_groups(
    architecture: Architecture,
    prompt: Prompt,
    rows: Int32[np.ndarray, "image_tokens"],
    backend: str,
) -> tuple[ImageGroup, ...]:
    """Divides the images of a prompt into groups for the vision tower."""
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
        padded_tokens = bucket(
            count // patches_per_token, smallest=_SMALLEST_TOKENS, steps=_BUCKETS
        )
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
    """First and end index of each group: as many images as fit into `limit` patches, at least one.

    Args:
      patches: number of patches of each image.
      limit: the most patches of a group.
    """
    borders = []
    first = total = 0
    for number, size in enumerate(patches):
        if number > first and total + size > limit:
            borders.append((first, number))
            first, total = number, 0
        total += size
    return [*borders, (first, len(patches))]


def _how_to_shorten(template: Template, fewer_image_tokens: Sequence[str], new_tokens: int) -> str:
    """How to shorten a prompt: first what reduces its larger part, text or images."""
    of_images = sum(template.image_tokens)
    levers = list(fewer_image_tokens) if of_images else []
    if 2 * of_images < template.tokens:
        levers.insert(0, "shorten the text of the messages")
    if new_tokens > 1:
        levers.append("lower max_new_tokens")
    *others, last = levers
    advice = f"{', '.join(others)} or {last}" if others else last
    return f"{advice[0].upper()}{advice[1:]}."


def describe_images(template: Template) -> str:
    """The number of images in a prompt and the tokens of each, in words, for error messages."""
    sizes = template.image_tokens
    if not sizes:
        return "no images"
    shown = ", ".join(map(str, sizes[:20])) + (", ..." if len(sizes) > 20 else "")
    return f"{len(sizes)} image{'s' * (len(sizes) > 1)} of {shown} tokens"
