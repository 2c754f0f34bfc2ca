"""Where the images of a prompt stand, in its tokens and in the rows of a vision tower."""

import numpy as np
from jaxtyping import Int

from bsjax.errors import CapacityError, TemplateError


def image_starts(
    token_ids: Int[np.ndarray, "tokens"],
    image_token_id: int,
    image_tokens: Int[np.ndarray, "images"],
) -> Int[np.ndarray, "images"]:
    """The position of each image's first token.

    Args:
      token_ids: the prompt, in which `image_token_id` stands once per image token.
      image_token_id: the placeholder's id.
      image_tokens: how many tokens each image has, in prompt order, all at least 1.

    Raises:
      TemplateError: placeholders and images do not agree, or an image is interrupted by text.
    """
    placeholder = np.flatnonzero(np.asarray(token_ids) == image_token_id)
    needed = int(image_tokens.sum())
    if placeholder.size != needed:
        raise TemplateError(
            f"The prompt holds {placeholder.size} image tokens (id {image_token_id}), but the "
            f"grids of its {image_tokens.size} images make {image_tokens.tolist()[:20]}, {needed} "
            "in all."
        )
    last = np.cumsum(image_tokens) - 1
    starts = placeholder[last - image_tokens + 1]
    interrupted = np.flatnonzero(placeholder[last] - starts != image_tokens - 1)
    if interrupted.size:
        number = interrupted[0]
        raise TemplateError(
            f"Image {number} should take {image_tokens[number]} tokens from token {starts[number]} "
            "on, but other tokens stand among them: the grids do not belong to this prompt."
        )
    return starts


def check_patch_rows(patches: int, needed: int, multiple: int) -> None:
    """Refuses a plan of `patches` rows for `needed` patches, or one with part of an image token.

    Raises:
      CapacityError: `patches` is below `needed`, or no multiple of `multiple`.
    """
    if patches < needed or patches % multiple:
        raise CapacityError(
            f"The images have {needed} patches; a plan of {patches} rows must hold them all and be "
            f"a multiple of {multiple}."
        )
