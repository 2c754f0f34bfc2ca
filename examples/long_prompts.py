"""Times the small model on prompts with an increasing number of images, dense and sparse.

For each prompt it measures two times: attention in all layers of the language model, and the whole
prefill, from the embeddings to the first token.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.table import Table

import bsjax
from bsjax.attention import ragged_attention, resolve_backend
from bsjax.runtime.chunks import CacheLayout, ChunkArguments, Chunks, PlacedPrompt
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.sizes import cache_rows, sizes_in_use

from .train_small_vlm.files import PATCH_SIZE
from .train_small_vlm.scenes import COLOURS, CONTENTS, draw_picture

LENGTHS = (2048, 4096, 8192, 16384)
"""The least number of tokens of each prompt."""
ROUNDS = 3
"""How many times each prompt is timed, at most; dense and sparse take turns."""
SECONDS = 8.0
"""No further round of a prompt starts after this many seconds."""
IMAGE_SIDE = 64
"""Height and width of each image in pixels. An image of this size has 256 tokens, as in Gemma 3.
The images that the model was trained on have about 37 tokens; those of other published models have
more than 256."""
# The chat template adds a start token, an end token and a letter to each image.
_TOKENS_AROUND_AN_IMAGE = 3


class Timing(NamedTuple):
    """The times and FLOPs of one prompt. Pairs are (dense, sparse); seconds are medians."""

    tokens: int
    images: int
    flops: tuple[int, int]
    """Attention FLOPs of prefill in the language model."""
    attention: tuple[float, float]
    """Seconds of attention in all layers."""
    prefill: tuple[float, float]
    """Seconds of prefill and first token."""


def long_prompt(random: np.random.Generator, tokens: int) -> list[dict[str, Any]]:
    """Chat messages with as many random images as it takes to reach `tokens` tokens."""
    content: list[dict[str, Any]] = []
    while tokens > 0:
        name = CONTENTS[random.integers(len(CONTENTS))]
        colour = list(COLOURS)[random.integers(len(COLOURS))]
        pixels = draw_picture(random, name, colour, test=True).pixels
        image = Image.fromarray(pixels).resize((IMAGE_SIDE, IMAGE_SIDE))
        content.append({"type": "image", "image": image, "max_pixels": IMAGE_SIDE**2})
        tokens -= (IMAGE_SIDE // PATCH_SIZE) ** 2 + _TOKENS_AROUND_AN_IMAGE
    content.append({"type": "text", "text": "What comes twice?"})
    return [{"role": "user", "content": content}]


def time_prompts(
    model: bsjax.LoadedModel, profile: bsjax.Profile, lengths: Sequence[int] = LENGTHS
) -> Iterator[Timing]:
    """Times one prompt of each length, dense and with the profile."""
    random = np.random.default_rng(0)
    for length in lengths:
        messages = long_prompt(random, length)
        dense, sparse = (inputs_of(model, messages, used) for used in (None, profile))
        yield Timing(
            tokens=dense.tokens,
            images=dense.template.num_images,
            flops=(sparse.flops_dense, sparse.flops_sparse),
            attention=_medians([_attention_call(model, inputs) for inputs in (dense, sparse)]),
            prefill=_medians(_prefill_calls(model, profile, messages)),
        )


def inputs_of(
    model: bsjax.LoadedModel, messages: Any, profile: bsjax.Profile | None
) -> ModelInputs:
    """The messages as `generate` prepares them."""
    backend = resolve_backend("auto")
    return prepare_inputs(model.architecture, model.prompt(messages), profile, backend=backend)


def _attention_call(model: bsjax.LoadedModel, inputs: ModelInputs) -> Callable[[], float]:
    """A call that returns the seconds of attention in all layers and chunks, on random values."""
    language_model = model.module.language_model
    layers, q_heads = inputs.head_category.shape
    kv_heads, head_dim = language_model.kv_heads, language_model.head_dim
    layout, sizes = CacheLayout(cache_rows(inputs.tokens + 1)), sizes_in_use()
    chunks = Chunks(
        [PlacedPrompt(inputs)],
        layout,
        sizes.chunks_for(layout.rows),
        q_heads // kv_heads,
        feature_rows=inputs.tokens,
    )
    random = np.random.default_rng(0)

    def values(*shape: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(*shape, head_dim)), language_model.dtype)

    @jax.jit
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, chunk: ChunkArguments) -> jax.Array:
        (rows,), outputs = chunk.cached_rows, chunk.outputs
        assert outputs is not None
        attention = partial(ragged_attention, scale=language_model.scale, backend="auto")

        def layer(index: jax.Array) -> jax.Array:
            return attention(q, k, v, rows.schedule, categories[index], index).sum()

        # As in prefill, only the row that chooses a token has a query in the last layer.
        last = attention(q[:1], k, v, outputs.schedule, categories[-1], jnp.int32(layers - 1)).sum()
        return jax.lax.map(layer, jnp.arange(layers - 1)).sum() + last

    categories = jnp.asarray(inputs.head_category)
    k, v = (values(layers, layout.rows, kv_heads) for _ in range(2))
    arguments = [
        (values(rows, q_heads), k, v, jax.device_put(chunk.arguments))
        for chunk, (_, rows) in zip(chunks, chunks.borders, strict=True)
    ]
    for of_chunk in arguments:
        attend(*of_chunk).block_until_ready()

    def seconds() -> float:
        start = time.perf_counter()
        for of_chunk in arguments:
            attend(*of_chunk).block_until_ready()
        return time.perf_counter() - start

    return seconds


def _prefill_calls(
    model: bsjax.LoadedModel, profile: bsjax.Profile, messages: Any
) -> list[Callable[[], float]]:
    """Calls that return the seconds of a prefill, dense and sparse, without compilation."""

    def call(used: bsjax.Profile | None) -> Callable[[], float]:
        def seconds() -> float:
            result = bsjax.generate(model, messages, profile=used, max_new_tokens=1)
            return result.stats.prefill_seconds

        return seconds

    return [call(None), call(profile)]


def _medians(calls: Sequence[Callable[[], float]]) -> tuple[float, float]:
    """The median seconds of each call. Each is called once per round."""
    rounds: list[list[float]] = []
    start = time.perf_counter()
    while len(rounds) < ROUNDS and time.perf_counter() - start < SECONDS:
        rounds.append([call() for call in calls])
    dense, sparse = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return dense, sparse


def table_of_timings(timings: Sequence[Timing]) -> Table:
    """A line for each prompt: seconds dense and sparse, and sparse relative to dense."""
    table = Table(
        title="attention and prefill of long prompts, seconds (sparse / dense)",
        title_justify="left",
    )
    for name in ("tokens", "images", "attention", "", "prefill", "", "FLOPs"):
        table.add_column(name, justify="right")
    for timing in timings:
        cells = [f"{timing.tokens:,}", str(timing.images)]
        for dense, sparse in (timing.attention, timing.prefill):
            cells += [f"{dense:.2f} -> {sparse:.2f}", f"{sparse / dense:.2f}"]
        dense_flops, sparse_flops = timing.flops
        table.add_row(*cells, f"{sparse_flops / dense_flops:.2f}")
    return table


def plot_timings(timings: Sequence[Timing], path: Path) -> Path:
    """Draws seconds against tokens, dense and sparse, for attention and for prefill."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    tokens = [timing.tokens for timing in timings]
    panels = figure.subplots(1, 2, sharey=True)
    for panel, title, pairs in zip(
        panels,
        ("attention of all layers", "whole prefill"),
        ([timing.attention for timing in timings], [timing.prefill for timing in timings]),
        strict=True,
    ):
        for name, colour, seconds in zip(
            ("dense", "sparse"), ("#4c6a92", "#d1495b"), zip(*pairs, strict=True), strict=True
        ):
            panel.plot(tokens, seconds, marker="o", color=colour, label=name)
        panel.set_title(title)
        panel.set_xlabel("tokens of the prompt")
        panel.set_xticks(tokens, [f"{count / 1024:.0f}K" for count in tokens])
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    panels[0].set_ylabel("seconds")
    panels[0].set_ylim(bottom=0)
    figure.savefig(path, dpi=130)
    return path
