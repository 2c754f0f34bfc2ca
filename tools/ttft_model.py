"""Writes docs/ttft.md: a model of the time to the first token on GPUs, computed from counts.

    python -m tools.ttft_model           # five minutes; needs no GPU and compiles nothing

Nothing is run. The products of matrices of every program are counted in its trace, as often as
`bsjax.generate` would run it, and attention in the schedules, block by block. Dividing both by
rates that are assumed gives seconds.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.published_models import PUBLISHED_MODELS
from bsjax import HeadCategory, Profile
from bsjax.checkpoint.loading import abstract_module
from bsjax.gpu.configurations import compiling_for
from bsjax.masks.flops import FLOPS_PER_PAIR
from bsjax.masks.schedule import Schedule
from bsjax.models import FAMILIES, Architecture
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Programs, size_in_bytes
from bsjax.runtime.sizes import cache_rows
from tools.compiled_kernels import target_name
from tools.memory_table import DTYPE, image_prompt

PAGE = Path(__file__).parent.parent / "docs" / "ttft.md"
CASES = {
    "Qwen2-VL-2B": (36_000, 150_000),
    "Qwen2.5-VL-7B": (36_000, 100_000, 300_000),
    "Gemma-3-4B": (36_000, 131_000),
    "Gemma-3-27B": (36_000, 131_000),
}
# Tera operations a second in bfloat16 without sparsity, and gigabytes a second, from data sheets.
GPUS = {"H100": (989, 3350), "H200": (989, 4800)}
PRODUCTS, ATTENTION, BANDWIDTH = 0.6, 0.45, 0.8
"""Assumed shares of these rates that products of matrices, the kernel and memory reach."""
# Shares of the heads that are sparse. Half of them cut about 45 % of the attention FLOPs.
VARIANTS = {"dense": 0.0, "half sparse": 0.5, "all sparse": 1.0}
FIGURES = ("vision", "linear", "attention")


class Counts(NamedTuple):
    """What a prompt takes until its first token.

    Attributes:
      vision: FLOPs of the vision tower, attention included.
      linear: FLOPs of all products of the language model but attention.
      attention: FLOPs of all blocks that attention visits.
      chunks: how often the weights of the language model are read.
      weights: their bytes.
      images: how many images the prompt has.
    """

    vision: int
    linear: int
    attention: int
    chunks: int
    weights: int
    images: int

    def seconds(self, gpu: str) -> dict[str, float]:
        """Seconds of each part on a GPU."""
        operations, gigabytes = GPUS[gpu]
        rate = operations * 1e12
        reading = self.chunks * self.weights / (gigabytes * 1e9 * BANDWIDTH)
        return {
            "vision": self.vision / (rate * PRODUCTS),
            # Whichever takes longer.
            "linear": max(self.linear / (rate * PRODUCTS), reading),
            "attention": self.attention / (rate * ATTENTION),
        }


def products(jaxpr: Any) -> int:
    """FLOPs of all products of matrices in a trace, loops included, kernels excluded."""
    total = 0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                2
                * int(np.prod([shape[axis] for axis in contracted]))
                * int(np.prod(equation.outvars[0].aval.shape))
            )
        elif name == "pallas_call":
            continue
        else:
            inner = [products(each) for each in _inner(parameters)]
            # Of the branches of a condition, one runs.
            of_inner = max(inner, default=0) if name == "cond" else sum(inner)
            total += of_inner * (parameters["length"] if name == "scan" else 1)
    return total


def _inner(parameters: Mapping[str, Any]) -> Iterator[Any]:
    for value in parameters.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if hasattr(each, "jaxpr"):
                yield each.jaxpr
            elif hasattr(each, "eqns"):
                yield each


def visited(schedule: Schedule, heads: Mapping[HeadCategory, int], kv_heads: int) -> int:
    """Pairs of rows and keys in all blocks that these heads visit."""
    blocks = np.asarray(schedule.tiles.blocks).sum(axis=1, dtype=np.int64)
    groups = np.asarray(schedule.groups)
    stacked = blocks[-1] if schedule.stacked_heads else 0
    own = blocks[:-1] if schedule.stacked_heads else blocks
    total = kv_heads * int(stacked)
    for category, count in heads.items():
        (table,) = np.flatnonzero(groups[: own.size] == int(category.groups))[:1]
        total += count * int(own[table])
    return total * schedule.block_q * schedule.block_kv


def count(model: str, tokens: int, sparse: float) -> Counts:
    """Traces and counts what `bsjax.generate` does for a prompt.

    Args:
      model: a key of `PUBLISHED_MODELS`.
      tokens: tokens of the prompt.
      sparse: the share of heads that are sparse; they take the three categories in turn.
    """
    config = PUBLISHED_MODELS[model]()
    family, text = FAMILIES[config.model_type], config.get_text_config()
    architecture = Architecture(family, config, DTYPE)
    layers, heads, kv_heads = (
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
    )
    traces: dict[int, Any] = {}

    def traced(jitted: Any, shapes: tuple[Any, ...]) -> Any:
        trace = jitted.trace(*shapes)
        out = jax.tree.map(
            lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), trace.out_info
        )
        result = SimpleNamespace(out_info=out, memory_analysis=lambda: None)
        traces[id(result)] = trace.jaxpr.jaxpr
        kept.append(result)
        return result

    kept: list[Any] = []
    programs = Programs(abstract_module(architecture), traced)
    of_layer = np.full(heads, HeadCategory.DENSE, np.int8)
    of_layer[: round(sparse * heads)] = np.resize(
        np.asarray(list(HeadCategory)[1:], np.int8), round(sparse * heads)
    )
    profile = Profile(family=family.name, categories=np.tile(of_layer, (layers, 1)))
    with compiling_for(target_name("h200")):
        inputs = prepare_inputs(
            architecture, image_prompt(config, tokens), profile, backend="pallas", new_tokens=1
        )
        layout = CacheLayout(cache_rows(inputs.tokens + 1))
        settings = AnswerSettings(1, "pallas")
        prefill = Prefill(programs, [PlacedPrompt(inputs)], layout, [settings], "pallas")
        vision = 0
        per_pair = FLOPS_PER_PAIR * family.vision_head_dim(config)
        of_group = {
            id(each.program): products(traces[id(each.program.compiled)])
            for each in prefill.stages
            if each.name == "vision"
        }
        # Groups of one size share a program, and padding is computed too.
        sizes = sorted({group.padded_tokens for group in prefill.groups})
        by_size = dict(zip(sizes, sorted(of_group.values()), strict=True))
        tower = config.vision_config
        tower_layers = getattr(tower, "depth", None) or tower.num_hidden_layers
        tower_heads = getattr(tower, "num_heads", None) or tower.num_attention_heads
        whole = len(getattr(tower, "fullatt_block_indexes", range(tower_layers)))
        for group in prefill.groups:
            vision += by_size[group.padded_tokens]
            schedules = [(group.plan.schedule, whole)]
            window = getattr(group.plan, "window_schedule", None)
            if window is not None:
                schedules.append((window, tower_layers - whole))
            for schedule, count_of in schedules:
                blocks = int(np.asarray(schedule.tiles.blocks).sum(dtype=np.int64))
                pairs = blocks * schedule.block_q * schedule.block_kv
                vision += count_of * tower_heads * per_pair * pairs

        linear = attention = 0
        per_pair = FLOPS_PER_PAIR * family.text_head_dim(config)
        counts = {
            category: int((of_layer == category).sum())
            for category in HeadCategory
            if (of_layer == category).any()
        }
        kinds = np.bincount(family.layer_kinds(config), minlength=len(inputs.visibilities))
        # The last layer attends for one row.
        kinds[inputs.last_kind] -= 1
        for parts, rows in prefill.chunks.borders:
            chunk = prefill.chunks.chunk(parts, rows)
            linear += products(traces[id(prefill.program_of(chunk).compiled)])
            for cached, of_kind in zip(chunk.arguments.cached_rows, kinds.tolist(), strict=True):
                attention += of_kind * per_pair * visited(cached.schedule, counts, kv_heads)
    weights = size_in_bytes(programs.parameters)
    return Counts(
        vision, linear, attention, len(prefill.chunks.borders), weights, len(inputs.images)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tools.ttft_model", description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGE)
    output = parser.parse_args(arguments).output
    rows = {}
    for model, lengths in CASES.items():
        for tokens in lengths:
            for variant, sparse in VARIANTS.items():
                print(f"{model}, {tokens:,} tokens, {variant} ...", file=sys.stderr)
                rows[model, tokens, variant] = count(model, tokens, sparse)
    output.write_text(markdown(rows))
    return 0


def markdown(rows: Mapping[tuple[str, int, str], Counts]) -> str:
    """The page docs/ttft.md."""
    of_gpu = {gpu: _table(gpu, rows) for gpu in GPUS}
    tables = "\n\n".join(
        f"## {' and '.join(gpu for gpu in GPUS if of_gpu[gpu] == table)}\n\n{table}"
        for table in dict.fromkeys(of_gpu.values())
    )
    rates = ", ".join(f"{gpu} {rate} and {bytes_}" for gpu, (rate, bytes_) in GPUS.items())
    return f"""# The time to the first token on GPUs, computed

