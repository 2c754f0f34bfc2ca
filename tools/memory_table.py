"""Finds out how much GPU memory published models take for long prompts, without a GPU.

    python -m tools.memory_table [--check]

Compiles every program of a generation ahead of time for an H200 and an A100, in bfloat16, for
prompts of 1000-token images (Gemma 3: 256). Prints the memory that each prompt takes and writes
docs/memory.md.
Fails if a goal is missed. With --check it writes no file.
"""

import argparse
import importlib.metadata
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PretrainedConfig

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax import HeadCategory, Profile
from bsjax.checkpoint.loading import abstract_module, placed_module
from bsjax.gpu.configurations import compiling_for
from bsjax.models import FAMILIES, Architecture
from bsjax.models.collectives import CONTEXT, TENSOR
from bsjax.models.pixels import PixelScale
from bsjax.profiling import computations as profiling_computations
from bsjax.profiling.groups import group_schedule
from bsjax.profiling.prompt_inputs import (
    PackedPrompt,
    PromptEmbedding,
    Shape,
    category_schedule,
)
from bsjax.prompts.prompt import Prompt, PromptImage
from bsjax.runtime.batch import copying_program
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings, Decoding
from bsjax.runtime.inputs import ModelInputs, prepare_inputs
from bsjax.runtime.kept_cache import moving_program
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Programs, Stage, size_in_bytes
from bsjax.runtime.sizes import cache_rows
from tools.compiled_kernels import target_name
from tools.gpu_targets import TARGETS, compile_for, target_mesh

DTYPE = jnp.dtype(jnp.bfloat16)
PROMPTS = {
    "Qwen2-VL-2B": (36_000, 150_000, 300_000),
    "Qwen2.5-VL-7B": (36_000, 150_000, 300_000),
    "Qwen2.5-VL-72B": (36_000, 300_000),
    "Gemma-3-4B": (36_000, 131_000),
    "Gemma-3-27B": (36_000, 65_536, 131_000),
}
"""Tokens of the prompts, by model. Gemma 3 has 131,072 positions, including the answer."""
PROFILED = {"Qwen2.5-VL-7B": 32_768, "Gemma-3-27B": 32_768}
"""Tokens of the sample that each model is profiled on."""
BATCHES = {"Qwen2.5-VL-7B": (32, 8192), "Gemma-3-27B": (16, 8192)}
"""Conversations of the batch that is measured with each model, and the tokens of each prompt."""
SESSIONS = {"Qwen2.5-VL-7B": 300_000}
"""Tokens of the session that is measured with each model."""
GPUS = ("h200", "a100")
NEW_TOKENS = 64
STAGES = ("vision", "prefill", "decode")

GOALS = {
    ("Qwen2.5-VL-7B", 300_000): 3 * 2**30,
    ("Gemma-3-4B", 131_000): 3 * 2**30,
    ("Gemma-3-27B", 131_000): 3 * 2**30,
}
"""By model and tokens: the most bytes in addition to weights and cache, at any stage and GPU."""

# An image 700 pixels high and 1120 wide: 50 x 80 patches, 1000 tokens for Qwen.
_GRID = (1, 50, 80)
_TEXT_TOKENS = 8
# The share of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION is set.
_MEMORY_FRACTION = 0.75
_DESTINATION = Path(__file__).parents[1] / "docs" / "memory.md"
_PACKAGES = ("jax", "jaxlib", "jax-cuda12-pjrt")


class Measurement(NamedTuple):
    """The memory that one model takes for one prompt, in bytes."""

    target: str
    model: str
    inputs: ModelInputs
    weights: int
    cache: int
    chunk_rows: int
    stages: tuple[Stage, ...]

    def temporaries(self, name: str | None = None) -> int:
        """Peak bytes in addition to weights and cache, at one stage or over all stages.

        They include image features, pixel values, schedules, results and the program's
        temporaries.
        """
        return max(stage.peak - self.cache for stage in self.stages if name in (None, stage.name))

    @property
    def full_cache(self) -> int:
        """Bytes of a cache in which every layer keeps all tokens."""
        config = PUBLISHED_MODELS[self.model]()
        text = config.get_text_config()
        rows = cache_rows(self.inputs.tokens + NEW_TOKENS)
        head_dim = FAMILIES[config.model_type].text_head_dim(config)
        of_layer = 2 * rows * text.num_key_value_heads * head_dim * DTYPE.itemsize
        return text.num_hidden_layers * of_layer

    @property
    def peak(self) -> int:
        """Peak bytes on the device over all stages."""
        return self.weights + max(stage.peak for stage in self.stages)

    @property
    def missed_goal(self) -> str | None:
        """A message with the goal that is missed; None if there is no goal, or it is met."""
        goal = GOALS.get((self.model, self.inputs.tokens))
        found = self.temporaries()
        if goal is None or found <= goal:
            return None
        worst = max(STAGES, key=self.temporaries)
        return (
            f"{self.model} with {self.inputs.tokens} tokens on {self.target}: {_gib(found)} GiB "
            f"in addition to weights and cache in {worst}; the goal is {_gib(goal)} GiB."
        )


