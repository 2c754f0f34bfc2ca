"""Measures time to first token of a whole model with random weights, dense and with mixes of heads.

    python -m benchmarks.ttft --size qwen2.5-vl-7b --images 90 --image-size 560 560    # on a GPU
    python -m benchmarks.ttft                                 # without one: a small model, float32
    python -m benchmarks.ttft --size small-gemma-3 --images 100 --rounds 3 --no-transformers

The prompt consists of photographs and a question. The photographs are JPEG files, which this
benchmark makes: `--jpeg` is their size, and `--image-size` the size that they are scaled to.
`bsjax.generate` answers: the time includes reading the files, vision tower, prefill and first
token, but not compilation. Variants are interleaved. Weights are random, so the answers are noise
and only the cost is meaningful. A mix of heads cuts a given share of the dense attention FLOPs in
prefill; it is not a measured profile.

`host` is the time that the call waits for the host: for the template, images, schedules and copies
to the device. `images alone` is the time to read and scale the images when nothing else runs; if it
is more than `host`, the rest ran while the model did. `first call` is that of a new process, in
which programs are compiled (cold) or read from the cache that the one before has left.

On a CPU, transformers on PyTorch also runs the model, with the same weights, files and number of
threads, and its own image processor. The table says whether it chooses the same first token.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

import bsjax
from benchmarks.measure import RESULTS, first_calls, markdown_table, write_result
from benchmarks.random_models import SIZES, loaded_model, model_config, random_module
from benchmarks.workloads import head_mix
from bsjax import HeadCategory, LoadedModel, Profile, Template
from bsjax.masks.flops import LayerFlops, head_flops
from bsjax.runtime.inputs import prepare_inputs

PARTS = ("host", "vision", "prefill", "total")
ALONE = "images alone"
DENSE, TRANSFORMERS = "bsjax, dense", "transformers on torch"

Seconds = dict[str, float]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.first_call:
        print(json.dumps(_first_call(options)))
        return 0
    result = measure(options)
    print(render(result))
    files = f"{options.images}x{'x'.join(map(str, options.jpeg))}"
    name = f"ttft_{options.size}_{files}_{jax.default_backend()}"
    path = write_result(name, result, options.output)
    print(f"\nwritten to {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small" if on_cpu else "qwen2.5-vl-7b")
    parser.add_argument("--images", type=int, default=12 if on_cpu else 90)
    parser.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        default=(392, 392) if on_cpu else (560, 560),
        metavar=("WIDTH", "HEIGHT"),
        help="in pixels; 28 x 28 pixels are one token, and every image is 256 tokens for Gemma 3",
    )
    parser.add_argument(
        "--jpeg",
        type=int,
        nargs=2,
        default=(1920, 1080),
        metavar=("WIDTH", "HEIGHT"),
        help="size of the files",
    )
    parser.add_argument(
        "--first-calls",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also measure the first call of two processes",
    )
    # What those two processes do.
    parser.add_argument("--first-call", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    parser.add_argument(
        "--cuts",
        type=float,
        nargs="*",
        default=(0.41, 1.0),
        help="shares of the attention FLOPs that the mixes cut; 1 makes all heads sparse, except "
        "for the last layer's",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--transformers",
        action=argparse.BooleanOptionalAction,
        default=on_cpu and importlib.util.find_spec("torch") is not None,
        help="compare with transformers on torch (float32, on the CPU)",
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    if options.transformers and (not on_cpu or options.dtype != "float32"):
        parser.error("the comparison with transformers needs float32 on a CPU")
    return options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all variants; returns what goes into the JSON file."""
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), options.images, tuple(options.jpeg))
        return _measure(options, files)


