"""Scenes and questions as chat messages, and as files to profile on.

    python -m examples.train_small_vlm.conversations FOLDER [--count N] [--images 4,5,6,7,8]

The command writes one JSON Lines file, and the images that it names.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..arguments import whole
from .questions import Question, ask
from .scenes import LABELS, Scene, draw_scene

PROFILED_IMAGES = (4, 5, 6, 7, 8)
"""The numbers of images in the prompts that profiles are made from."""


def numbers_of_images(text: str) -> tuple[int, ...]:
    """Parses a list such as 4,5,6, in which each is a number of images that a scene can have."""
    numbers = tuple(whole(1)(part) for part in text.split(","))
    if max(numbers) > len(LABELS):
        raise argparse.ArgumentTypeError(f"a scene has at most {len(LABELS)} images")
    return numbers


def messages(scene: Scene, question: Question) -> list[dict[str, Any]]:
    """Hugging Face chat messages: all images, then the question."""
    images = [
        {"type": "image", "image": Image.fromarray(picture.pixels)} for picture in scene.pictures
    ]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]


def draw_conversations(
    count: int, images: Sequence[int] = PROFILED_IMAGES, *, seed: int = 0, test: bool = False
) -> list[tuple[Scene, Question]]:
    """Scenes and a question about each, with training digits, or test digits if `test`."""
    random = np.random.default_rng([seed, 7])
    drawn = []
    for number in range(count):
        scene = draw_scene(random, images[number % len(images)], test=test)
        drawn.append((scene, ask(random, scene)))
    return drawn


def write_samples(
    folder: Path, conversations: Sequence[tuple[Scene, Question]], name: str = "samples.jsonl"
) -> Path:
    """Writes images as PNG and conversations as JSON Lines; returns the JSON Lines file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, question) in enumerate(conversations):
        content = []
        for index, picture in enumerate(scene.pictures):
            file = f"{number:04}-{index:02}.png"
            Image.fromarray(picture.pixels).save(folder / file)
            content.append({"type": "image", "image": file})
        content.append({"type": "text", "text": question.text})
        lines.append(json.dumps({"messages": [{"role": "user", "content": content}]}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description="Writes samples to profile the small model on.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=whole(1), default=64)
    parser.add_argument(
        "--images",
        type=numbers_of_images,
        default=PROFILED_IMAGES,
        metavar="LIST",
    )
    parser.add_argument("--seed", type=whole(0), default=0)
    options = parser.parse_args()
    drawn = draw_conversations(options.count, options.images, seed=options.seed)
    # Profiles record the name of this file as the source of their samples.
    print(write_samples(options.folder, drawn, f"scenes-seed-{options.seed}.jsonl"))


if __name__ == "__main__":
    main()
