"""Asks the small trained model beside this file about images it has not seen, dense and sparse.

    python -m examples.demo [--checkpoint FOLDER] [--profile FILE] [--output FOLDER]

Converts examples/small-qwen2.5-vl, draws twelve images with digits that it has not been trained on,
asks about them, and prints what it answers dense and with its measured profile, what each took, and
the profile. Other checkpoints of `make train`, and their profiles, can be given instead.
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
from bsjax.profiles.report import print_profile

from .arguments import whole
from .shipped import CHECKPOINT, PROFILE, converted
from .train_small_vlm.conversations import messages
from .train_small_vlm.questions import TASKS, Question, ask
from .train_small_vlm.scenes import LABELS, Scene, draw_scene

IMAGES = 12
QUESTIONS_PER_TASK = 2


def scene_and_questions(random: np.random.Generator) -> tuple[Scene, list[Question]]:
    """A scene that can be asked questions of all tasks, and at most a few of each."""
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
    answers = {}
    for name, used in {"dense": None, "sparse": profile}.items():
        # Once to compile; what is measured is what every further prompt of like size takes.
        bsjax.generate(model, messages(scene, questions[0]), profile=used, max_new_tokens=4)
        answers[name] = [
            bsjax.generate(model, messages(scene, question), profile=used, max_new_tokens=4)
            for question in questions
        ]
    return answers


def table_of_answers(questions: list[Question], answers: dict[str, list[bsjax.Result]]) -> Table:
    """Questions, right answers and given ones."""
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


def table_of_costs(answers: dict[str, list[bsjax.Result]]) -> Table:
    """What the answers took: one column for each run, medians over the questions."""
    table = Table(title="prefill and answer, median of the questions", title_justify="left")
    table.add_column("")
    for name in answers:
        table.add_column(name, justify="right")
    stats = {name: [result.stats for result in results] for name, results in answers.items()}

    def row(title: str, value, form: str) -> None:
        table.add_row(
            title, *(form.format(np.median([value(one) for one in of])) for of in stats.values())
        )

    row("attention FLOPs of prefill", lambda one: one.attention_flops_sparse, "{:,.0f}")
    row(
        "saved",
        lambda one: 100 * (1 - one.attention_flops_sparse / one.attention_flops_dense),
        "{:.1f} %",
    )
    for name in ("vision", "prefill", "decode"):
        row(f"{name}, seconds", lambda one, name=name: getattr(one, f"{name}_seconds"), "{:.3f}")
    return table


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="as trained")
    parser.add_argument("--profile", default=PROFILE, help="a file, or a shipped profile's name")
    parser.add_argument(
        "--output", type=Path, default=Path("build/demo"), help="folder to write to"
    )
    parser.add_argument("--seed", type=whole(0), default=1, help="of images and questions")
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
    stats = answers["dense"][0].stats
    console.print(
        f"{len(scene.pictures)} images of {', '.join(map(str, stats.image_tokens))} tokens; "
        f"{stats.prompt_tokens} tokens in all. The digits were held out from training.\n"
    )
    console.print(table_of_answers(questions, answers))
    for name, results in answers.items():
        right = sum(
            result.text == question.answer
            for result, question in zip(results, questions, strict=True)
        )
        console.print(f"{name}: {right} of {len(questions)} right")
    console.print()
    console.print(table_of_costs(answers))
    console.print(
        "A prompt this short spends little of its time in attention: what sparsity saves shows in "
        "FLOPs here, and in seconds on long prompts.\n"
    )
    print_profile(profile, options.profile)

    options.output.mkdir(parents=True, exist_ok=True)
    template = template_of(model, profile, scene, questions[0])
    mask = bsjax.BlockMask(template, ["INTRA_IMAGE_SINK"])
    mask.plot(options.output / "mask.png")
    plot_profile(profile, options.output / "profile.png")
    pictures = {
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
    return bsjax.Template.from_tokens(
        prompt.token_ids,
        model.config.image_token_id,
        image_tokens=prompt.image_tokens,
        sinks=profile.sinks,
    )


if __name__ == "__main__":
    main()
