"""Writes trained parameters as a complete Hugging Face checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import save_file
from transformers import PretrainedConfig

from bsjax.models import FAMILIES
from bsjax.models.parameters import ParameterRule
from bsjax.unfinished import remove_leftovers

from ..qwen_files import make_generation_config
from .files import make_image_processor, make_tokenizer


def export(parameters: Any, config: PretrainedConfig, folder: Path) -> None:
    """Writes the checkpoint in bfloat16, completely or not at all; replaces an existing one.

    Args:
      parameters: the module's state, as `nnx.split` returns it.
      config: the whole model's config.
      folder: the checkpoint's folder.
    """
    tokenizer = make_tokenizer()
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    remove_leftovers(folder.absolute().parent, f".{folder.name}.", ".tmp")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        tensors = huggingface_tensors(parameters, config)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        make_image_processor().save_pretrained(temporary)
        make_generation_config(config).save_pretrained(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def huggingface_tensors(parameters: Any, config: PretrainedConfig) -> dict[str, np.ndarray]:
    """bfloat16 tensors by their Hugging Face names: the family's parameter table, inverted."""
    ours = {
        tuple(map(str, path)): np.asarray(variable[...])
        for path, variable in nnx.to_flat_state(parameters)
    }
    tensors = {}
    for rule in FAMILIES[config.model_type].parameter_table(config):
        array = ours.pop(rule.target)
        layers = [array] if rule.layers is None else list(array)
        for source, layer in zip(rule.sources, layers, strict=True):
            tensor = _undo(rule, layer, config)
            tensors[source] = np.ascontiguousarray(tensor.astype(ml_dtypes.bfloat16))
    if ours:
        raise ValueError(f"no rule of the parameter table writes {sorted(ours)}")
    return tensors


def _undo(rule: ParameterRule, array: np.ndarray, config: PretrainedConfig) -> np.ndarray:
    """Undoes a rule's transform."""
    match rule.transform:
        case "copy":
            return array
        case "transpose":
            return array.T
        case "flatten_patch":
            vision = config.vision_config
            patch = (vision.temporal_patch_size, vision.patch_size, vision.patch_size)
            return array.T.reshape(array.shape[1], vision.in_channels, *patch)
    raise ValueError(f"the transform {rule.transform!r} of {rule.source} cannot be undone here")
