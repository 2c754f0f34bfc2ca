"""Held-out prompts, and which of these the model answers right with given head categories."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Int8, Int32, Int64

from bsjax.checkpoint.loading import LoadedModel
from bsjax.masks.categories import HeadCategory
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.template import Sinks, Template

from .batches import QUESTION_ROWS, Batch, Encoder
from .forward import hidden_states, image_features, logits_at
from .loss import right_answers
from .questions import TASKS, ask
from .scenes import draw_scene

_SCENES_PER_BATCH = 16


class _Group(NamedTuple):
    """A batch of scenes with the same number of images, and their image features."""

    batch: Batch
    features: Float[Array, "scenes images tokens hidden"]


class HeldOut:
    """Scenes with test digits, and a question of each task about every scene.

    If a task has no question about a scene, the content of an image is asked for instead (`ask`).

    A question and its scene are one prompt: questions do not see each other. Answers equal those of
    `bsjax.generate`, but are computed with the whole score matrix instead of blocks.

    Attributes:
      name: identifies the model and the prompts.
      tasks: index in `TASKS` of every prompt, int32 [scenes, questions].
      pairs: visible pairs of one head in every prompt, by `HeadCategory`, int64 [scenes, questions,
        categories].
      tokens: tokens of every prompt, int64 [scenes, questions].
      encoder: the encoder that made the batches.
    """

    def __init__(
        self, model: LoadedModel, *, scenes: int, images: Sequence[int], sinks: Sinks, seed: int
    ) -> None:
        """Draws the prompts and encodes their images.

        Args:
          model: a trained checkpoint, converted and loaded with `bsjax.load`.
          scenes: number of scenes.
          images: numbers of images per scene, which the scenes take in turn.
          sinks: which tokens of an image are sinks.
          seed: the seed for everything that is drawn.
        """
        self.name = f"{model.fingerprint}: {scenes} scenes of {images} images, {sinks}, seed {seed}"
        processor = model.image_processor
        self.encoder = encoder = Encoder(
            model.config, model.tokenizer, processor.image_mean, processor.image_std
        )
        graph, self._parameters = nnx.split(model.module)
        plans = encoder.plans

        @jax.jit
        def encode(parameters: Any, batch: Batch) -> Array:
            return image_features(nnx.merge(graph, parameters), batch, plans)

        @jax.jit
        def answer(parameters: Any, group: _Group, groups: Array) -> Array:
            module = nnx.merge(graph, parameters)
            hidden, _ = hidden_states(module, group.batch, group.features, groups)
            return right_answers(logits_at(module, hidden, group.batch.answer_rows), group.batch)

        self._answer = answer
        self.encoded = []
        for number, count in enumerate(images):
            of_count = len(range(number, scenes, len(images)))
            random = np.random.default_rng([seed, 6, count])
            for first in range(0, of_count, _SCENES_PER_BATCH):
                drawn = [
                    _draw(encoder, random, count)
                    for _ in range(min(_SCENES_PER_BATCH, of_count - first))
                ]
                batch = Batch(*(np.stack(parts) for parts in zip(*drawn, strict=True)))
                batch = batch._replace(sink=_sinks(batch.image, sinks))
                self.encoded.append(_Group(batch, encode(self._parameters, batch)))
        self.tasks: Int32[np.ndarray, "scenes questions"] = np.concatenate(
            [group.batch.tasks for group in self.encoded]
        )
        counted = [_pairs(group.batch) for group in self.encoded]
        self.pairs, self.tokens = map(np.concatenate, zip(*counted, strict=True))

    def right(
        self, categories: Int8[np.ndarray, "layers heads"]
    ) -> Bool[np.ndarray, "scenes questions"]:
        """Which prompts are answered right, greedily, with these categories."""
        bits = np.asarray([category.groups.value for category in HeadCategory], np.int32)
        answers = partial(self._answer, self._parameters)
        groups = jnp.asarray(bits[categories])
        return np.concatenate([np.asarray(answers(group, groups)) for group in self.encoded])

    def commonest(self) -> dict[str, float]:
        """For each task, the share of right answers from always giving the most common one."""
        answers = np.concatenate([group.batch.answers for group in self.encoded])
        result = {}
        for index in np.unique(self.tasks):
            counts = np.unique(answers[self.tasks == index], axis=0, return_counts=True)[1]
            result[list(TASKS)[index]] = float(counts.max() / counts.sum())
        return result

    def reduction(self, categories: Int8[np.ndarray, "layers heads"]) -> float:
        """The share of prefill's attention FLOPs that the categories save, over all prompts."""
        pairs = self.pairs.sum(axis=(0, 1))
        # In the last layer only the last token of a prompt, a text token, has a query.
        *counted, last = categories
        in_last_layer = int(self.tokens.sum()) * last.size
        dense = int(pairs[HeadCategory.DENSE]) * np.size(counted) + in_last_layer
        return (dense - in_last_layer - int(pairs[counted].sum())) / dense


def _draw(encoder: Encoder, random: np.random.Generator, images: int) -> Batch:
    rows = encoder.shared_rows(images) + len(TASKS) * QUESTION_ROWS
    while True:
        scene = draw_scene(random, images, test=True)
        encoded = encoder.encode(scene, [ask(random, scene, task) for task in TASKS], rows)
        if encoded is not None:
            return encoded


def _sinks(
    image: Int[np.ndarray, "prompts rows"], sinks: Sinks
) -> Bool[np.ndarray, "prompts rows"]:
    """Which rows are sinks."""
    sink = np.zeros(image.shape, bool)
    for prompt, numbers in enumerate(image):
        for number in range(numbers.max() + 1):
            rows = np.flatnonzero(numbers == number)
            sink[prompt, rows] = sinks.of_image(rows.size)
    return sink


def _pairs(
    batch: Batch,
) -> tuple[
    Int64[np.ndarray, "prompts questions categories"], Int64[np.ndarray, "prompts questions"]
]:
    """Visible pairs of one head in every prompt, by `HeadCategory`, and the prompts' tokens."""
    shared = batch.order.shape[1] - batch.tasks.shape[1] * QUESTION_ROWS
    pairs = np.zeros((*batch.tasks.shape, len(HeadCategory)), np.int64)
    tokens = np.zeros(batch.tasks.shape, np.int64)
    for prompt, question in np.ndindex(batch.tasks.shape):
        length = int((batch.order[prompt, :shared] >= 0).sum())
        start = shared + question * QUESTION_ROWS
        asked = int(batch.answer_rows[prompt, question, 0]) + 1 - start
        text = np.full(asked, -1, np.int32)
        template = Template(
            np.concatenate([batch.image[prompt, :length], text]),
            np.concatenate([batch.sink[prompt, :length], np.zeros(asked, bool)]),
        )
        for category in HeadCategory:
            pairs[prompt, question, category] = visible_pairs(template, category.groups)
        tokens[prompt, question] = template.tokens
    return pairs, tokens
