"""Measures what the host does for a prompt before a device runs it: seconds and memory.

    python -m benchmarks.host

The prompt has 36 JPEG photographs of 1920 x 1080, which this benchmark makes, scaled to 1,008
tokens each. bsjax reads their headers, renders and tokenizes the messages, computes positions and
the first schedules, and decodes and scales the photographs, to the bytes that go to the device. No
weights are read and nothing is compiled. Pillow decodes and scales the same files in one thread, in
turns with bsjax. Rounds are repeated until half of the ratios are within 5 %, or to `--rounds`.

CPU seconds are those of all threads, which other load on the machine changes less than seconds.
Peak memory is that of a process of its own, minus what is resident after it has made a prompt of
one photograph and given back what is free. Groups of images have the sizes for the device that is
named.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx
from PIL import Image

from benchmarks.measure import RESULTS, markdown_table, write_result
from benchmarks.random_models import SIZES, loaded_model, model_config
from benchmarks.ttft import photographs
from bsjax import LoadedModel
from bsjax.gpu.configurations import compiling_for
from bsjax.models import FAMILIES
from bsjax.prompts.image_reader import ImageReader
from bsjax.prompts.prompt import PromptOptions
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import Programs
from bsjax.runtime.sizes import cache_rows
from bsjax.timing import Stopwatch

LEAST_ROUNDS = 5
AGREEMENT = 0.05
"""Half of the ratios lie within this share of their median when rounds agree."""
TARGETS = {"a CPU": None, "an H200": "sm_90"}
"""Devices whose sizes of groups are measured, and what programs would be compiled for."""
# Kibibytes, and bytes on macOS.
_UNIT = 1 if sys.platform == "darwin" else 1024


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.peak_of is not None:
        print(json.dumps(peak(options, options.peak_of)))
        return 0
    result = measure(options)
    print(render(result))
    print(f"\nwritten to {write_result('host', result, options.output)}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="qwen2.5-vl-7b")
    parser.add_argument("--images", type=int, default=36)
    pair: dict[str, Any] = {"type": int, "nargs": 2, "metavar": ("WIDTH", "HEIGHT")}
    parser.add_argument("--jpeg", default=(1920, 1080), help="size of the files", **pair)
    parser.add_argument(
        "--max-pixels", type=int, default=1024 * 28**2, help="the most of a scaled photograph"
    )
    parser.add_argument("--rounds", type=int, default=25, help="the most")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    # What a process of its own does: measures the peak for these files.
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=TARGETS, default="a CPU", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures seconds in this process and memory in others; returns what the JSON file has."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = photographs(folder, options.images, tuple(options.jpeg))
        model = abstract_model(options.size)
        first = bytes_for_device(model, files, options.max_pixels)
        calls = {
            "pillow": lambda: with_pillow(files, first["image_size"]),
            "bsjax": lambda: bytes_for_device(model, files, options.max_pixels),
        }
        samples: dict[str, list[Any]] = {which: [] for which in calls}
        while len(samples["bsjax"]) < options.rounds and not agree(ratios_of(samples)):
            for which in sorted(calls, reverse=len(samples["bsjax"]) % 2 == 1):
                samples[which].append(calls[which]())
        peaks = {device: _peak_in_child(options, folder, device) for device in TARGETS}
    ratios = ratios_of(samples)
    parts = [sample["seconds"] for sample in samples["bsjax"]]
    medians = {
        which: {name: statistics.median(each[name] for each in of_rounds) for name in of_rounds[0]}
        for which, of_rounds in {"pillow": samples["pillow"], "bsjax": parts}.items()
    }
    return {
        "size": options.size,
        "images": options.images,
        "jpeg": options.jpeg,
        **{name: first[name] for name in ("image_size", "tokens", "tokens_per_image")},
        "rounds_agree": agree(ratios),
        "median_seconds": medians,
        "median_ratio": statistics.median(ratios),
        "seconds": {"pillow": samples["pillow"], "bsjax": parts},
        "pixel_bytes": first["pixel_bytes"],
        "peaks": peaks,
    }


def agree(ratios: Sequence[float]) -> bool:
    """Whether there are enough rounds, and half of their ratios lie close together."""
    if len(ratios) < LEAST_ROUNDS:
        return False
    low, median, high = statistics.quantiles(ratios, n=4)
    return high - low <= AGREEMENT * median


def ratios_of(samples: dict[str, list[Any]]) -> list[float]:
    """bsjax over Pillow, by round."""
    return [
        ours["seconds"]["total"] / pillow["total"]
        for ours, pillow in zip(samples["bsjax"], samples["pillow"], strict=True)
    ]


def with_pillow(files: Sequence[Path], size: tuple[int, int]) -> dict[str, float]:
    """Seconds of decoding and scaling with Pillow alone, one file after the other."""
    start, start_cpu = time.perf_counter(), time.process_time()
    pixels = [
        np.asarray(Image.open(file).convert("RGB").resize(size, Image.Resampling.BICUBIC))
        for file in files
    ]
    seconds = {"total": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
    assert all(each.shape == (size[1], size[0], 3) for each in pixels)
    return seconds


def abstract_model(size: str) -> LoadedModel:
    """A model with shapes in place of weights."""
    config = model_config(size)
    module = nnx.eval_shape(lambda: FAMILIES[config.model_type].build(config, np.float32))
    return loaded_model(config, module, np.float32)


def bytes_for_device(
    model: LoadedModel, files: Sequence[Path], max_pixels: int, device: str = "a CPU"
) -> dict[str, Any]:
    """Makes a prompt, and the bytes of all groups of images, one group after the other."""
    target = TARGETS[device]
    backend = "xla" if target is None else "pallas"
    start, start_cpu, stopwatch = time.perf_counter(), time.process_time(), Stopwatch()
    messages = conversation(model, files, max_pixels)
    sizes = contextlib.nullcontext() if target is None else compiling_for(target)
    with sizes, ImageReader(stopwatch) as reader:
        with stopwatch.part("prompt"):
            prompt = model.prompt_of(messages, PromptOptions(), reader)
        with stopwatch.part("schedules"):
            inputs = prepare_inputs(model.architecture, prompt, None, backend=backend)
            reader.start()
            programs = Programs(model.module, compile=lambda jitted, shapes: _NotCompiled())
            layout = CacheLayout(cache_rows(inputs.tokens + 1))
            settings = AnswerSettings(1, backend, end_tokens=np.full(8, -1, np.int32))
            prefill = Prefill(programs, [PlacedPrompt(inputs)], layout, [settings], backend)
        with stopwatch.part("images"):
            pixel_bytes = 0
            for group in prefill.groups:
                group.pixels()
                pixel_bytes += sum(image.patches.nbytes for image in group.images)
    seconds = {"total": time.perf_counter() - start, "cpu": time.process_time() - start_cpu}
    seconds |= stopwatch.seconds
    _, down, across = map(int, prompt.images[0].grid_thw)
    side = model.config.vision_config.patch_size
    return {
        "seconds": seconds,
        "image_size": (across * side, down * side),
        "tokens": inputs.tokens,
        "tokens_per_image": prompt.image_tokens[0],
        "pixel_bytes": pixel_bytes,
    }


class _NotCompiled:
    """Stands in for a program that does not run."""

    out_info = ()

    def memory_analysis(self) -> None:
        """Nothing is known."""


def conversation(
    model: LoadedModel, files: Sequence[Path], max_pixels: int
) -> list[dict[str, Any]]:
    """A question about photographs, with at most so many pixels if the model scales them to any."""
    options = {}
    if "max_pixels" in model.family.image_options:
        options = {"max_pixels": max_pixels}
    parts = [{"type": "image", "path": str(file), **options} for file in files]
    question = {"type": "text", "text": "What do these pictures show?"}
    return [{"role": "user", "content": [*parts, question]}]


def peak(options: argparse.Namespace, folder: Path) -> dict[str, int]:
    """The peak memory of this process when it makes the prompt, in bytes."""
    files = [folder / f"{number}.jpg" for number in range(options.images)]
    model, most = abstract_model(options.size), options.max_pixels
    bytes_for_device(model, files[:1], most, options.device)
    _give_back_freed_memory()
    idle, peak_before = _resident("VmRSS"), _resident("VmHWM")
    made = bytes_for_device(model, files, most, options.device)
    return {
        "idle_bytes": idle,
        "peak_before_bytes": peak_before,
        "peak_bytes": _resident("VmHWM"),
        "pixel_bytes": made["pixel_bytes"],
    }


def _give_back_freed_memory() -> None:
    """What malloc keeps for the next photograph is a part of what that needs, and not idle."""
    gc.collect()
    with contextlib.suppress(AttributeError):  # Other systems than glibc's have no such function.
        ctypes.CDLL(None).malloc_trim(0)


def _resident(which: str) -> int:
    """Bytes of this process that are in memory now (`VmRSS`) or were at most (`VmHWM`)."""
    status = Path("/proc/self/status")
    if not status.exists():  # Not Linux: the most in either case.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _UNIT
    # `ru_maxrss` would not be below that of the process that started this one.
    return 1024 * int(status.read_text().split(f"{which}:")[1].split()[0])


def _peak_in_child(options: argparse.Namespace, folder: Path, device: str) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.host", "--peak-of", folder, "--device", device]
    command += ["--size", options.size, "--images", options.images]
    command += ["--max-pixels", options.max_pixels]
    process = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def above_idle(peak: dict[str, int]) -> float:
    """What the prompt needs at its peak, over the bytes of its scaled pixels."""
    return (peak["peak_bytes"] - peak["idle_bytes"]) / peak["pixel_bytes"]


def render(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    width, height = result["jpeg"]
    pillow, ours = (result["median_seconds"][which] for which in ("pillow", "bsjax"))
    parts = [part for part in ours if part not in ("total", "cpu")]
    rows = [
        ("Pillow, one thread", f"{pillow['total']:.2f}", f"{pillow['cpu']:.2f}", "1.00", ""),
        (
            "bsjax",
            f"{ours['total']:.2f}",
            f"{ours['cpu']:.2f}",
            f"{result['median_ratio']:.2f}",
            "",
        ),
        *((f"bsjax, {part}", f"{ours[part]:.2f}", "", "", "") for part in parts),
        *(
            (f"memory, groups as on {device}", "", "", "", f"{above_idle(peak):.2f}")
            for device, peak in result["peaks"].items()
        ),
    ]
    agreement = "agree" if result["rounds_agree"] else "DO NOT AGREE"
    return "\n".join(
        [
            f"### {result['images']} photographs of {width} x {height}, "
            f"{result['tokens_per_image']:,} tokens each ({result['tokens']:,} in all); "
            f"{len(result['seconds']['bsjax'])} rounds, which {agreement}",
            "",
            markdown_table(("", "seconds", "CPU seconds", "over Pillow", "peak / pixels"), rows),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
