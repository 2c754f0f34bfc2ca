"""Times the small model on prompts of more and more images, dense and sparse.

Two times are taken of each prompt: of the attention in all layers of the language model, and of the
whole prefill, from the embeddings to the first token.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from rich.table import Table

import bsjax
from bsjax.attention import block_sizes

from .train_small_vlm.files import PATCH_SIZE
from .train_small_vlm.scenes import COLOURS, CONTENTS, draw_picture

LENGTHS = (2048, 4096, 8192, 16384)
"""The least tokens of each prompt."""
ROUNDS = 3
"""How often each prompt is timed; dense and sparse take turns."""
# The chat template puts the tokens of start, end and letter around an image.
_TOKENS_AROUND_AN_IMAGE = 3


class Timing(NamedTuple):
    """What one prompt took. Pairs are (dense, sparse), seconds are medians."""

    tokens: int
    images: int
    flops: tuple[int, int]
    """Attention FLOPs of prefill in the language model."""
    attention: tuple[float, float]
    """Seconds of attention in all layers."""
    prefill: tuple[float, float]
    """Seconds of prefill and first token."""


def long_prompt(random: np.random.Generator, tokens: int) -> list[dict[str, Any]]:
    """Chat messages with as many drawn images as it takes to reach `tokens` tokens."""
    content: list[dict[str, Any]] = []
    while tokens > 0:
        name = CONTENTS[random.integers(len(CONTENTS))]
        colour = list(COLOURS)[random.integers(len(COLOURS))]
        pixels = draw_picture(random, name, colour, test=True).pixels
        content.append({"type": "image", "image": Image.fromarray(pixels)})
        tokens -= pixels[::PATCH_SIZE, ::PATCH_SIZE, 0].size + _TOKENS_AROUND_AN_IMAGE
    content.append({"type": "text", "text": "What comes twice?"})
    return [{"role": "user", "content": content}]


def time_prompts(
    model: bsjax.LoadedModel, profile: bsjax.Profile, lengths: Sequence[int] = LENGTHS
) -> Iterator[Timing]:
    """Times one prompt of each length, dense and with the profile."""
    random = np.random.default_rng(0)
    for length in lengths:
        messages = long_prompt(random, length)
        stats = [_generated(model, messages, used) for used in (None, profile)]
        yield Timing(
            tokens=stats[0].prompt_tokens,
            images=len(stats[0].image_tokens),
            flops=(stats[1].attention_flops_dense, stats[1].attention_flops_sparse),
            attention=_medians(_attention_calls(model, profile, messages)),
            prefill=_medians(_prefill_calls(model, profile, messages)),
        )


def _generated(
    model: bsjax.LoadedModel, messages: Any, profile: bsjax.Profile | None
) -> bsjax.Stats:
    """The statistics of a prompt whose answer is one token."""
    result = bsjax.generate(model, messages, profile=profile, max_new_tokens=1)
    assert isinstance(result, bsjax.Result)
    return result.stats


def _prefill_calls(
    model: bsjax.LoadedModel, profile: bsjax.Profile, messages: Any
) -> list[Callable[[], float]]:
    """Calls that time the prefill of a prompt, dense and sparse."""
    return [
        lambda: _generated(model, messages, None).prefill_seconds,
        lambda: _generated(model, messages, profile).prefill_seconds,
    ]


def _attention_calls(
    model: bsjax.LoadedModel, profile: bsjax.Profile, messages: Any
) -> list[Callable[[], float]]:
    """Calls that time the attention of all layers, dense and sparse, on random values.

    The heads of all layers are heads of one call: five layers of 6 query and 2 key-value heads are
    30 query and 10 key-value heads.
    """
    prompt = model.prompt(messages)
    template = bsjax.Template.from_tokens(
        prompt.token_ids, model.config.image_token_id, profile.sinks, prompt.image_tokens
    )
    text = model.config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(
            random.normal(size=(template.tokens, text.num_hidden_layers * heads, head_dim)),
            model.dtype,
        )
        for heads in (text.num_attention_heads, text.num_key_value_heads, text.num_key_value_heads)
    )
    attend = jax.jit(bsjax.sparse_attention)

    def call(categories: np.ndarray) -> Callable[[], float]:
        blocks = block_sizes("auto", head_dim, model.dtype, sparse=bool(categories.any()))
        mask = jax.device_put(bsjax.BlockMask(template, categories.ravel(), *blocks))
        attention = attend.lower(q, k, v, mask).compile()

        def seconds() -> float:
            start = time.perf_counter()
            attention(q, k, v, mask).block_until_ready()
            return time.perf_counter() - start

        return seconds

    return [call(np.zeros_like(profile.categories)), call(profile.categories)]


def _medians(calls: Sequence[Callable[[], float]]) -> tuple[float, float]:
    """The median of what each call returns, over rounds in which all take turns."""
    rounds = [[call() for call in calls] for _ in range(ROUNDS)]
    dense, sparse = (statistics.median(seconds) for seconds in zip(*rounds, strict=True))
    return dense, sparse


def table_of_timings(timings: Sequence[Timing]) -> Table:
    """A line for each prompt: seconds, and what sparsity leaves of them."""
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
