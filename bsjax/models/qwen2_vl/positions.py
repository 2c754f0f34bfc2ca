"""M-RoPE positions of a prompt (transformers: Qwen2VLModel.get_rope_index), on the host."""

import numpy as np
from jaxtyping import Int
from transformers import PretrainedConfig

from bsjax.errors import TemplateError
from bsjax.models.image_rows import image_starts


def positions(
    token_ids: Int[np.ndarray, "tokens"],
    image_token_id: int,
    grid_thw: Int[np.ndarray, "images 3"],
    config: PretrainedConfig,
) -> tuple[Int[np.ndarray, "3 tokens"], int]:
    """The temporal, row and column position of every token, and the position that follows them.

    Text counts up by one in all three. An image's tokens start where the text before it ended:
    temporal positions count frames, rows and columns count merged patches. What follows an image
    starts after its longer side. Unlike transformers, images are told apart by their grids, so that
    two of them may stand side by side.

    Args:
      token_ids: the prompt, in which `image_token_id` stands once per image token.
      image_token_id: the placeholder's id.
      grid_thw: frames, rows and columns of patches of each image, in prompt order.
      config: of the whole model.

    Returns:
      int32 [3, tokens], in prompt order, and the position of the first token after the prompt.

    Raises:
      TemplateError: the prompt holds video tokens, an image is interrupted by text, or the grids do
        not add up to the placeholders.
    """
    token_ids = np.asarray(token_ids)
    video_tokens = int(np.count_nonzero(token_ids == config.video_token_id))
    if video_tokens:
        raise TemplateError(
            f"The prompt holds {video_tokens} video tokens (id {config.video_token_id}); videos "
            "are not supported. Pass frames as images."
        )
    merge = config.vision_config.spatial_merge_size
    grids = np.asarray(grid_thw, np.int64).reshape(-1, 3) // (1, merge, merge)
    lengths = grids.prod(axis=1)
    starts = image_starts(token_ids, image_token_id, lengths)

    result = np.empty((3, token_ids.size), np.int32)
    index = 0
    next_position = 0
    for (frames, rows, columns), start, end in zip(grids, starts, starts + lengths, strict=True):
        result[:, index:start] = np.arange(next_position, next_position + start - index)
        next_position += start - index
        result[:, start:end] = next_position + np.indices((frames, rows, columns)).reshape(3, -1)
        next_position += int(max(rows, columns))
        index = end
    result[:, index:] = np.arange(next_position, next_position + token_ids.size - index)
    return result, int(result.max(initial=-1)) + 1
