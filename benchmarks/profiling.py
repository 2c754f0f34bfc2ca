"""Measures the cost of profiling: each pass over a sample, compared with one dense prefill of it.

    python -m benchmarks.profiling

The model has random weights, and the prompt random images. All programs start from embeddings and
end with the last layer. The vision tower, which profiling runs once per pass like any prefill, is
not included; its time is printed separately. The dense prefill runs all rows at a time, like the
other passes and unlike the chunks of `generate`. It and the pass that computes the statistics of
all heads have the same attention FLOPs.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, interleaved, median_ratio, write_result
from benchmarks.random_models import SIZES, loaded_model, model_config, random_module
from bsjax import HeadCategory, Sinks
from bsjax.attention import resolve_backend
from bsjax.profiling import computations
from bsjax.profiling.groups import group_schedule
from bsjax.profiling.prompt_inputs import (
    PackedPrompt,
    PromptEmbedding,
    Shape,
    category_schedule,
)
from bsjax.runtime.programs import programs_of

DENSE = "dense prefill"
HEADS = "statistics of all heads"
OFFSETS = "looking for sinks"
COMPARED = "one comparison, all heads sparse"


def conversation(images: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 256, (images, *size, 3), dtype=np.uint8)
    parts = [{"type": "image", "image": Image.fromarray(pixels)} for pixels in pictures]
    question = {"type": "text", "text": "Which of these pictures is the brightest?"}
    return [{"role": "user", "content": [*parts, question]}]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    backend = resolve_backend("auto")
    dtype = np.dtype("float32") if jax.default_backend() == "cpu" else jax.numpy.bfloat16
    config = model_config(arguments.size)
    model = loaded_model(config, random_module(config, dtype), dtype)
    programs, shape = programs_of(model), Shape.of(model.family, model.config)
    prompt = model.prompt(conversation(arguments.images, tuple(arguments.image_size)))

    packed = PackedPrompt.of(model.architecture, prompt, Sinks(), backend)
    groups, categories = (
        packed.schedules(shape, model.dtype, backend, build)
        for build in (group_schedule, category_schedule)
    )
    embedding = PromptEmbedding(programs, packed, backend)
    jax.block_until_ready(embedding.run())
    vision_seconds = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        from_packed = jax.block_until_ready(embedding.run())
        vision_seconds.append(time.perf_counter() - start)
    dense = np.full((shape.layers, shape.heads), HeadCategory.DENSE, np.int32)
    sparse = np.full((shape.layers, shape.heads), HeadCategory.INTRA_IMAGE_SINK, np.int32)
    rows = np.zeros(9, np.int32)
    calls = {
        DENSE: (
            computations.states_at,
            (from_packed, packed.position_ids, categories, dense, rows),
        ),
        HEADS: (computations.measure_heads, (from_packed, packed.position_ids, groups)),
        OFFSETS: (computations.measure_offsets, (from_packed, packed.position_ids, categories)),
        COMPARED: (
            computations.states_at,
            (from_packed, packed.position_ids, categories, sparse, rows),
        ),
    }
    compiled = {
        name: (programs.get(function, values, static=(backend,)), values)
        for name, (function, values) in calls.items()
    }
    samples = interleaved(
        {
            name: lambda program=program, values=values: program(*values)
            for name, (program, values) in compiled.items()
        },
        arguments.rounds,
    )
    return {
        "model": arguments.size,
        "backend": backend,
        "dtype": str(np.dtype(dtype)),
        "tokens": packed.template.tokens,
        "images": arguments.images,
        "image_tokens": packed.template.image_tokens[0],
        "vision_seconds": statistics.median(vision_seconds),
        "rows": [
            {
                "program": name,
                "median_seconds": statistics.median(seconds),
                "time_over_dense_prefill": median_ratio(samples, name, DENSE),
                "temporary_bytes": compiled[name][0].memory.temporaries,
                "seconds": seconds,
            }
            for name, seconds in samples.items()
        ],
    }


def show(result: dict[str, Any]) -> None:
    table = Table(
        title=f"{result['model']}: {result['tokens']} tokens, {result['images']} images of "
        f"{result['image_tokens']}; vision tower {result['vision_seconds']:.2f} s"
    )
    for column in ("program", "median s", "time / dense prefill", "temporaries, MB"):
        table.add_column(column, justify="left" if column == "program" else "right")
    for row in result["rows"]:
        table.add_row(
            row["program"],
            f"{row['median_seconds']:.3f}",
            f"{row['time_over_dense_prefill']:.2f}",
            f"{row['temporary_bytes'] / 1e6:.0f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--image-size", type=int, nargs=2, default=(448, 448))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    print(f"written to {write_result('profiling_' + arguments.size, result, arguments.output)}")


if __name__ == "__main__":
    main()