def _measure(options: argparse.Namespace, files: Sequence[Path]) -> dict[str, Any]:
    config = model_config(options.size)
    reference = None
    if options.transformers:
        # Both models get the same weights, as in the tests.
        from tests.support.small_models import ported, random_reference

        reference = random_reference(config)
        module = ported(reference)
    else:
        module = random_module(config, options.dtype)
    model = loaded_model(config, module, options.dtype)
    messages = _messages(model, files, tuple(options.image_size))
    prompt = model.prompt(messages)
    template = model.family.template(prompt, config)

    profiles = {DENSE: None} | {
        f"bsjax, mix for a cut of {cut:.0%}": mixed_profile(model, template, cut)
        for cut in options.cuts
    }
    calls: dict[str, Callable[[], tuple[Seconds, int]]] = {
        name: lambda profile=profile: _ours(model, messages, profile)
        for name, profile in profiles.items()
    }
    flops = {
        name: prepare_inputs(model.architecture, prompt, profile, backend="xla").flops_per_kind
        for name, profile in profiles.items()
    }
    if reference is not None:
        calls[TRANSFORMERS] = _transformers_call(reference, model, messages, files)
    tokens = {name: call()[1] for name, call in calls.items()}  # Compiles and warms up.
    samples: dict[str, list[Seconds]] = {name: [] for name in calls}
    alone = []
    for _ in range(options.rounds):
        for name, call in calls.items():
            samples[name].append(call()[0])
        start = time.perf_counter()
        model.prompt(messages)
        alone.append(time.perf_counter() - start)

    parameters = sum(leaf.size for leaf in jax.tree.leaves(module))
    return {
        "size": options.size,
        "parameters": parameters,
        "weights": "random",
        "dtype": options.dtype,
        "tokens": template.tokens,
        "images": template.num_images,
        "tokens_per_image": int(prompt.image_tokens[0]),
        "jpeg": options.jpeg,
        "median_images_alone_seconds": statistics.median(alone),
        "images_alone_seconds": alone,
        "first_calls": _first_calls(options) if options.first_calls else None,
        "torch_threads": _torch_threads() if reference is not None else None,
        "same_first_token_as_transformers": (
            tokens[DENSE] == tokens[TRANSFORMERS] if reference is not None else None
        ),
        "rows": [
            {
                "variant": name,
                "heads": _heads(profiles.get(name)),
                **_flops_shares(flops.get(name, flops[DENSE])),
                **{
                    f"median_{part}_seconds": statistics.median(s[part] for s in samples[name])
                    for part in PARTS
                },
                "total_over_dense": statistics.median(
                    ours["total"] / dense["total"]
                    for ours, dense in zip(samples[name], samples[DENSE], strict=True)
                ),
                "prefill_over_dense": statistics.median(
                    ours["prefill"] / dense["prefill"]
                    for ours, dense in zip(samples[name], samples[DENSE], strict=True)
                ),
                "seconds": samples[name],
            }
            for name in calls
        ],
    }


def mixed_profile(model: LoadedModel, template: Template, cut: float) -> Profile:
    """A profile whose sparse heads cut this share of attention FLOPs.

    They are spread over all layers but the last one, where a profile leaves heads DENSE: it saves
    nothing there.
    """
    text = model.config.get_text_config()
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    # FLOPs of these layers, whatever their kind.
    flops = head_flops(
        template, model.family.visibilities(model.config), model.family.layer_kinds(model.config), 1
    )[:-1]
    pairs = dict(zip(HeadCategory, flops.sum(axis=0).tolist(), strict=True))
    categories = np.full((layers, heads), HeadCategory.DENSE, np.int8)
    categories[:-1] = np.reshape(head_mix(pairs, (layers - 1) * heads, cut), (layers - 1, heads))
    return Profile(
        family=model.family.name,
        categories=categories,
        source=f"none: a benchmark's mix for a cut of {cut:.0%} of the attention FLOPs",
    )


def photographs(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Writes JPEG files that compress about as well as photographs do."""
    files = []
    for number in range(count):
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (size[1] // 40 + 1, size[0] // 40 + 1, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size), np.int16)
        noise = random.integers(-12, 13, smooth.shape, np.int16)
        files.append(folder / f"{number}.jpg")
        Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8)).save(files[-1])
    return files


def _messages(
    model: LoadedModel, files: Sequence[Path], size: tuple[int, int]
) -> list[dict[str, Any]]:
    scaled = {}
    if "max_pixels" in model.family.image_options:
        scaled = {"max_pixels": size[0] * size[1]}
    parts = [{"type": "image", "path": str(file), **scaled} for file in files]
    question = {"type": "text", "text": "What do these pictures show?"}
    return [{"role": "user", "content": [*parts, question]}]


def _ours(
    model: LoadedModel, messages: list[dict[str, Any]], profile: Profile | None
) -> tuple[Seconds, int]:
    start = time.perf_counter()
    result = bsjax.generate(model, messages, profile=profile, max_new_tokens=1)
    total = time.perf_counter() - start
    stats = result.stats
    total -= stats.compile_seconds
    seconds = {"vision": stats.vision_seconds, "prefill": stats.prefill_seconds, "total": total}
    # What the statistics say, and what they leave out.
    seconds["host"] = total - seconds["vision"] - seconds["prefill"]
    seconds["unaccounted"] = total + stats.compile_seconds - stats.first_token_seconds
    return seconds, result.token_ids[0]


def _transformers_call(
    reference: Any,
    model: LoadedModel,
    messages: list[dict[str, Any]],
    files: Sequence[Path],
) -> Callable[[], tuple[Seconds, int]]:
    """A call that answers the prompt with transformers: its image processor and its model."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    spans: list[float] = []
    names = ("visual", "vision_tower")
    tower = next(getattr(reference.model, name) for name in names if hasattr(reference.model, name))
    tower.register_forward_pre_hook(lambda *_: spans.append(-time.perf_counter()))
    tower.register_forward_hook(lambda *_: spans.append(time.perf_counter()))

    # Everything but the pixels, which takes no time to speak of.
    others = model.family.reference_inputs(model.prompt(messages), model.config)
    del others["pixel_values"]
    settings: dict[str, Any] = {}
    if "max_pixels" in messages[0]["content"][0]:
        smallest = dict(model.image_processor.size)["shortest_edge"]
        largest = messages[0]["content"][0]["max_pixels"]
        settings["size"] = {"shortest_edge": smallest, "longest_edge": largest}

    def call() -> tuple[Seconds, int]:
        spans.clear()
        start = time.perf_counter()
        pictures = [Image.open(file) for file in files]
        processed = model.image_processor(images=pictures, return_tensors="np", **settings)
        pixel_values = np.asarray(processed["pixel_values"], np.float32)
        inputs = {
            name: torch.from_numpy(array)
            for name, array in (others | {"pixel_values": pixel_values}).items()
        }
        host = time.perf_counter() - start
        with torch.inference_mode():
            output = reference(**inputs, use_cache=True, logits_to_keep=1)
            token = int(output.logits[0, -1].argmax())
        total, vision = time.perf_counter() - start, sum(spans)
        seconds = {"host": host, "vision": vision, "total": total}
        return seconds | {"prefill": total - host - vision}, token

    return call


def _first_calls(options: argparse.Namespace) -> list[dict[str, Any]]:
    arguments = ["--size", options.size, "--dtype", options.dtype, "--images", options.images]
    arguments += ["--image-size", *options.image_size, "--jpeg", *options.jpeg]
    return first_calls("benchmarks.ttft", arguments)


def _first_call(options: argparse.Namespace) -> dict[str, Any]:
    config = model_config(options.size)
    model = loaded_model(config, random_module(config, options.dtype), options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), options.images, tuple(options.jpeg))
        messages = _messages(model, files, tuple(options.image_size))
        return dataclasses.asdict(bsjax.generate(model, messages, max_new_tokens=1).stats)


