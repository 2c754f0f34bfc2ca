"""Asks a small trained model about images that it has never seen, then times it on long prompts.

    python -m examples.demo [--checkpoint FOLDER] [--profile FILE] [--output FOLDER]

1. Converts examples/small-qwen2.5-vl, draws twelve images with digits that were held out from its
   training, and asks about them, dense and with the profile that was measured on the model.
2. Times attention and prefill of prompts of increasing length, dense and sparse, on this machine.

Pictures go to the output folder. `--checkpoint` and `--profile` take a model of your own, from
`make train`, and its profile.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from rich.text import Text

import bsjax
from bsjax.profiles.picture import plot_profile

from .arguments import whole
from .long_prompts import plot_timings, table_of_timings, time_prompts
from .shipped import CHECKPOINT, PROFILE, converted
from .train_small_vlm.conversations import messages
from .train_small_vlm.questions import TASKS, Question, ask
from .train_small_vlm.scenes import LABELS, Scene, draw_scene

IMAGES = 12
QUESTIONS_PER_TASK = 2


def scene_and_questions(random: np.random.Generator) -> tuple[Scene, list[Question]]:
    """A scene about which every task has a question, and a few questions of each task."""
    while True:
        scene = draw_scene(random, IMAGES, test=True)
        of_tasks = []
        for task in TASKS:
            drawn = {ask(random, scene, task): None for _ in range(8 * QUESTIONS_PER_TASK)}
            of_tasks.append([one for one in drawn if one.task == task][:QUESTIONS_PER_TASK])
        if all(of_tasks):
            return scene, [question for of_task in of_tasks for question in of_task]


def contact_sheet(scene: Scene, path: Path) -> Path:
    """All images of a scene, enlarged, with their letters."""
    side, columns = 132, 6
    rows = -(-len(scene.pictures) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + 14)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, picture in enumerate(scene.pictures):
        left, top = number % columns * side, number // columns * (side + 14)
        image = Image.fromarray(picture.pixels)
        image = image.resize((3 * image.width, 3 * image.height), Image.Resampling.NEAREST)
        sheet.paste(image, (left + 4, top + 14))
        draw.text((left + 4, top + 1), LABELS[number], fill="black")
    sheet.save(path)
    return path


def ask_all(
    model: bsjax.LoadedModel, profile: bsjax.Profile, scene: Scene, questions: list[Question]
) -> dict[str, list[bsjax.Result]]:
    """The answers to all questions, dense and with the profile."""
    return {
        name: [
            bsjax.generate(model, messages(scene, question), profile=used, max_new_tokens=4)
            for question in questions
        ]
        for name, used in {"dense": None, "sparse": profile}.items()
    }


def table_of_answers(questions: list[Question], answers: dict[str, list[bsjax.Result]]) -> Table:
    """A line for each question: the right answer, and the answers given, with wrong ones in red."""
    table = Table(title="answers", title_justify="left")
    for name in ("question", "right", *answers):
        table.add_column(name)
    for number, question in enumerate(questions):
        given = [results[number].text for results in answers.values()]
        shown = [
            Text(text.strip() or "nothing", style="" if text == question.answer else "red")
            for text in given
        ]
        table.add_row(question.text, question.answer.strip(), *shown)
    return table


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="folder that `make train` wrote"
    )
    parser.add_argument("--profile", default=PROFILE, help="a file, or a shipped profile's name")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder to write to"
    )
    parser.add_argument("--seed", type=whole(0), default=1, help="for images and questions")
    options = parser.parse_args()
    console = Console(highlight=False)

    console.print(f"Converting {options.checkpoint.name} ...", soft_wrap=True)
    try:
        model = converted(options.checkpoint)
        profile = bsjax.Profile.resolve(options.profile, model)
    except bsjax.BsjaxError as error:
        raise SystemExit(f"error: {error}") from None
    assert profile is not None

    random = np.random.default_rng(options.seed)
    scene, questions = scene_and_questions(random)
    answers = ask_all(model, profile, scene, questions)
    stats = answers["sparse"][0].stats
    console.print(
        f"{len(scene.pictures)} images, {stats.prompt_tokens} tokens. "
        "The digits were held out from training.\n"
    )
    console.print(table_of_answers(questions, answers))
    for name, results in answers.items():
        right = sum(
            result.text == question.answer
            for result, question in zip(results, questions, strict=True)
        )
        console.print(f"{name}: {right} of {len(questions)} right")
    saved = 1 - stats.attention_flops_sparse / stats.attention_flops_dense
    console.print(f"The profile saves {saved:.0%} of the attention FLOPs of these prompts.\n")

    console.print("Timing prompts of", end="")
    timings = []
    for timing in time_prompts(model, profile):
        timings.append(timing)
        console.print(f" {timing.tokens:,}", end="")
    console.print(" tokens.\n")
    console.print(table_of_timings(timings))
    console.print(
        "Times are dense -> sparse, with sparse / dense after them; FLOPs are sparse / dense, of "
        "attention only. Times are medians of up to three rounds, without compilation. Only time "
        "matters here, not the answer: the model was trained on at most twelve images of about 37 "
        "tokens. The images here have 256 tokens, because images smaller than a tile of queries "
        "save no time on a CPU. Time falls less than FLOPs because dense attention runs in larger "
        "blocks.\n"
    )

    options.output.mkdir(parents=True, exist_ok=True)
    template = template_of(model, profile, scene, questions[0])
    mask = bsjax.BlockMask(template, ["INTRA_IMAGE_SINK"])
    mask.plot(options.output / "mask.png")
    plot_profile(profile, options.output / "profile.png")
    pictures = {
        "Time against length": plot_timings(timings, options.output / "time.png"),
        "The images": contact_sheet(scene, options.output / "images.png"),
        "The profile": options.output / "profile.png",
        "One head's mask": options.output / "mask.png",
    }
    for name, path in pictures.items():
        console.print(f"{name}: {path}", soft_wrap=True)


def template_of(
    model: bsjax.LoadedModel, profile: bsjax.Profile, scene: Scene, question: Question
) -> bsjax.Template:
    """The template of a prompt, with the profile's sinks."""
    prompt = model.prompt(messages(scene, question))
    return model.family.template(prompt, model.config, profile.sinks)


if __name__ == "__main__":
    main()
