"""Positions of a Gemma 3 prompt: tokens are counted, image tokens like any others."""

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.errors import TemplateError


def positions(
    token_ids: Int[np.ndarray, "tokens"],
    image_token_id: int,
    grid_thw: Int[np.ndarray, "images 3"],
    config: PretrainedConfig,
) -> tuple[Int[np.ndarray, "1 tokens"], int]:
    """The position of every token, and the position that follows them.

    Args:
      token_ids: the prompt, in which `image_token_id` stands once per image token.
      image_token_id: the placeholder's id.
      grid_thw: one row for each image.
      config: of the whole model.

    Returns:
      int32 [1, tokens], in prompt order, and the position of the first token after the prompt.

    Raises:
      TemplateError: placeholders and images do not agree, or an image is interrupted by text.
    """
    placeholder = np.flatnonzero(np.asarray(token_ids) == image_token_id)
    images, length = len(grid_thw), config.mm_tokens_per_image if len(grid_thw) else 1
    if placeholder.size != images * length:
        raise TemplateError(
            f"The prompt holds {placeholder.size} image tokens (id {image_token_id}), but its "
            f"{images} images of {length} tokens make {images * length}."
        )
    by_image = placeholder.reshape(-1, length)
    split = np.flatnonzero(by_image[:, -1] - by_image[:, 0] != length - 1)
    if split.size:
        raise TemplateError(
            f"Image {split[0]} should take {length} tokens from token {by_image[split[0], 0]} on, "
            "but other tokens stand among them."
        )
    tokens = len(token_ids)
    return np.arange(tokens, dtype=np.int32)[None], tokens
