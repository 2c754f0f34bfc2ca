r"""Scenes and questions as arrays.

All questions about a scene share its images. The questions follow the images one after the other.
They start at the same position and do not see each other, so each is computed as if it were the
only one.

    <|im_start|>user\n<|vision_start|>aaaa<|vision_end|> A<...>bb<...> B ... \n    once
    What is in image A?<|im_end|>\n<|im_start|>assistant\n7<|im_end|>            each question
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32, UInt8
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bsjax.models import FAMILIES
from bsjax.models.qwen2_vl.vision_plan import VisionPlan

from .files import MERGE_SIZE, PATCH_SIZE
from .questions import FEATURES, TASKS, Question, ask
from .scenes import (
    COLOURS,
    CONTENTS,
    LABELS,
    SIDES,
    Picture,
    Scene,
    draw_picture,
    draw_scene,
)

QUESTION_ROWS = 16
"""Rows for each question and its answer."""
ANSWER_TOKENS = 3
"""The largest number of tokens in an answer, including its end."""
_MOST_PATCHES = (max(SIDES) // PATCH_SIZE) ** 2
_UNIT = PATCH_SIZE * MERGE_SIZE


class Batch(NamedTuple):
    """Prompts with the same numbers of images and questions, padded to the same shapes.

    The questions have the last rows, `QUESTION_ROWS` each.
    """

    token_ids: Int32[np.ndarray, "prompts rows"]
    position_ids: Int32[np.ndarray, "prompts 3 rows"]
    order: Int32[np.ndarray, "prompts rows"]
    """The row's position in its own prompt, for causality; -1 for padding."""
    image: Int32[np.ndarray, "prompts rows"]
    """Image number; -1 for text and padding."""
    sink: Bool[np.ndarray, "prompts rows"]
    pixel_values: Float32[np.ndarray, "prompts images patches values"]
    size_class: Int32[np.ndarray, "prompts images"]
    """Index in `Encoder.sizes` of each image's size."""
    image_rows: Int32[np.ndarray, "prompts images tokens"]
    """The row of each image token; out of range for padding."""
    answer_rows: Int32[np.ndarray, "prompts questions answer_tokens"]
    """The row whose logits choose each token of the answer."""
    answers: Int32[np.ndarray, "prompts questions answer_tokens"]
    """Token ids of the answers, including their ends; -1 after that."""
    tasks: Int32[np.ndarray, "prompts questions"]
    """Index of each question's task in `TASKS`."""
    about: Int32[np.ndarray, "prompts questions"]
    """Index in `FEATURES` of the feature that each question is about."""
    word_rows: Int32[np.ndarray, "prompts questions"]
    """The row of the last word of each question."""
    meant: Bool[np.ndarray, "prompts questions images"]
    """The images that the last word refers to (`Question.images`)."""
    compared_rows: Int32[np.ndarray, "prompts questions"]
    """If two images are compared, the row of the first letter; else that of the last word."""
    compared: Bool[np.ndarray, "prompts questions images"]
    """The image that the first letter refers to; none if nothing is compared."""
    last_rows: Int32[np.ndarray, "prompts images"]
    """The last row of each image."""
    captions: Int32[np.ndarray, "prompts images features"]
    """Tokens of the image's `FEATURES`, to be predicted at its last row and the row after it."""
    features: Int32[np.ndarray, "prompts images features"]
    """The image's `FEATURES`, as indices in `CONTENTS` and `COLOURS`."""
    alike: Int32[np.ndarray, "prompts images features"]
    """How many earlier images have the same feature."""
    labels: Int32[np.ndarray, "prompts images"]
    """Index in `LABELS` of each image's letter."""


class ImageBatch(NamedTuple):
    """Single images, padded to the same number of patches."""

    pixel_values: Float32[np.ndarray, "images patches values"]
    size_class: Int32[np.ndarray, "images"]
    """Index in `Encoder.sizes` of each image's size."""
    content: Int32[np.ndarray, "images"]
    """Index in `CONTENTS`."""
    colour: Int32[np.ndarray, "images"]
    """Index in `COLOURS`."""


