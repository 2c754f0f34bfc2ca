"""Small Hugging Face checkpoints to convert, and ways to damage them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
import transformers

from tests.support.parity import torch
from tests.support.small_models import IMAGE, IMAGE_END, IMAGE_START, Shape, small_config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<start><image><end>{% else %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
# Gemma 3's templates write only the start of an image; processing adds the rest.
GEMMA_CHAT_TEMPLATE = CHAT_TEMPLATE.replace("<start><image><end>", "<start>")


def write_source(
    folder: Path,
    family: str = "qwen2_vl",
    *,
    tied: bool = False,
    dtype: str = "bfloat16",
    shard_size: str = "1GB",
    seed: int = 0,
    inner: int = 96,
    layers: int = 2,
    q_heads: int = 4,
    softcap: float | None = None,
) -> Path:
    """Writes a checkpoint with random weights, as transformers saves it, with all its files."""
    shape = Shape(family, layers=layers, tied=tied, inner=inner, softcap=softcap, q_heads=q_heads)
    config = small_config(shape)
    torch.manual_seed(seed)
    reads_images = family != "gemma3_text"
    create = (
        transformers.AutoModelForImageTextToText
        if reads_images
        else transformers.AutoModelForCausalLM
    )
    model = create.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    is_gemma = family.startswith("gemma")
    _write_tokenizer(folder, GEMMA_CHAT_TEMPLATE if is_gemma else CHAT_TEMPLATE)
    if is_gemma and reads_images:
        side = config.vision_config.image_size
        processor = transformers.Gemma3ImageProcessorPil(size={"height": side, "width": side})
        processor.save_pretrained(folder)
    elif reads_images:
        transformers.Qwen2VLImageProcessorPil(
            patch_size=config.vision_config.patch_size
        ).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path, chat_template: str) -> None:
    special = {"<image>": IMAGE, "<start>": IMAGE_START, "<end>": IMAGE_END}
    names = {number: name for name, number in special.items()}
    vocabulary = {names.get(number, f"word{number}"): number for number in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=chat_template, image_token="<image>"
    )
    wrapped.save_pretrained(folder)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a source, by their keys in the files."""
    from safetensors.torch import load_file

    return {
        key: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for key, tensor in load_file(file).items()
    }


def change_weights(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, shards: int = 1
) -> Path:
    """Rewrites a source's tensors after `change` has edited their dictionary."""
    from safetensors.torch import save_file

    tensors = read_weights(folder)
    change(tensors)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink(missing_ok=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / WEIGHTS)
        return folder
    keys = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({key: tensors[key] for key in keys[shard::shards]}, folder / name)
        weight_map |= dict.fromkeys(keys[shard::shards], name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def rename_keys(folder: Path, *prefixes: tuple[str, str], shards: int = 1) -> Path:
    """Rewrites keys: the first prefix that a key starts with is replaced."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            for old, new in prefixes:
                if key.startswith(old):
                    tensors[new + key.removeprefix(old)] = tensors.pop(key)
                    break

    return change_weights(folder, change, shards=shards)


def edit_json(file: Path, **fields: object) -> None:
    """Sets fields of a JSON file; None removes one."""
    content = json.loads(file.read_text())
    content |= fields
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def as_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Values in float32, exactly."""
    return tensor.float().numpy()