def image_prompt(
    config: PretrainedConfig, tokens: int, grid: tuple[int, int, int] = _GRID
) -> Prompt:
    """A prompt of `tokens` tokens: images, with a little text before each and at the end.

    Images have 1000 tokens, or 256 for Gemma 3. Pixel values are zeros and take no memory.

    Args:
      config: the configuration of the model.
      tokens: of the prompt.
      grid: frames, rows and columns of patches of each image, if the model takes images of any
        size.
    """
    family = FAMILIES[config.model_type]
    grid = family.smallest_grid(config) if config.model_type == "gemma3" else grid
    image_tokens = int(np.prod(grid)) // family.patches_per_token(config)
    nothing = np.broadcast_to(np.uint8(0), (int(np.prod(grid)), family.patch_area(config) * 3))
    image = PromptImage(
        np.asarray(grid, np.int32),
        image_tokens,
        PixelScale(np.ones(3, np.float32), np.zeros(3, np.float32)),
        lambda: nothing,
    )
    text, of_image = [0] * _TEXT_TOKENS, [config.image_token_id] * image_tokens
    images = (tokens - _TEXT_TOKENS) // (len(text) + len(of_image))
    ids = (text + of_image) * images
    ids += [0] * (tokens - len(ids))
    return Prompt(np.asarray(ids, np.int32), (image,) * images)


def measure(
    model: str,
    tokens: int,
    target: str = GPUS[0],
    *,
    conversations: int = 1,
    context: int = 1,
    tensor: int = 1,
    hosts: int = 1,
    backend: str = "pallas",
) -> Measurement:
    """Compiles the programs of `bsjax.generate` for prompts of `tokens` tokens.

    All four categories occur among the heads, so that schedules have all tables. With one
    conversation, the last stage is what a session runs to move the rows that it keeps; with
    several, what a batch runs to copy what prompts begin with.

    Args:
      model: a key of `PUBLISHED_MODELS`.
      tokens: of each prompt.
      target: a key of `gpu_targets.TARGETS`.
      conversations: how many prompts the cache has room for.
      context: how many GPUs, or groups of `tensor` GPUs, the rows are divided among. Figures are
        those of each GPU.
      tensor: how many GPUs the weights are divided among.
      hosts: how many processes the GPUs belong to.
      backend: the attention backend, "pallas" or "triton".
    """
    config = PUBLISHED_MODELS[model]()
    family = FAMILIES[config.model_type]
    text = config.get_text_config()
    architecture = Architecture(family, config, DTYPE)
    mesh = None
    if context * tensor > 1:
        mesh = target_mesh(target, {CONTEXT: context, TENSOR: tensor}, hosts)
    module, _ = placed_module(architecture, mesh)
    programs = Programs(module, partial(_compile, target))
    shape = (text.num_hidden_layers, text.num_attention_heads)
    mixed = np.arange(np.prod(shape), dtype=np.int8) % len(HeadCategory)
    # Sizes of chunks and of groups of images are those of the GPU.
    with compiling_for(target_name(target)):
        inputs = prepare_inputs(
            architecture,
            image_prompt(config, tokens),
            Profile(family=family.name, categories=mixed.reshape(shape)),
            backend=backend,
            new_tokens=NEW_TOKENS,
        )
        settings = AnswerSettings(NEW_TOKENS, backend)
        layout = CacheLayout(cache_rows(inputs.tokens + NEW_TOKENS), conversations)
        # Programs depend on the shape of the cache, and not on how many prompts have a part of it.
        prompts = [PlacedPrompt(inputs, sequence=at) for at in range(min(conversations, 2))]
        prefill = Prefill(programs, prompts, layout, [settings] * len(prompts), backend)
        chunk_rows = max(rows for _, rows in prefill.chunks.borders)
    decoding = Decoding(programs, layout, settings.end_tokens, backend)
    weights, cache = size_in_bytes(programs.parameters), size_in_bytes(prefill.carried.cache)
    if conversations > 1:
        of_rows = copying_program(programs, prefill.carried)
    else:
        of_rows = moving_program(programs, layout.rows)
    stages = (*prefill.stages, *decoding.stages, Stage("rows", of_rows))
    return Measurement(target, model, inputs, weights, cache, chunk_rows, stages)


