"""Measures a batch of conversations, against single calls and against transformers' batch.

    python -m benchmarks.batches                              # a small model, random, float32
    python -m benchmarks.batches --size qwen2.5-vl-7b --long-tokens 36000 --image-size 560 560

There are short prompts, some with an image, and long ones full of images. Each workload is
answered by `bsjax.generate` with the list of conversations, by `bsjax.generate` with one after the
other, and by transformers' `generate` with one padded batch, with the same weights and threads and
the same number of new tokens. Seconds are those of the whole call: messages in, text out. In
transformers' case the prompts are made by bsjax, because its processor for these families needs
torchvision.

Before that, two processes answer the short prompts for the first time: one with an empty cache of
compiled programs, and one with the cache that the first has left.
"""

import argparse
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import bsjax
from benchmarks.measure import (
    RESULTS,
    first_calls,
    interleaved_samples,
    markdown_table,
    write_result,
)
from benchmarks.random_models import SIZES, loaded_model, model_config, random_module
from bsjax import LoadedModel
from bsjax.prompts.prompt import Prompt

TOGETHER, ONE_BY_ONE, TRANSFORMERS = "bsjax, batch", "bsjax, one by one", "transformers, batch"

_WORDS = "a picture of something that is larger brighter older than the other one which".split()

Answers = list[list[int]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.first_call:
        print(json.dumps(_first_call(options)))
        return 0
    result = measure(options)
    print(render(result))
    path = write_result(f"batches_{options.size}_{jax.default_backend()}", result, options.output)
    print(f"\nwritten to {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small" if on_cpu else "qwen2.5-vl-7b")
    parser.add_argument("--short", type=int, default=64, help="how many short prompts")
    parser.add_argument("--long", type=int, default=8, help="how many long prompts")
    parser.add_argument("--long-tokens", type=int, default=2048, help="tokens of a long prompt")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens of each answer")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(224, 224), metavar=("WIDTH", "HEIGHT")
    )
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=on_cpu and importlib.util.find_spec("torch") is not None,
        help="compare with transformers on torch (float32, on the CPU)",
    )
    parser.add_argument(
        "--cold",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the first call of a process",
    )
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    if options.transformers and (not on_cpu or options.dtype != "float32"):
        parser.error("the comparison with transformers needs float32 on a CPU")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all workloads; returns what goes into the JSON file."""
    config = model_config(options.size)
    reference = None
    if options.transformers:
        from tests.support.small_models import ported, random_reference

        reference = random_reference(config)
        module = ported(reference)
    else:
        module = random_module(config, options.dtype)
    model = loaded_model(config, module, options.dtype)
    rows = []
    for name, conversations in _workloads(model, options).items():
        calls: dict[str, Callable[[], Answers]] = {
            TOGETHER: lambda asked=conversations: _together(model, asked, options.new_tokens),
            ONE_BY_ONE: lambda asked=conversations: _one_by_one(model, asked, options.new_tokens),
        }
        if reference is not None:
            calls[TRANSFORMERS] = _transformers_call(
                reference, model, conversations, options.new_tokens
            )
        answers = {variant: call() for variant, call in calls.items()}  # Compiles and warms up.
        samples = interleaved_samples(
            {variant: _timed(call) for variant, call in calls.items()}, options.rounds
        )
        tokens = [model.prompt(each).token_ids.size for each in conversations]
        for variant, seconds in samples.items():
            rows.append(
                {
                    "workload": name,
                    "variant": variant,
                    "prompts": len(conversations),
                    "prompt_tokens": sum(tokens),
                    "longest_prompt": max(tokens),
                    "new_tokens": sum(map(len, answers[variant])),
                    "median_seconds": statistics.median(seconds),
                    "over_one_by_one": statistics.median(
                        ours / single
                        for ours, single in zip(seconds, samples[ONE_BY_ONE], strict=True)
                    ),
                    "same_answers_as_one_by_one": sum(
                        ours == single
                        for ours, single in zip(answers[variant], answers[ONE_BY_ONE], strict=True)
                    ),
                    "seconds": seconds,
                }
            )
    return {
        "size": options.size,
        "weights": "random",
        "dtype": options.dtype,
        "threads": len(os.sched_getaffinity(0)),
        "first_calls": _first_calls(options) if options.cold else None,
        "rows": rows,
    }


def _workloads(
    model: LoadedModel, options: argparse.Namespace
) -> dict[str, list[list[dict[str, Any]]]]:
    """Conversations, short and long ones. Every third of the short ones shows an image."""
    random = np.random.default_rng(0)
    width, height = options.image_size

    def picture() -> dict[str, Any]:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return {"type": "image", "image": Image.fromarray(pixels)}

    def conversation(images: int, words: int) -> list[dict[str, Any]]:
        text = " ".join(random.choice(_WORDS, words))
        parts = [picture() for _ in range(images)]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]

    short = [
        conversation(int(number % 3 == 0), int(random.integers(5, 30)))
        for number in range(options.short)
    ]
    one = model.prompt(conversation(1, 5)).token_ids.size
    images = max(1, options.long_tokens // one)
    long = [conversation(images, 10) for _ in range(options.long)]
    return {name: some for name, some in (("short", short), ("long", long)) if some}


def _together(model: LoadedModel, conversations: list[Any], new_tokens: int) -> Answers:
    results = bsjax.generate(model, conversations, max_new_tokens=new_tokens)
    return [list(result.token_ids) for result in results]


def _one_by_one(model: LoadedModel, conversations: list[Any], new_tokens: int) -> Answers:
    return [
        list(bsjax.generate(model, each, max_new_tokens=new_tokens).token_ids)
        for each in conversations
    ]


def _timed(call: Callable[[], Answers]) -> Callable[[], float]:
    def sample() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return sample


def _transformers_call(
    reference: Any, model: LoadedModel, conversations: list[Any], new_tokens: int
) -> Callable[[], Answers]:
    """A call that answers the prompts with transformers, in one batch padded on the left."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    of_config = model.generation_config.eos_token_id
    ends = [] if of_config is None else np.atleast_1d(of_config).tolist()

    def call() -> Answers:
        prompts = [model.prompt(each) for each in conversations]
        longest = max(prompt.token_ids.size for prompt in prompts)
        inputs = {
            name: torch.from_numpy(array)
            for name, array in _padded(model, prompts, longest).items()
        }
        with torch.inference_mode():
            output = reference.generate(
                **inputs,
                max_new_tokens=new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=0,
            )
        answers = []
        for ids in output[:, longest:].tolist():
            end = next((at + 1 for at, token in enumerate(ids) if token in ends), len(ids))
            answers.append(ids[:end])
            model.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return answers

    return call


