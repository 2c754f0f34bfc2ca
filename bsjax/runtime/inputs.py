"""What can be known about a prompt before it runs: template, positions, images, FLOPs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from bsjax.attention import block_sizes
from bsjax.checks import argument, shown, with_arguments
from bsjax.errors import CapacityError, MessageError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import LayerFlops, flops_per_kind, head_flops
from bsjax.masks.rows import Span
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import Visibility
from bsjax.models import Architecture
from bsjax.profiles.profile import Profile
from bsjax.prompts.prompt import Prompt, PromptImage


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """One prompt as the runtime sees it: everything that can be known on the host, in prompt order.

    Attributes:
      architecture: architecture of the model.
      template: the prompt's structure.
      next_position: position id of the first token after the prompt.
      token_ids: the id of each token.
      position_ids: the position ids of each token.
      head_category: the `HeadCategory` of every head.
      visibilities: what each kind of layer lets a query see.
      last_kind: the kind of the last layer, an index into `visibilities`.
      blocks: block_q and block_kv of the language model's schedules.
      images: the images.
      start: position of the first token that runs.
      how_to_shorten: advice for error messages about prompts that are too long.
    """

    architecture: Architecture
    template: Template
    next_position: int
    token_ids: Int32[np.ndarray, "tokens"]
    position_ids: Int32[np.ndarray, "axes tokens"]
    head_category: Int32[np.ndarray, "layers q_heads"]
    visibilities: tuple[Visibility, ...]
    last_kind: int
    blocks: tuple[int, int]
    images: tuple[PromptImage, ...]
    start: int
    how_to_shorten: str

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt."""
        return self.template.tokens

    @property
    def is_sparse(self) -> bool:
        """Whether any head is sparse."""
        return bool((self.head_category != HeadCategory.DENSE).any())

    @cached_property
    def _flops(self) -> Int64[np.ndarray, "layers all_categories"]:
        """Attention FLOPs of prefill of the tokens that run, of one head of every layer.

        Counting them takes longer than everything else here, and the first token does not need it.
        """
        family, config, _ = self.architecture
        return head_flops(
            self.template,
            self.visibilities,
            family.layer_kinds(config),
            family.text_head_dim(config),
            [HeadCategory.DENSE, *np.unique(self.head_category).tolist()],
            Span(self.start, self.tokens),
        )

    @cached_property
    def flops_per_kind(self) -> tuple[LayerFlops, ...]:
        """Attention FLOPs of prefill of the tokens that run, by kind of layer."""
        family, config, _ = self.architecture
        layer_kinds = family.layer_kinds(config)
        return flops_per_kind(self.head_category, self._flops, self.visibilities, layer_kinds)

    @property
    def flops_per_head(self) -> Int64[np.ndarray, "layers q_heads"]:
        """Attention FLOPs of prefill of the tokens that run, of every head."""
        return np.take_along_axis(self._flops, self.head_category.astype(np.int64), axis=1)

    @property
    def flops_dense(self) -> int:
        """Attention FLOPs of prefill in the language model if all heads were dense."""
        return sum(kind.dense for kind in self.flops_per_kind)

    @property
    def flops_sparse(self) -> int:
        """Attention FLOPs of prefill in the language model with these head categories."""
        return sum(kind.sparse for kind in self.flops_per_kind)


class Placed(NamedTuple):
    """Where the tokens of a prompt are.

    Attributes:
      template: the prompt's structure.
      position_ids: the position ids of each token.
      next_position: position id of the first token after the prompt.
      how_to_shorten: advice for error messages about prompts that are too long.
    """

    template: Template
    position_ids: Int32[np.ndarray, "axes tokens"]
    next_position: int
    how_to_shorten: str


