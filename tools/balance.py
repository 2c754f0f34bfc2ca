"""Simulates how the rows of prompts are dealt to several GPUs, and what that makes of a layer.

    python -m tools.balance        # the tables of docs/devices.md

Blocks are counted in the schedules that `bsjax.generate` would run, for the heads and layers of
Qwen2.5-VL-7B. Times are computed from them and from the bytes that travel, at the rates below.
Nothing here is measured.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax import HeadCategory, Profile
from bsjax.gpu.configurations import compiling_for
from bsjax.models import FAMILIES, Architecture
from bsjax.models.collectives import Shares
from bsjax.runtime.chunks import CacheLayout, Chunks, PlacedPrompt
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.sizes import cache_rows, sizes_in_use
from tools.compiled_kernels import target_name
from tools.memory_table import DTYPE, image_prompt

MODEL = "Qwen2.5-VL-7B"
KV_HEADS, Q_HEADS, HEAD_DIM = 4, 28, 128
LAYER_PARAMETERS = 2 * 3584 * (28 + 4) * 128 + 3 * 3584 * 18944

MATRIX_FLOPS = 600e12
"""FLOP/s of large matrix products on an H100."""

ATTENTION_FLOPS = 450e12
"""FLOP/s of the attention kernel."""

GPUS_OF_A_HOST = 8

WITHIN_A_HOST = 300e9
"""Bytes/s that a GPU receives from others over NVLink."""

NETWORK_CARD = 40e9
"""Bytes/s that each of a host's network cards receives: one for each GPU. NCCL's rings use all of
them, so that what other hosts have enters a host once."""

GRIDS = {400: (1, 40, 40), 1000: (1, 50, 80), 1800: (1, 80, 90)}
"""Frames, rows and columns of patches of images with this many tokens."""

PROMPTS = ((36, 1000), (90, 400), (20, 1800), (300, 1000))
"""Images, and tokens of each."""

MIX = "half dense"
HEADS: dict[str, Sequence[HeadCategory]] = {
    **{category.name: [category] * Q_HEADS for category in HeadCategory},
    MIX: [
        *[HeadCategory.DENSE] * 14,
        *[HeadCategory.SINK] * 3,
        *[HeadCategory.INTRA_IMAGE] * 4,
        *[HeadCategory.INTRA_IMAGE_SINK] * 7,
    ],
}
"""Categories of the heads of every layer."""

_PAGE = Path(__file__).parents[1] / "docs" / "devices.md"
_BALANCE = "| images x tokens | head categories | 2 GPUs | 4 | 8 | 16 | 64 | 8, in chunks |"
_SPEED = "| images x tokens | head categories | 1 GPU, ms | 8 GPUs, ms | efficiency | 64 GPUs, ms | efficiency |"  # noqa: E501


class Dealt(NamedTuple):
    """The blocks of a layer that each GPU visits: [chunks, GPUs]; and the bytes it receives."""

    blocks: np.ndarray
    received: int

    @property
    def imbalance(self) -> float:
        """Greatest over mean. GPUs wait for each other in every layer of every chunk."""
        return float(self.blocks.max(axis=1).sum() / self.blocks.mean(axis=1).sum())


def inputs_of(images: int, tokens: int, heads: Sequence[HeadCategory]) -> ModelInputs:
    """A prompt of images of one size."""
    config = PUBLISHED_MODELS[MODEL]()
    family = FAMILIES[config.model_type]
    layers = config.get_text_config().num_hidden_layers
    categories = np.tile(np.asarray(heads, np.int8), (layers, 1))
    prompt = image_prompt(config, images * (tokens + 8) + 8, GRIDS[tokens])
    return prepare_inputs(
        Architecture(family, config, DTYPE),
        prompt,
        Profile(family=family.name, categories=categories),
        backend="pallas",
    )


def dealt(inputs: ModelInputs, gpus: int, *, whole: bool = False) -> Dealt:
    """Deals a prompt, as a single chunk or in those that it runs in."""
    rows = cache_rows(inputs.tokens)
    sizes = sizes_in_use().on_devices(gpus).chunks_for(rows)
    if whole:
        sizes = (-(-inputs.tokens // gpus) * gpus,)
    chunks = Chunks(
        [PlacedPrompt(inputs)],
        CacheLayout(rows),
        sizes,
        Q_HEADS // KV_HEADS,
        feature_rows=1,
        all_outputs=True,
        devices=gpus,
        on_a_mesh=gpus > 1,
    )
    heads = np.bincount(inputs.head_category[0], minlength=len(HeadCategory))
    # Tiles of text rows stack the query heads that share a key head.
    weights = np.append(heads, KV_HEADS)
    blocks, received = [], 0
    of_token = 2 * KV_HEADS * HEAD_DIM * DTYPE.itemsize
    for chunk in chunks:
        arguments = chunk.arguments
        columns = (
            (arguments.stacked if isinstance(arguments, Shares) else arguments)
            .cached_rows[0]
            .schedule.tile_columns
        )
        full, partial = columns[..., 3], columns[..., 4]
        visited = (full + partial).sum(axis=-1).reshape(-1, weights.size)
        blocks.append(visited @ weights)
        received += (rows + chunk.position.size) * of_token * (gpus - 1) // gpus
    return Dealt(np.asarray(blocks), received)


def seconds(inputs: ModelInputs, gpus: int) -> float:
    """Of one layer, for all chunks."""
    found = dealt(inputs, gpus)
    block_q, block_kv = inputs.blocks
    flops = 4 * block_q * block_kv * HEAD_DIM * found.blocks.max(axis=1).sum()
    products = 2 * LAYER_PARAMETERS * inputs.tokens / gpus
    hosts = -(-gpus // GPUS_OF_A_HOST)
    entering = found.received * (hosts - 1) / hosts
    travelling = max(found.received / WITHIN_A_HOST, entering / (GPUS_OF_A_HOST * NETWORK_CARD))
    return products / MATRIX_FLOPS + float(flops) / ATTENTION_FLOPS + travelling


def main() -> int:
    """Writes the tables; returns the exit status."""
    balance, speed = [], []
    with compiling_for(target_name("h100")):
        for images, tokens in PROMPTS:
            for name, heads in HEADS.items():
                inputs = inputs_of(images, tokens, heads)
                ratios = [dealt(inputs, gpus, whole=True).imbalance for gpus in (2, 4, 8, 16, 64)]
                ratios.append(dealt(inputs, 8).imbalance)
                cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
                balance.append(f"| {images} x {tokens} | {name} | {cells} |")
                print(balance[-1], flush=True)
                if tokens == 1000 and name in ("DENSE", MIX, "INTRA_IMAGE_SINK"):
                    one = seconds(inputs, 1)
                    times = f"{1000 * one:.1f}"
                    for gpus in (8, 64):
                        several = seconds(inputs, gpus)
                        times += f" | {1000 * several:.1f} | {one / several / gpus:.0%}"
                    speed.append(f"| {images} x {tokens} | {name} | {times} |")
                    print(speed[-1], flush=True)
    page = _PAGE.read_text(encoding="utf-8").splitlines()
    for header, lines in ((_BALANCE, balance), (_SPEED, speed)):
        first = page.index(header)
        end = next(index for index in range(first, len(page)) if not page[index].startswith("|"))
        page[first:end] = [header, "|---|---" + "|---:" * (header.count("|") - 3) + "|", *lines]
    _PAGE.write_text("\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