def _padded(model: LoadedModel, prompts: list[Prompt], longest: int) -> dict[str, np.ndarray]:
    """What transformers' model is given: tokens padded on the left, and the images of all."""
    each = [model.family.reference_inputs(prompt, model.config) for prompt in prompts]
    lengths = np.asarray([prompt.token_ids.size for prompt in prompts])
    inputs: dict[str, np.ndarray] = {}
    for name in {name for one in each for name in one}:
        some = next(one[name] for one in each if name in one)
        if name not in ("pixel_values", "image_grid_thw"):
            # One value for each token; zeros for prompts without images.
            rows = [one.get(name, np.zeros((1, 0), some.dtype)) for one in each]
            inputs[name] = np.concatenate(
                [np.pad(row, ((0, 0), (longest - row.shape[1], 0))) for row in rows]
            )
        else:
            inputs[name] = np.concatenate([one[name] for one in each if name in one])
    mask = np.arange(longest)[None, :] >= longest - lengths[:, None]
    return inputs | {"attention_mask": mask.astype(np.int64)}


def _first_calls(options: argparse.Namespace) -> list[dict[str, Any]]:
    arguments = ["--size", options.size, "--dtype", options.dtype, "--short", options.short]
    arguments += ["--new-tokens", options.new_tokens, "--image-size", *options.image_size]
    return first_calls("benchmarks.batches", arguments)


def _first_call(options: argparse.Namespace) -> dict[str, Any]:
    config = model_config(options.size)
    model = loaded_model(config, random_module(config, options.dtype), options.dtype)
    options.long = 0
    conversations = _workloads(model, options)["short"]
    start = time.perf_counter()
    results = bsjax.generate(model, conversations, max_new_tokens=options.new_tokens)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "compile_seconds": sum(result.stats.compile_seconds for result in results),
        "compiled_programs": sum(result.stats.compiled_programs for result in results),
    }


def render(result: dict[str, Any]) -> str:
    """A table with a line for each workload and variant."""
    header = ["workload", "prompts", "tokens", "variant", "seconds", "/ one by one"]
    header += ["new tokens a second", "same answers"]
    lines = [
        [
            row["workload"],
            str(row["prompts"]),
            f"{row['prompt_tokens']:,}",
            row["variant"],
            f"{row['median_seconds']:.2f}",
            f"{row['over_one_by_one']:.2f}",
            f"{row['new_tokens'] / row['median_seconds']:.0f}",
            f"{row['same_answers_as_one_by_one']} of {row['prompts']}",
        ]
        for row in result["rows"]
    ]
    parts = [
        f"### {result['size']}, random weights, {result['dtype']}",
        markdown_table(header, lines),
    ]
    for call in result["first_calls"] or ():
        parts.append(
            f"First call of a process, short prompts, cache of compiled programs {call['cache']}: "
            f"{call['seconds']:.1f} s, {call['compile_seconds']:.1f} of them for "
            f"{call['compiled_programs']} programs."
        )
    return "\n\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(main())
