"""Runs the small trained model on eight CPU devices, and shows who has what.

    python -m examples.devices [--context 4] [--tensor 2] [--output FOLDER]

Asks the questions of `examples.demo` on one device and on a mesh, dense and with the profile, and
compares the answers. A picture shows which device computes which rows of a prompt, and which rows
of the cache and which heads each has. It shows that dividing a model changes nothing, and nothing
about speed: all devices share the cores of one machine.
"""

import argparse
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import bsjax
from bsjax.models.sharding import bytes_on_a_device
from bsjax.runtime.chunks import CacheLayout, PlacedPrompt
from bsjax.runtime.decoding import AnswerSettings
from bsjax.runtime.inputs import prepare_inputs
from bsjax.runtime.prefill import Prefill
from bsjax.runtime.programs import programs_of
from bsjax.runtime.sizes import cache_rows
from bsjax.unfinished import write_figure

from .arguments import whole
from .demo import ask_all, scene_and_questions
from .shipped import CHECKPOINT, PROFILE, converted
from .train_small_vlm.conversations import messages

DEVICES = 8


def prefill_of(model: bsjax.LoadedModel, profile: bsjax.Profile, question: Any) -> Prefill:
    """The prefill of a prompt, as `bsjax.generate` would run it."""
    inputs = prepare_inputs(
        model.architecture, model.prompt(question), profile, backend="xla", new_tokens=4
    )
    layout = CacheLayout(cache_rows(inputs.tokens + 4))
    settings = AnswerSettings(4, "xla")
    return Prefill(programs_of(model), [PlacedPrompt(inputs)], layout, [settings], "xla")


def rows_by_device(prefill: Prefill, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """The device along `context` that computes each token, and the blocks that each visits."""
    prompt = prefill.chunks.prompts[0].inputs
    device_of_token = np.zeros(prompt.tokens, int)
    blocks = np.zeros(devices, np.int64)
    for chunk in prefill.chunks:
        for device, positions in enumerate(chunk.position.reshape(devices, -1)):
            device_of_token[positions[positions >= 0]] = device
        if chunk.blocks is not None:
            blocks += chunk.blocks
    return device_of_token, blocks


def table_of_devices(
    model: bsjax.LoadedModel, prefill: Prefill, rows: np.ndarray, blocks: np.ndarray
) -> Table:
    """What each device has."""
    mesh = model.mesh
    assert mesh is not None
    context, tensor = mesh.devices.shape
    text = model.module.language_model
    heads = model.config.get_text_config().num_attention_heads // tensor
    weights = sum(map(bytes_on_a_device, jax.tree.leaves(programs_of(model).parameters)))
    cache = sum(map(bytes_on_a_device, jax.tree.leaves(prefill.carried.cache)))
    kv_heads = text.kv_heads // tensor
    of_cache = prefill.chunks.layout.rows // context
    table = Table(title="who has what (weights and cache in MiB)", title_justify="left")
    for name in (
        "device",
        "rows",
        "blocks",
        "cache rows",
        "q heads",
        "kv heads",
        "weights",
        "cache",
    ):
        table.add_column(name)
    for row in range(context):
        for column in range(tensor):
            table.add_row(
                str(mesh.devices[row, column].id),
                f"{np.count_nonzero(rows == row)}",
                f"{blocks[row]:,}" if context > 1 else "all",
                _range(row, of_cache),
                _range(column, heads),
                _range(column, kv_heads),
                f"{weights / 2**20:.1f}",
                f"{cache / 2**20:.2f}",
            )
    return table


def _range(index: int, size: int) -> str:
    first, last = index * size, (index + 1) * size - 1
    return f"{first}" if first == last else f"{first}-{last}"


def plot_devices(model: bsjax.LoadedModel, prefill: Prefill, rows: np.ndarray, path: Path) -> Path:
    """Draws who has what; returns the path."""
    from matplotlib.figure import Figure

    mesh = model.mesh
    assert mesh is not None
    context, tensor = mesh.devices.shape
    heads = model.config.get_text_config().num_attention_heads
    cache = prefill.chunks.layout.rows
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    axes = figure.subplots(3, 1, height_ratios=(2, 1, 1))
    image = prefill.chunks.prompts[0].inputs.template.image
    pictures = (
        ("who computes each token of the prompt (below: images and text)", rows[None]),
        ("who has each row of the cache", (np.arange(cache) * context // cache)[None]),
        ("who has each query head", (np.arange(heads) * tensor // heads)[None]),
    )
    for number, (each, (title, values)) in enumerate(zip(axes, pictures, strict=True)):
        colors = "tab10" if number < 2 else "Set2"
        each.imshow(
            values,
            aspect="auto",
            cmap=colors,
            vmin=0,
            vmax=9 if number < 2 else 7,
            interpolation="nearest",
            extent=(0, values.shape[1], 0, 1),
        )
        each.set_title(title, fontsize=10, loc="left")
        each.set_yticks([])
    axes[0].imshow(
        np.where(image < 0, np.nan, image % 2)[None],
        aspect="auto",
        cmap="Greys",
        vmin=-1,
        vmax=2,
        interpolation="nearest",
        extent=(0, image.size, -0.35, -0.05),
    )
    axes[0].set_ylim(-0.4, 1)
    for color in range(context):
        axes[1].text(
            (color + 0.5) * cache / context,
            0.5,
            f"context {color}",
            ha="center",
            va="center",
            color="white",
        )
    for color in range(tensor):
        axes[2].text(
            (color + 0.5) * heads / tensor, 0.5, f"tensor {color}", ha="center", va="center"
        )
    write_figure(figure, path, 130)
    return path


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=whole(1), default=4)
    parser.add_argument("--tensor", type=whole(1), default=2)
    parser.add_argument("--output", type=Path, default=Path("build/devices"))
    parser.add_argument("--seed", type=whole(0), default=1, help="for images and questions")
    options = parser.parse_args()
    console = Console(highlight=False)
    try:
        mesh = bsjax.mesh(options.tensor, options.context)
        several = converted(CHECKPOINT, mesh)
    except bsjax.BsjaxError as error:
        raise SystemExit(f"error: {error}") from None
    one = converted(CHECKPOINT)
    profile = bsjax.Profile.resolve(PROFILE, one)
    assert profile is not None
    scene, questions = scene_and_questions(np.random.default_rng(options.seed))
    given = [ask_all(model, profile, scene, questions) for model in (one, several)]
    for name in given[0]:
        texts = [[result.text for result in answers[name]] for answers in given]
        same = sum(first == second for first, second in zip(*texts, strict=True))
        console.print(
            f"{name}: {same} of {len(questions)} answers on {mesh.size} devices are those of one."
        )
    prefill = prefill_of(several, profile, messages(scene, questions[0]))
    rows, blocks = rows_by_device(prefill, options.context)
    console.print(table_of_devices(several, prefill, rows, blocks))
    options.output.mkdir(parents=True, exist_ok=True)
    path = plot_devices(several, prefill, rows, options.output / "devices.png")
    console.print(f"Who has what: {path}", soft_wrap=True)


if __name__ == "__main__":
    # A CPU has as many devices as this says when JAX starts.
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
