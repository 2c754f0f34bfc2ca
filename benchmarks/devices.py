"""Measures prefill of a model on several devices and on one, in one run.

    python -m benchmarks.devices                   # a small model, random, float32, two CPU devices
    python -m benchmarks.devices --tensor 1 --context 2
    python -m benchmarks.devices --size qwen2.5-vl-7b --tensor 4 --tokens 36000

Seconds are those of prefill, without the vision tower, whose features are kept, and without
compilation. Both models have the same weights; the table says whether their answers begin with the
same token.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import bsjax
from benchmarks.measure import RESULTS, markdown_table, write_result
from benchmarks.random_models import SIZES, loaded_model, model_config, noise_image, random_module
from bsjax import LoadedModel, Profile
from bsjax.checkpoint.loading import placed_module


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    result = measure(options)
    print(render(result))
    sizes = f"{options.context}x{options.tensor}"
    name = f"devices_{options.size}_{sizes}_{jax.default_backend()}"
    print(f"\nwritten to {write_result(name, result, options.output)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small" if on_cpu else "qwen2.5-vl-7b")
    parser.add_argument("--tensor", type=int, default=2)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(560, 560), metavar=("WIDTH", "HEIGHT")
    )
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all prompts on both; returns what goes into the JSON file."""
    config = model_config(options.size)
    model = dataclasses.replace(
        loaded_model(config, random_module(config, options.dtype), options.dtype),
        image_cache_bytes=2**32,
    )
    models = {"one": model, "several": divided(model, options.tensor, options.context)}
    sparse = Profile.uniform("INTRA_IMAGE_SINK", model)
    rows = []
    for tokens in options.tokens:
        messages = conversation(model, tokens, tuple(options.image_size))
        for heads, profile in {"dense": None, "sparse": sparse}.items():
            run = partial(bsjax.generate, messages=messages, profile=profile, max_new_tokens=1)
            # Compiles, and keeps the features of images.
            first = {which: run(each) for which, each in models.items()}
            seconds: dict[str, list[float]] = {which: [] for which in models}
            for number in range(options.rounds):
                # In turns, because the machine's speed drifts.
                order = list(models) if number % 2 else list(reversed(models))
                for which in order:
                    seconds[which].append(run(models[which]).stats.prefill_seconds)
            ratios = [
                one / several
                for one, several in zip(seconds["one"], seconds["several"], strict=True)
            ]
            rows.append(
                {
                    "tokens": first["one"].prompt_tokens,
                    "heads": heads,
                    "seconds": seconds,
                    "times_as_fast": statistics.median(ratios),
                    "same_token": first["one"].token_ids == first["several"].token_ids,
                }
            )
    return {
        "size": options.size,
        "weights": "random",
        "dtype": options.dtype,
        "tensor": options.tensor,
        "context": options.context,
        "rows": rows,
    }


def divided(model: LoadedModel, tensor: int, context: int) -> LoadedModel:
    """The model on a mesh of so many devices."""
    mesh = bsjax.mesh(tensor, context)
    _, placements = placed_module(model.architecture, mesh)
    graph, state = nnx.split(model.module)
    placed = {}
    for path, variable in nnx.to_flat_state(state):
        placement = placements[tuple(map(str, path))]
        if placement.repeats > 1:
            raise SystemExit(f"{tensor} devices are more than the model has key heads.")
        array = jax.device_put(variable.get_value(), placement.sharding)
        placed[path] = variable.replace(array)
    module: Any = nnx.merge(graph, nnx.from_flat_state(placed))
    return dataclasses.replace(model, module=module, mesh=mesh)


def conversation(model: LoadedModel, tokens: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """A question about as many images as fit into `tokens` tokens."""
    random = np.random.default_rng(0)

    def picture() -> dict[str, Any]:
        return noise_image(model, size, random)

    def asked(count: int) -> list[dict[str, Any]]:
        question = {"type": "text", "text": "What do these pictures show?"}
        return [{"role": "user", "content": [*(picture() for _ in range(count)), question]}]

    of_one, of_two = (model.prompt(asked(count)).token_ids.size for count in (1, 2))
    return asked(max(1, 1 + (tokens - of_one) // (of_two - of_one)))


def render(result: dict[str, Any]) -> str:
    """The results as a table."""
    header = [
        "tokens",
        "heads",
        "1 device, s",
        f"{result['tensor'] * result['context']} devices, s",
    ]
    rows = [
        [
            f"{row['tokens']:,}",
            row["heads"],
            f"{statistics.median(row['seconds']['one']):.2f}",
            f"{statistics.median(row['seconds']['several']):.2f}",
            f"{row['times_as_fast']:.2f}",
            "yes" if row["same_token"] else "no",
        ]
        for row in result["rows"]
    ]
    return markdown_table([*header, "times as fast", "same token"], rows)


if __name__ == "__main__":
    # A CPU has as many devices as this says when JAX starts.
    jax.config.update("jax_num_cpu_devices", 8)
    raise SystemExit(main())
