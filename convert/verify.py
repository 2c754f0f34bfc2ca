"""Compares a converted checkpoint with transformers on a prompt, with an image if it reads images.

The prompt is short, but longer than any layer's window. Both models run in float32, so they differ
only by the rounding of stored weights and of float32 arithmetic. They are loaded one after the
other, never both at once.
"""

import dataclasses
import gc
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32

from bsjax.errors import CheckpointError

if TYPE_CHECKING:
    from bsjax.checkpoint.loading import LoadedModel

TOLERANCES = {None: 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
"""The largest difference allowed between logits, as a fraction of the largest logit, by the dtype
that weights were rounded to. None means stored exactly; float32 arithmetic still rounds."""

_IMAGE_SIZE = (112, 84)
_QUESTION = "What is in this picture?"


@dataclasses.dataclass(frozen=True)
class Verification:
    """How far a converted model is from transformers.

    Attributes:
      difference: the largest difference between logits, as a fraction of the largest logit.
      tolerance: the largest difference allowed.
      tokens: number of tokens of the prompt. All logits of every token were compared.
    """

    difference: float
    tolerance: float
    tokens: int


def require_torch() -> None:
    """Raises CheckpointError, with a hint on how to install it, if torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise CheckpointError(
            "verification runs the original model in torch, which is not installed: "
            "pip install torch"
        )


def verify(source: Path, converted: Path, rounded_to: str | None) -> Verification:
    """Compares the two checkpoints' logits.

    Args:
      source: the Hugging Face folder.
      converted: the converted folder.
      rounded_to: the dtype that the weights were rounded to; None if they are stored exactly.

    Raises:
      CheckpointError: the difference exceeds the tolerance.
    """
    # Imported here, so that a conversion without verification starts quickly.
    from PIL import Image

    from bsjax.checkpoint.loading import read_folder
    from bsjax.runtime.generation import forward

    require_torch()
    model = read_folder(converted, "float32")
    content: list[dict[str, Any]] = [{"type": "text", "text": _question(model)}]
    if model.image_processor is not None:
        pixels = np.random.default_rng(0).integers(0, 256, (*_IMAGE_SIZE[::-1], 3), dtype=np.uint8)
        content.insert(0, {"type": "image", "image": Image.fromarray(pixels)})
    messages = [{"role": "user", "content": content}]
    prompt = model.prompt(messages)
    actual = np.asarray(forward(model, messages))
    del model
    gc.collect()
    expected = reference_logits(source, prompt)

    vocabulary = min(actual.shape[-1], expected.shape[-1])
    difference = _relative_difference(actual[:, :vocabulary], expected[:, :vocabulary])
    tolerance = TOLERANCES[rounded_to]
    if not difference <= tolerance:
        raise CheckpointError(
            f"verification failed: logits differ from transformers' by {difference:.2e} of the "
            f"largest logit, but only {tolerance:.0e} is allowed"
            + (f" for weights rounded to {rounded_to}" if rounded_to else "")
            + ". The conversion was discarded."
        )
    return Verification(difference, tolerance, len(actual))


def _question(model: "LoadedModel") -> str:
    """Text with more tokens than any window of the model's layers."""
    windows = [visibility.window or 0 for visibility in model.family.visibilities(model.config)]
    tokens = len(model.tokenizer(_QUESTION, add_special_tokens=False)["input_ids"])
    return " ".join([_QUESTION] * (1 + max(windows) // tokens))


def reference_logits(source: Path, prompt: Any) -> Float32[np.ndarray, "tokens vocabulary"]:
    """The logits of transformers' own model, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.utils.logging import disable_progress_bar

    from bsjax.models import FAMILIES

    disable_progress_bar()
    reads_images = bool(prompt.images)
    model_class = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    model = model_class.from_pretrained(source, dtype=torch.float32, local_files_only=True).eval()
    family = FAMILIES[model.config.model_type]
    inputs = family.reference_inputs(prompt, model.config)
    with torch.inference_mode():
        output = model(**{name: torch.from_numpy(array) for name, array in inputs.items()})
    return family.reference_logits(output.logits[0].float().numpy(), model.config)


def _relative_difference(
    actual: Float32[np.ndarray, "tokens vocabulary"],
    expected: Float32[np.ndarray, "tokens vocabulary"],
) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    return float(np.abs(actual - expected).max() / np.abs(expected).max())