**Nothing here was measured.** The products of matrices were counted in the traces of the programs
that `bsjax.generate` runs for a prompt. Attention was counted in their schedules: all blocks that
the kernel visits, whole ones, with dense heads too. Seconds are these counts divided by assumed
rates: {PRODUCTS:.0%} of the data sheet's bfloat16 rate for products and {ATTENTION:.0%} for
attention. Where it takes longer to read the language model's weights once per chunk, at
{BANDWIDTH:.0%} of the memory's rate, that time counts instead of its products. The data sheets say
(TFLOP/s and GB/s): {rates}.

Left out: the host (see the last column), copies, norms, activations, the choice of the token and
launches. Images have 1000 tokens, or 256 for Gemma 3. Sparse heads are SINK, INTRA_IMAGE and
INTRA_IMAGE_SINK in turn. `images a second` is how many images the
host must read and scale a second so that the GPU never waits; on two cores bsjax reads and scales
37 photographs of 1920 x 1080 a second.

{tables}

Sparse heads save part of the column `attention`, and nothing else.

Made by `python -m tools.ttft_model`.
"""


def _table(gpu: str, rows: Mapping[tuple[str, int, str], Counts]) -> str:
    header = ["model", "tokens", "heads", *FIGURES, "sum, s", "attention's share", "sum / dense"]
    header += ["images a second"]
    lines = ["| " + " | ".join(header) + " |", "|---|---:|---" + "|---:" * 7 + "|"]
    dense = 0.0
    for (model, tokens, variant), counts in rows.items():
        seconds = counts.seconds(gpu)
        total = sum(seconds.values())
        dense = total if variant == "dense" else dense
        cells = [model, f"{tokens:,}", variant, *(f"{seconds[name]:.2f}" for name in FIGURES)]
        cells += [f"{total:.2f}", f"{seconds['attention'] / total:.0%}", f"{total / dense:.2f}"]
        cells += [f"{counts.images / total:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
