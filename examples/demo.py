"""The main job on the small checkpoint beside this file: two photographs, dense and sparse.

    python examples/demo.py [--output FOLDER]

Converts examples/tiny-qwen2.5-vl, asks about both photographs of scikit-learn and several crops of
them in one prompt, and prints answers, sizes, FLOPs and times for dense and for sparse prefill.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.table import Table

import bsjax

HERE = Path(__file__).parent
SOURCE = HERE / "tiny-qwen2.5-vl"
CATEGORY = bsjax.HeadCategory.INTRA_IMAGE_SINK
QUESTION = "The first two pictures are photographs, the others are crops. What do they show?"
NEW_TOKENS = 16


def photographs_and_crops() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, and six crops of each."""
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    crops = []
    for photograph in photographs:
        width, height = photograph.width // 3, photograph.height // 2
        for row in range(2):
            for column in range(3):
                left, top = column * width, row * height
                crops.append(photograph.crop((left, top, left + width, top + height)))
    return photographs + crops


def converted(folder: Path) -> Path:
    """Converts the small checkpoint the way a user would."""
    destination = folder / "tiny-qwen2.5-vl"
    shutil.rmtree(destination, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "convert", str(SOURCE), str(destination), "--quiet"], check=True
    )
    return destination


def draw_mask(model: bsjax.LoadedModel, messages: list[dict], path: Path) -> Path:
    """Draws what one sparse head sees of the prompt."""
    from bsjax.prompts import prepare_prompt

    prompt = prepare_prompt(messages, model.tokenizer, model.image_processor, model.config)
    template = bsjax.Template.from_tokens(
        prompt.token_ids, model.config.image_token_id, image_tokens=prompt.image_tokens
    )
    bsjax.BlockMask(template, [CATEGORY]).plot(path)
    return path


def table_of(results: dict[str, bsjax.Result]) -> Table:
    """One column for each run, one row for each figure."""
    table = Table(title="prefill and answer", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(name: str, values: list[str]) -> None:
        table.add_row(name, *values)

    stats = [result.stats for result in results.values()]
    flops = [item.attention_flops_sparse for item in stats]
    row("attention FLOPs of prefill", [f"{count:,}" for count in flops])
    row(
        "dense over this",
        [f"{item.attention_flops_dense / item.attention_flops_sparse:.2f} x" for item in stats],
    )
    for name in ("vision", "prefill", "decode", "compile"):
        row(f"{name}, seconds", [f"{getattr(item, f'{name}_seconds'):.3f}" for item in stats])
    row("tokens of the answer", [str(len(result.token_ids)) for result in results.values()])
    return table


def main() -> None:
    """Runs the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder to write to"
    )
    folder = parser.parse_args().output
    console = Console(highlight=False)

    console.print(f"Converting {SOURCE.relative_to(HERE.parent)} ...")
    model = bsjax.load(converted(folder))
    console.print(
        f"Checkpoint: {model.path}, {model.family.name}, {model.dtype.name}. [bold]Its weights are "
        "random numbers: the answers below are noise.[/bold] What is shown is that the whole way "
        "from a Hugging Face checkpoint to an answer works, and what sparsity does to its cost."
    )
    images = photographs_and_crops()
    content = [{"type": "image", "image": image} for image in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]

    profiles = {"dense": None, CATEGORY.name: bsjax.Profile.uniform(CATEGORY, model)}
    results = {}
    for name, profile in profiles.items():
        # Once to compile, once to measure.
        first = bsjax.generate(model, messages, profile=profile, max_new_tokens=NEW_TOKENS)
        again = bsjax.generate(model, messages, profile=profile, max_new_tokens=NEW_TOKENS)
        if again.token_ids != first.token_ids:
            raise SystemExit(f"{name}: two runs gave two answers; this is a defect.")
        results[name] = first, again

    stats = results["dense"][1].stats
    console.print(f"\n[bold]Question:[/bold] {QUESTION}")
    console.print(
        f"{len(images)} images of {', '.join(map(str, stats.image_tokens))} tokens; "
        f"{stats.prompt_tokens} tokens in all."
    )
    for name, (_, result) in results.items():
        console.print(f"[bold]Answer, {name}:[/bold]", end=" ")
        console.print(repr(result.text), markup=False, soft_wrap=True)
    console.print()
    console.print(table_of({name: again for name, (_, again) in results.items()}))
    compile_seconds = ", ".join(
        f"{first.stats.compile_seconds:.1f} s ({name})" for name, (first, _) in results.items()
    )
    console.print(f"Compiling before that, in each first run: {compile_seconds}.")
    picture = draw_mask(model, messages, folder / "mask.png")
    console.print(f"Picture of the mask: {picture}", soft_wrap=True)


if __name__ == "__main__":
    main()