class Encoder:
    """Makes batches for one configuration."""

    sizes = [(height, width) for height in SIDES for width in SIDES]

    def __init__(
        self,
        config: PretrainedConfig,
        tokenizer: PreTrainedTokenizerBase,
        image_mean: list[float],
        image_std: list[float],
    ) -> None:
        self.config = config
        self._family = FAMILIES[config.model_type]
        self._tokenizer = tokenizer
        self._mean = np.asarray(image_mean, np.float32)
        self._std = np.asarray(image_std, np.float32)
        self._known: dict[str, list[int]] = {}

    @cached_property
    def plans(self) -> VisionPlan:
        """The vision tower's plans for all `sizes`, stacked and padded to the largest size."""
        plans = [
            self._family.vision_plan(
                np.asarray([[1, height // PATCH_SIZE, width // PATCH_SIZE]]),
                self.config,
                patches=_MOST_PATCHES,
                block_q=16,
                block_kv=16,
            )
            for height, width in self.sizes
        ]
        return jax.tree.map(lambda *parts: np.stack(parts), *plans)

    def batch(
        self,
        random: np.random.Generator,
        prompts: int,
        images: int,
        questions: int,
        *,
        tasks: Sequence[str] = tuple(TASKS),
        test: bool = False,
    ) -> Batch:
        """A random batch of scenes, with `questions` questions from `tasks` about each."""
        rows = self.shared_rows(images) + questions * QUESTION_ROWS
        encoded = []
        while len(encoded) < prompts:
            scene = draw_scene(random, images, test=test)
            if not test and random.random() < 0.5:
                # The model must know all letters before prompts have enough images to use them.
                first = random.integers(len(LABELS) - images + 1)
                scene = replace(scene, first_label=int(first))
            chosen = random.integers(len(tasks), size=questions)
            asked = [ask(random, scene, tasks[index]) for index in chosen]
            one = self.encode(scene, asked, rows)
            # A scene with many large images may not fit: then another is drawn.
            if one is not None:
                encoded.append(one)
        return Batch(*(np.stack(parts) for parts in zip(*encoded, strict=True)))

    @staticmethod
    def shared_rows(images: int) -> int:
        """Rows that the questions share: enough for images slightly larger than the average."""
        tokens = (np.mean(SIDES) / _UNIT) ** 2
        return 16 * -(-int(4 + images * (3 + 1.12 * tokens)) // 16)

    def images(self, random: np.random.Generator, count: int) -> ImageBatch:
        """Random single images and what they show, for the vision tower alone."""
        contents = random.integers(len(CONTENTS), size=count)
        colours = random.integers(len(COLOURS), size=count)
        names = tuple(COLOURS)
        pictures = [
            draw_picture(random, CONTENTS[content], names[colour], test=False)
            for content, colour in zip(contents, colours, strict=True)
        ]
        return ImageBatch(
            np.stack([self.patches(picture.pixels) for picture in pictures]),
            self._size_classes(pictures),
            contents.astype(np.int32),
            colours.astype(np.int32),
        )

    def _size_classes(self, pictures: Sequence[Picture]) -> Int32[np.ndarray, "images"]:
        return np.asarray(
            [self.sizes.index(picture.pixels.shape[:2]) for picture in pictures], np.int32
        )

    def encode(self, scene: Scene, questions: list[Question], rows: int) -> Batch | None:
        """One prompt as arrays without a leading axis; None if it has more than `rows` rows."""
        shared = rows - len(questions) * QUESTION_ROWS
        parts = [self._ids("<|im_start|>user\n")]
        grids, first_rows = [], []
        length = len(parts[0])
        for label, picture in zip(scene.labels, scene.pictures, strict=True):
            height, width = (side // _UNIT for side in picture.pixels.shape[:2])
            before = self._ids("<|vision_start|>")
            after = self._ids(f"<|vision_end|> {label}")
            first_rows.append(length + len(before))
            parts += [before, [self.config.image_token_id] * (height * width), after]
            grids.append((1, height * MERGE_SIZE, width * MERGE_SIZE))
            length += len(before) + height * width + len(after)
        parts.append(self._ids("\n"))
        length += len(parts[-1])
        if length > shared:
            return None
        prefix = np.concatenate(parts)
        positions, next_position = self._family.positions(prefix, np.asarray(grids), self.config)

        token_ids = np.zeros(rows, np.int32)
        position_ids = np.zeros((3, rows), np.int32)
        order = np.full(rows, -1, np.int32)
        image = np.full(rows, -1, np.int32)
        sink = np.zeros(rows, bool)
        token_ids[:length] = prefix
        position_ids[:, :length] = positions
        order[:length] = np.arange(length)
        image_rows = np.full((len(grids), _MOST_PATCHES // MERGE_SIZE**2), rows, np.int32)
        for number, (first, grid) in enumerate(zip(first_rows, grids, strict=True)):
            tokens = grid[1] * grid[2] // MERGE_SIZE**2
            image[first : first + tokens] = number
            sink[first] = True
            image_rows[number, :tokens] = np.arange(first, first + tokens)

        answers = np.full((len(questions), ANSWER_TOKENS), -1, np.int32)
        answer_rows = np.zeros((len(questions), ANSWER_TOKENS), np.int32)
        word_rows = np.zeros(len(questions), np.int32)
        meant = np.zeros((len(questions), len(grids)), bool)
        compared_rows, compared = np.zeros_like(word_rows), np.zeros_like(meant)
        for number, question in enumerate(questions):
            asked = self._ids(f"{question.text}<|im_end|>\n<|im_start|>assistant\n")
            answer = self._ids(f"{question.answer}<|im_end|>")
            ids = [*asked, *answer]
            start = shared + number * QUESTION_ROWS
            here = slice(start, start + len(ids))
            token_ids[here] = ids
            position_ids[:, here] = next_position + np.arange(len(ids))
            order[here] = length + np.arange(len(ids))
            answers[number, : len(answer)] = answer
            answer_rows[number, : len(answer)] = start + len(asked) - 1 + np.arange(len(answer))
            # The word precedes the question mark.
            mark = next(i for i in range(len(asked))[::-1] if asked[i] == self._ids("?")[0])
            word_rows[number] = start + mark - 1
            meant[number, list(question.images)] = True
            compared_rows[number] = word_rows[number]
            if question.compared is not None:
                (letter,) = self._ids(f" {scene.labels[question.compared]}")
                compared_rows[number] = start + asked.index(letter)
                compared[number, question.compared] = True
        tasks = list(TASKS)
        return Batch(
            token_ids,
            position_ids,
            order,
            image,
            sink,
            np.stack([self.patches(picture.pixels) for picture in scene.pictures]),
            self._size_classes(scene.pictures),
            image_rows,
            answer_rows,
            answers,
            np.asarray([tasks.index(question.task) for question in questions], np.int32),
            np.asarray([FEATURES.index(question.feature) for question in questions], np.int32),
            word_rows,
            meant,
            compared_rows,
            compared,
            image_rows.max(axis=1, initial=0, where=image_rows < rows),
            np.asarray(
                [
                    [self._ids(picture.content)[0], self._ids(picture.colour)[0]]
                    for picture in scene.pictures
                ],
                np.int32,
            ),
            np.asarray(
                [
                    [CONTENTS.index(picture.content), list(COLOURS).index(picture.colour)]
                    for picture in scene.pictures
                ],
                np.int32,
            ),
            np.stack([_seen_before(scene.contents), _seen_before(scene.colours)], axis=-1),
            scene.first_label + np.arange(len(grids), dtype=np.int32),
        )

    def patches(
        self, pixels: UInt8[np.ndarray, "height width 3"]
    ) -> Float32[np.ndarray, "patches values"]:
        """The image processor's result for an image of one of `sizes`, padded.

        Patches that are merged are adjacent. Each patch holds its pixels twice, as two frames.
        """
        height, width, channels = pixels.shape
        scaled = (pixels.astype(np.float32) / 255 - self._mean) / self._std
        blocks = scaled.reshape(
            height // _UNIT,
            MERGE_SIZE,
            PATCH_SIZE,
            width // _UNIT,
            MERGE_SIZE,
            PATCH_SIZE,
            channels,
        )
        blocks = blocks.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, channels, 1, PATCH_SIZE**2)
        values = np.repeat(blocks, 2, axis=2).reshape(len(blocks), -1)
        return np.pad(values, ((0, _MOST_PATCHES - len(values)), (0, 0)))

    def _ids(self, text: str) -> list[int]:
        if text not in self._known:
            self._known[text] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._known[text]


def _seen_before(names: list[str]) -> Int32[np.ndarray, "names"]:
    """For each name, how many earlier names are the same."""
    return np.asarray([names[:index].count(name) for index, name in enumerate(names)], np.int32)
