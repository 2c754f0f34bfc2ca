"""Measures time and peak memory of converting a checkpoint, compared with copying its files.

    python -m benchmarks.convert

Writes a checkpoint of Qwen2-VL-2B's shape with random weights (4.4 GB, two shards) to a temporary
folder. Every round copies the files, converts the checkpoint, converts it to float32, and loads it,
each in its own process. Needs 20 GB of disk space. All steps read from the operating system's
cache, and those that write end only when their output is on the disk (fsync).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import RESULTS, write_result

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, HIDDEN, MLP, KEY_WIDTH = 151936, 1536, 8960, 256
VISION, VISION_DEPTH, PATCH = 1280, 32, 14

_LAUNCH = """
import json, os, sys, time
started = time.perf_counter()
process = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
seconds = time.perf_counter() - started
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({"seconds": seconds, "peak_resident_bytes": usage.ru_maxrss * unit}))
sys.exit(status != 0)
"""
_COPY = """
import os, shutil, sys
shutil.copytree(sys.argv[1], sys.argv[2])
for name in os.listdir(sys.argv[2]):
    descriptor = os.open(os.path.join(sys.argv[2], name), os.O_RDONLY)
    os.fsync(descriptor)
"""
_IMPORT = """
import sys
sys.modules["torch"] = None  # as the command line does
import convert.conversion
"""
_LOAD = """
import sys
sys.modules["torch"] = None
import jax, bsjax.checkpoint.loading
from flax import nnx
jax.block_until_ready(nnx.state(bsjax.checkpoint.loading.load(sys.argv[1], "bfloat16").module))
"""


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of Qwen2-VL-2B's tensors, in the hub's own layout."""
    yield "visual.patch_embed.proj.weight", (VISION, 3, 2, PATCH, PATCH)
    for block in range(VISION_DEPTH):
        prefix = f"visual.blocks.{block}"
        for norm in ("norm1", "norm2"):
            yield f"{prefix}.{norm}.weight", (VISION,)
            yield f"{prefix}.{norm}.bias", (VISION,)
        for name, inputs, outputs in (
            ("attn.qkv", VISION, 3 * VISION),
            ("attn.proj", VISION, VISION),
            ("mlp.fc1", VISION, 4 * VISION),
            ("mlp.fc2", 4 * VISION, VISION),
        ):
            yield f"{prefix}.{name}.weight", (outputs, inputs)
            yield f"{prefix}.{name}.bias", (outputs,)
    yield "visual.merger.ln_q.weight", (VISION,)
    yield "visual.merger.ln_q.bias", (VISION,)
    for name, outputs in (("mlp.0", 4 * VISION), ("mlp.2", HIDDEN)):
        yield f"visual.merger.{name}.weight", (outputs, 4 * VISION)
        yield f"visual.merger.{name}.bias", (outputs,)
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        for name, width in (("q_proj", HIDDEN), ("k_proj", KEY_WIDTH), ("v_proj", KEY_WIDTH)):
            yield f"{prefix}.self_attn.{name}.weight", (width, HIDDEN)
            yield f"{prefix}.self_attn.{name}.bias", (width,)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{prefix}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, MLP)


def write_checkpoint(folder: Path, layers: int) -> int:
    """Writes a bfloat16 checkpoint with random weights in two shards; returns its size in bytes."""
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True)
    config = {
        "model_type": "qwen2_vl",
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "vision_config": {
            "depth": VISION_DEPTH,
            "embed_dim": VISION,
            "hidden_size": HIDDEN,
            "num_heads": 16,
            "mlp_ratio": 4,
            "patch_size": PATCH,
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": PATCH}))
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    everything = list(tensors(layers))
    halves = {"model-00001-of-00002.safetensors": everything[: len(everything) // 2],
              "model-00002-of-00002.safetensors": everything[len(everything) // 2 :]}  # fmt: skip
    generator = np.random.default_rng(0)
    for name, shard in halves.items():
        _write_shard(folder / name, shard, generator)
    index = {"weight_map": {key: name for name, shard in halves.items() for key, _ in shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum((folder / name).stat().st_size for name in halves)


def _write_shard(
    file: Path, shard: list[tuple[str, tuple[int, ...]]], generator: np.random.Generator
) -> None:
    header, end = {}, 0
    for key, shape in shard:
        start, end = end, end + 2 * int(np.prod(shape))
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, shape in shard:
            bits = generator.integers(0, 2**16, int(np.prod(shape)), dtype=np.uint16)
            # Random sign and mantissa, exponents of 2**-7 and 2**-5: finite, like initial weights.
            stream.write(((bits & 0x817F) | 0x3C00).data)


def measure(command: list[str]) -> dict[str, float]:
    """Runs a command; returns its seconds and its peak resident memory in bytes.

    A process inherits the peak of the process that it is forked from, so a small one starts it.
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", _LAUNCH, *command],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def commands(source: Path, folder: Path) -> dict[str, list[str]]:
    """The commands of a round, in the order in which they run; `folder` must be empty."""
    python, converted = sys.executable, str(folder / "converted")
    convert = [python, "-m", "convert", "--quiet", str(source)]
    return {
        "copy the files": [python, "-c", _COPY, str(source), str(folder / "copy")],
        "convert": [*convert, converted],
        "convert --dtype float32": [*convert, str(folder / "wide"), "--dtype", "float32"],
        "load": [python, "-c", _LOAD, converted],
        "start, convert nothing": [python, "-c", _IMPORT],
    }


def measure_all(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """Writes the checkpoint and runs all commands in turn, `rounds` times."""
    source = folder / "source"
    size = write_checkpoint(source, layers)
    os.sync()
    samples: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        outputs = folder / "outputs"
        outputs.mkdir()
        for name, command in commands(source, outputs).items():
            samples.setdefault(name, []).append(measure(command))
        shutil.rmtree(outputs)
    return {
        "checkpoint_bytes": size,
        "largest_stacked_parameter_bytes": 2 * layers * HIDDEN * MLP,
        "runs": samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28, help="language layers (28: 4.4 GB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to work (default: the system's temporary folder)"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="bsjax-convert-", dir=options.folder))
    try:
        result = measure_all(folder, options.layers, options.rounds)
    finally:
        shutil.rmtree(folder)
    table = Table(
        title=f"A checkpoint of {result['checkpoint_bytes'] / 1e9:.2f} GB; its largest stacked "
        f"parameter has {result['largest_stacked_parameter_bytes'] / 1e9:.2f} GB"
    )
    table.add_column("")
    for column in ("median seconds", "all rounds", "peak resident GB"):
        table.add_column(column, justify="right")
    for name, samples in result["runs"].items():
        seconds = [sample["seconds"] for sample in samples]
        table.add_row(
            name,
            f"{statistics.median(seconds):.1f}",
            " ".join(f"{value:.1f}" for value in seconds),
            f"{max(sample['peak_resident_bytes'] for sample in samples) / 1e9:.2f}",
        )
    Console(width=100).print(table)
    print(f"written to {write_result('convert', result, options.output)}")


if __name__ == "__main__":
    main()