def measure_profiling(model: str, tokens: int, target: str = GPUS[0]) -> tuple[Stage, ...]:
    """Compiles the programs of `bsjax.profile` for a sample of `tokens` tokens."""
    config = PUBLISHED_MODELS[model]()
    family = FAMILIES[config.model_type]
    shape = Shape.of(family, config)
    architecture = Architecture(family, config, DTYPE)
    programs = Programs(abstract_module(architecture), partial(_compile, target))
    with compiling_for(target_name(target)):
        packed = PackedPrompt.of(architecture, image_prompt(config, tokens), None, "pallas")
        embedding = PromptEmbedding(programs, packed, "pallas")

    def stage(name: str, step: Any, build: Any, *more_arguments: Any) -> Stage:
        schedules = packed.schedules(shape, DTYPE, "pallas", build)
        arguments = (embedding.output, packed.position_ids, schedules, *more_arguments)
        return Stage(name, programs.get(step, arguments, static=("pallas",)))

    dense, states = np.zeros((shape.layers, shape.heads), np.int32), np.zeros(9, np.int32)
    return (
        stage("heads", profiling_computations.measure_heads, group_schedule),
        stage("sinks", profiling_computations.measure_offsets, category_schedule),
        stage("comparing", profiling_computations.states_at, category_schedule, dense, states),
    )


def markdown(
    measurements: Sequence[Measurement],
    profiling: Mapping[tuple[str, str], Sequence[Stage]] | None = None,
    several: Mapping[str, Measurement] | None = None,
) -> str:
    """The page docs/memory.md.

    Args:
      measurements: the memory of generation, from `measure`.
      several: the memory of batches and sessions on the first GPU, and what each is.
      profiling: the stages of profiling, from `measure_profiling`, by GPU and model.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    tables = "\n\n".join(
        _table(target, [found for found in measurements if found.target == target])
        for target in dict.fromkeys(found.target for found in measurements)
    )
    rings = "\n".join(
        f"| {found.model} | {found.inputs.tokens:,} | {_gib(found.cache)} | "
        f"{_gib(found.full_cache)} | {found.cache / found.full_cache:.2f} |"
        for found in measurements
        if len(found.inputs.visibilities) > 1 and found.target == measurements[0].target
    )
    goals = "\n".join(
        f"- {model} with {tokens:,} tokens: "
        f"at most {_gib(goal)} GiB in addition to weights and cache."
        for (model, tokens), goal in GOALS.items()
    )
    return f"""# Memory of long prompts

Figures are GiB on one GPU, in bfloat16. They come from XLA's memory analysis of programs that were
compiled ahead of time for these GPUs. **The programs have not been run on a GPU.**

{tables}

The tool that writes this page fails if one of these goals is missed:

{goals}

`vision`, `prefill` and `decode` are the peaks of these stages in addition to weights and cache;
they include image features and pixel values. `vision` handles a group of images at a time and
`prefill` a chunk of at most {measurements[0].chunk_rows:,} rows, however long the prompt is.
`peak` is the sum of weights, cache and the largest of these stages. A prompt `fits` if its peak is
at most {_MEMORY_FRACTION:.0%} of the GPU's memory, the share that JAX takes by default
(`XLA_PYTHON_CLIENT_MEM_FRACTION` changes it).

Prompts consist of 1000-token images (Gemma 3: images of 256 tokens, 4096 patches) with
{_TEXT_TOKENS} text tokens before each. {NEW_TOKENS} tokens are generated. All four head categories
occur in every layer. The length of the cache is rounded up to one of a few:
{_largest(measurements)}.

## Caches of layers with a window

Gemma 3's local layers keep the last 1023 tokens, which are all that a query sees besides itself.
Its global layers keep all tokens. The table gives, in GiB, the size of this cache and of a cache in
which every layer keeps all tokens (computed from its shape):

