"""Locates and checks a prompt's images: in its tokens, and in the rows of a vision tower."""

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
      token_ids: the prompt, with `image_token_id` once per image token.
      image_token_id: id of an image token in the family's prompts.
      image_tokens: how many tokens each image has, in prompt order, all at least 1.

    Raises:
      TemplateError: the number of image tokens is wrong, or text interrupts an image.
    """
    placeholder = np.flatnonzero(np.asarray(token_ids) == image_token_id)
    needed = int(image_tokens.sum())
    if placeholder.size != needed:
        raise TemplateError(
            f"The prompt holds {placeholder.size} image tokens (id {image_token_id}), but its "
            f"{image_tokens.size} images have {needed} according to their grids: "
            f"{image_tokens.tolist()[:20]}."
        )
    last = np.cumsum(image_tokens) - 1
    starts = placeholder[last - image_tokens + 1]
    interrupted = np.flatnonzero(placeholder[last] - starts != image_tokens - 1)
    if interrupted.size:
        number = interrupted[0]
        raise TemplateError(
            f"Image {number} should have {image_tokens[number]} tokens from token "
            f"{starts[number]} on, but other tokens interrupt it: the grids do not belong to this "
            "prompt."
        )
    return starts


def check_patch_rows(patches: int, needed: int, multiple: int) -> None:
    """Rejects a plan whose rows cannot hold all patches, or would end inside an image token.

    Args:
      patches: number of rows of the plan.
      needed: number of patches of all images.
      multiple: number of patches of an image token.

    Raises:
      CapacityError: `patches` is below `needed`, or not a multiple of `multiple`.
    """
    if patches < needed or patches % multiple:
        raise CapacityError(
            f"The images have {needed} patches; a plan of {patches} rows must hold them all and be "
            f"a multiple of {multiple}."
        )
