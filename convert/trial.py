"""Trial runs of a small prompt, before weights are read and after they are written.

Before, the prompt is prepared, and the vision tower traced on it. This finds mismatched files (an
image processor for patches of another size, a tokenizer without the image token, heads that do not
divide a width) before gigabytes are written. After, the model computes the prompt's logits, unless
it is large.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import PIL.Image
from flax import nnx

from bsjax.checkpoint.loading import read_generation_config, read_processor
from bsjax.errors import BsjaxError, CheckpointError

_IMAGE = {"type": "image", "image": PIL.Image.new("RGB", (96, 64))}
_QUESTION = {"type": "text", "text": "What is this?"}
_BLOCK = 16


def try_prompt(folder: Path, module: nnx.Module) -> None:
    """Prepares a prompt with the files of `folder` and traces the vision tower on it.

    The prompt has one image, or none for a model that reads text only.

    Args:
      folder: a Hugging Face checkpoint.
      module: the checkpoint's model, with shapes in place of weights.

    Raises:
      CheckpointError: a file is damaged, or the files do not match.
    """
    processor = read_processor(folder)
    family, config = processor.family, processor.config
    read_generation_config(folder)
    content = [_IMAGE, _QUESTION] if family.reads_images else [_QUESTION]
    try:
        prompt = processor.prompt([{"role": "user", "content": content}])
        family.positions(prompt.token_ids, prompt.grid_thw, config)
        if not prompt.images:
            return
        plan = family.vision_plan(
            prompt.grid_thw,
            config,
            patches=len(prompt.pixels.values),
            block_q=_BLOCK,
            block_kv=_BLOCK,
        )
        features = feature_shape(module, prompt.pixels, plan)
    except (BsjaxError, ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the files of {folder} do not match; a trial prompt failed: {error}"
        ) from error
    hidden = config.get_text_config().hidden_size
    if features != (prompt.image_tokens[0], hidden):
        raise CheckpointError(
            f"the files of {folder} do not match: an image of {prompt.image_tokens[0]} "
            f"tokens in a model of width {hidden} gets features of shape {features}."
        )


def try_logits(converted: Path) -> None:
    """Runs the trial prompt through a converted model, in float32.

    Finite weights may be so large that everything computed with them is infinite or NaN.

    Args:
      converted: the converted folder, with any name.

    Raises:
      CheckpointError: logits are NaN or infinite.
    """
    # Imported here: most of what it needs is not needed to convert.
    from bsjax.checkpoint.loading import read_folder
    from bsjax.runtime.generation import forward

    model = read_folder(converted, "float32")
    content = [_IMAGE, _QUESTION] if model.family.reads_images else [_QUESTION]
    # The backend that compiles fastest.
    logits = forward(model, [{"role": "user", "content": content}], backend="reference")
    bad = np.count_nonzero(~np.isfinite(logits))
    if bad:
        raise CheckpointError(
            f"the model computes NaN or infinity: {bad} of the {logits.size} logits of a trial "
            "prompt are not finite. Its weights are damaged, or config.json is another model's. "
            "The conversion was discarded."
        )


def feature_shape(module: nnx.Module, pixels: Any, plan: Any) -> tuple[int, ...]:
    """The shape of the features of a prompt's images, [tokens, width], found by tracing."""
    graph, state = nnx.split(module)

    def encode(state: Any, pixels: Any, plan: Any) -> Any:
        model: Any = nnx.merge(graph, state)
        return model.encode_images(pixels, plan, backend="xla")

    return jax.eval_shape(encode, state, pixels, plan).shape