| model | tokens | cache | cache of full length | share |
|---|---:|---:|---:|---:|
{rings}
{_several_section(several or {})}{_profiling_section(profiling or {})}
Made by `python -m tools.memory_table` with {versions}.
"""


def _several_section(several: Mapping[str, Measurement]) -> str:
    if not several:
        return ""
    header = ["model", "", "weights", "cache", *STAGES, "rows", "peak"]
    lines = ["| " + " | ".join(header) + " |", "|---|---" + "|---:" * (len(header) - 2) + "|"]
    for what, found in several.items():
        cells = [
            found.model,
            what,
            *map(_gib, (found.weights, found.cache)),
            *(_gib(found.temporaries(name)) for name in (*STAGES, "rows")),
            _gib(found.peak),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    table = "\n".join(lines)
    return f"""
## Batches and sessions

GiB on one {TARGETS[GPUS[0]].device_kind}. The cache of a batch has as many rows for each
conversation as the longest needs. `rows` is the program that moves rows of a session's cache, or
copies what several prompts of a batch begin with.

{table}
"""


def _profiling_section(profiling: Mapping[tuple[str, str], Sequence[Stage]]) -> str:
    if not profiling:
        return ""
    names = [stage.name for stage in next(iter(profiling.values()))]
    lines = [
        "| GPU | model | tokens | " + " | ".join(names) + " |",
        "|---|---|---:" + "|---:" * len(names) + "|",
    ]
    for (target, model), stages in profiling.items():
        cells = [TARGETS[target].device_kind, model, f"{PROFILED[model]:,}"]
        lines.append("| " + " | ".join([*cells, *(_gib(stage.peak) for stage in stages)]) + " |")
    table = "\n".join(lines)
    return f"""
## Profiling

GiB in addition to the weights while a sample is profiled: for the statistics of all heads, for the
search for sinks, and for the comparison of categories with the dense model. No stage keeps an array
of tokens x heads for each layer.

{table}
"""


def _table(target: str, measurements: Sequence[Measurement]) -> str:
    """The section of one GPU."""
    gpu = TARGETS[target]
    capacity = _MEMORY_FRACTION * gpu.device_memory
    header = ["model", "tokens", "images", "weights", "cache", *STAGES, "peak", "fits"]
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for found in measurements:
        cells = [
            found.model,
            f"{found.inputs.tokens:,}",
            str(found.inputs.template.num_images),
            *map(_gib, (found.weights, found.cache)),
            *(_gib(found.temporaries(name)) for name in STAGES),
            _gib(found.peak),
            "yes" if found.peak <= capacity else "no",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    heading = f"## {gpu.device_kind}, {_gib(gpu.device_memory)} GiB"
    return "\n".join([heading, "", *lines])


def _largest(measurements: Sequence[Measurement]) -> str:
    inputs = max((found.inputs for found in measurements), key=lambda inputs: inputs.tokens)
    rows = cache_rows(inputs.tokens + NEW_TOKENS)
    return f"{rows:,} rows for {inputs.tokens:,} tokens"


def _compile(target: str, jitted: Any, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
    return compile_for(jitted, arguments, target)


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.memory_table", description=__doc__)
    parser.add_argument("--check", action="store_true", help="do not write the page")
    check = parser.parse_args(arguments).check
    measurements = []
    for target in GPUS:
        for model, lengths in PROMPTS.items():
            for tokens in lengths:
                print(f"Compiling {model} for {tokens:,} tokens, {target} ...", file=sys.stderr)
                measurements.append(measure(model, tokens, target))
    profiling = {}
    for target in GPUS:
        for model, tokens in PROFILED.items():
            print(f"Compiling the profiling of {model}, {target} ...", file=sys.stderr)
            profiling[target, model] = measure_profiling(model, tokens, target)
    several = {}
    for model, (conversations, tokens) in BATCHES.items():
        print(f"Compiling a batch of {model} ...", file=sys.stderr)
        what = f"batch of {conversations} x {tokens:,} tokens"
        several[what] = measure(model, tokens, conversations=conversations)
    for model, tokens in SESSIONS.items():
        several[f"session of {tokens:,} tokens"] = measure(model, tokens)
    page = markdown(measurements, profiling, several)
    print(page)
    if not check:
        _DESTINATION.parent.mkdir(exist_ok=True)
        _DESTINATION.write_text(page)
    missed = [found.missed_goal for found in measurements if found.missed_goal]
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