def place(
    architecture: Architecture,
    prompt: Prompt,
    profile: Profile | None,
    *,
    new_tokens: int = 0,
    sinks: Sinks | None = None,
) -> Placed:
    """Computes the positions of a prompt, and checks that the model has as many.

    The arguments and the errors are those of `prepare_inputs`.
    """
    family, config, _ = architecture
    text_config = config.get_text_config()
    _check_vocabulary(prompt.token_ids, family.image_token_id(config), text_config.vocab_size)
    template = family.template(prompt, config, sinks if profile is None else profile.sinks)
    position_ids, next_position = family.positions(prompt.token_ids, prompt.grid_thw, config)
    limit = text_config.max_position_embeddings
    if next_position + new_tokens > limit:
        if next_position < limit:
            advice = f"Lower {argument('max_new_tokens')} to {limit - next_position} or less."
        else:  # It would not fit even without new tokens.
            advice = _how_to_shorten(template, family.fewer_image_tokens, new_tokens=0)
        follow = f" and up to {shown(new_tokens)} new tokens follow" if new_tokens else ""
        raise CapacityError(
            f"The prompt needs {next_position} positions ({template.tokens} tokens, "
            f"{describe_images(template)}){follow}, but the model has {limit}. {advice}"
        )
    how_to_shorten = _how_to_shorten(template, family.fewer_image_tokens, new_tokens)
    return Placed(template, position_ids, next_position, how_to_shorten)


def prepare_inputs(
    architecture: Architecture,
    prompt: Prompt,
    profile: Profile | None,
    *,
    backend: str,
    new_tokens: int = 0,
    sinks: Sinks | None = None,
    start: int = 0,
) -> ModelInputs:
    """Computes a prompt's template and positions, on the host.

    Args:
      architecture: architecture of the model that runs the prompt.
      prompt: token ids and pixel values.
      profile: head categories and sinks; None is dense.
      backend: attention backend, already resolved.
      new_tokens: how many tokens may follow the prompt.
      sinks: which tokens of an image are sinks if there is no profile; a profile has its own.
      start: position of the first token that has to run.

    Raises:
      MessageError: the prompt has tokens that the model has no embeddings for.
      CapacityError: the prompt and the new tokens need more positions than the model has.
      TemplateError: image tokens and images do not match.
    """
    family, config, dtype = architecture
    text_config = config.get_text_config()
    template, position_ids, next_position, how_to_shorten = place(
        architecture, prompt, profile, new_tokens=new_tokens, sinks=sinks
    )
    layers, q_heads = text_config.num_hidden_layers, text_config.num_attention_heads
    if profile is None:
        head_category = np.full((layers, q_heads), HeadCategory.DENSE, np.int32)
    else:
        head_category = profile.categories.astype(np.int32)
    sparse = profile is not None and profile.is_sparse
    return ModelInputs(
        architecture=architecture,
        template=template,
        next_position=next_position,
        token_ids=prompt.token_ids,
        position_ids=position_ids,
        head_category=head_category,
        visibilities=family.visibilities(config),
        last_kind=int(family.layer_kinds(config)[-1]),
        blocks=block_sizes(backend, family.text_head_dim(config), dtype, sparse=sparse),
        images=prompt.images,
        start=start,
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


def _how_to_shorten(template: Template, fewer_image_tokens: Sequence[str], new_tokens: int) -> str:
    """How to shorten a prompt: first what reduces its larger part, text or images."""
    of_images = sum(template.image_tokens)
    levers = list(fewer_image_tokens) if of_images else []
    if 2 * of_images < template.tokens:
        levers.insert(0, "shorten the text of the messages")
    if new_tokens > 1:
        levers.append("lower {max_new_tokens}")
    *others, last = levers
    advice = with_arguments(f"{', '.join(others)} or {last}" if others else last)
    return f"{advice[0].upper()}{advice[1:]}."


def describe_images(template: Template) -> str:
    """The number of images in a prompt and the tokens of each, in words, for error messages."""
    sizes = template.image_tokens
    if not sizes:
        return "no images"
    shown = ", ".join(map(str, sizes[:20])) + (", ..." if len(sizes) > 20 else "")
    return f"{len(sizes)} image{'s' * (len(sizes) > 1)} of {shown} tokens"
