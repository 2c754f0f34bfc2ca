"""Positions of a Gemma 3 prompt: tokens are counted, image tokens like any others."""

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.models.image_rows import image_starts


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
    # Text-only models have no such field in their configs, and no images.
    length = config.mm_tokens_per_image if len(grid_thw) else 1
    image_starts(token_ids, image_token_id, np.full(len(grid_thw), length))
    tokens = len(token_ids)
    return np.arange(tokens, dtype=np.int32)[None], tokens