def _torch_threads() -> int:
    import torch

    return torch.get_num_threads()


def _heads(profile: Profile | None) -> str | None:
    if profile is None:
        return None
    counts = np.bincount(profile.categories.ravel(), minlength=len(HeadCategory))
    return " + ".join(
        f"{counts[category]} {category.name}" for category in HeadCategory if counts[category]
    )


def _flops_shares(kinds: Sequence[LayerFlops]) -> dict[str, Any]:
    """Attention FLOPs relative to dense heads, in the whole model and by kind of layer."""
    dense, sparse = (sum(getattr(kind, name) for kind in kinds) for name in ("dense", "sparse"))
    return {
        "attention_flops_over_dense": sparse / dense,
        "attention_flops_over_dense_by_kind": [
            {
                "window": kind.visibility.window,
                "layers": kind.layers,
                "share": kind.sparse / kind.dense,
            }
            for kind in kinds
            if kind.dense
        ],
    }


def _shares(row: dict[str, Any]) -> str:
    kinds = row["attention_flops_over_dense_by_kind"]
    whole = f"{row['attention_flops_over_dense']:.3f}"
    if len(kinds) < 2:
        return whole
    parts = (
        f"{kind['share']:.3f} {'global' if kind['window'] is None else 'local'}" for kind in kinds
    )
    return f"{whole} ({', '.join(parts)})"


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"### {result['size']} ({result['parameters'] / 1e6:.0f} million random parameters, "
        f"{result['dtype']}): {result['tokens']} tokens, {result['images']} images of "
        f"{result['tokens_per_image']}, files of {result['jpeg'][0]} x {result['jpeg'][1]}; "
        f"{ALONE} {result['median_images_alone_seconds']:.3f} s",
        "",
        *(f"- {row['variant']}: {row['heads']}" for row in result["rows"] if row["heads"]),
        "",
    ]
    if result["same_first_token_as_transformers"] is not None:
        same = "the same" if result["same_first_token_as_transformers"] else "ANOTHER"
        lines.insert(1, f"\ntransformers, {result['torch_threads']} threads: {same} first token.")
    header = (
        "variant",
        "attention FLOPs / dense",
        *(f"{part}, s" for part in PARTS),
        "prefill / dense",
        "total / dense",
    )
    rows = [
        (
            row["variant"],
            _shares(row),
            *(f"{row[f'median_{part}_seconds']:.3f}" for part in PARTS),
            f"{row['prefill_over_dense']:.3f}",
            f"{row['total_over_dense']:.3f}",
        )
        for row in result["rows"]
    ]
    calls = [
        f"First call of a process, dense, cache of compiled programs {call['cache']}: "
        f"{call['first_token_seconds']:.1f} s, {call['compile_seconds']:.1f} of them for "
        f"{call['compiled_programs']} programs."
        for call in result["first_calls"] or ()
    ]
    return "\n".join([*lines, markdown_table(header, rows), "", *calls]).rstrip()


if __name__ == "__main__":
    sys.exit(main())
