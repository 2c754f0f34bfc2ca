"""The training loss: for answers, and for the intermediate steps that lead to them.

Captions, readings and pointings teach the steps between a question about several images and its
answer. They are used in training only and are not part of the model.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from transformers import PretrainedConfig

from bsjax.masks.categories import ALL_KEY_GROUPS
from bsjax.models.qwen2_vl.vision_plan import VisionPlan

from .batches import QUESTION_ROWS, Batch
from .forward import SharedRows, hidden_states, image_features, logits_at
from .questions import BY_LETTER, FEATURES, TASKS
from .scenes import COLOURS, CONTENTS, LABELS

CAPTION_WEIGHT = 0.3
"""Weight of the captions of the images (`Batch.captions`) relative to the answers."""
READING_WEIGHTS = {
    "content known": 0.125,
    "colour known": 0.125,
    "letter known": 0.125,
    "letter found": 0.125,
    "number counted": 0.125,
    "content asked": 0.125,
    "colour asked": 0.125,
    "content compared": 0.125,
    "colour compared": 0.125,
    "question known": 0.125,
    "content alike": 0.125,
    "colour alike": 0.125,
    "answer known": 0.5,
}
"""Weights of the readings: what linear readers recover from the values of layers.

From the last row of an image and from its letter, they recover its features, its letter, and how
many earlier images are alike. From the last word of a question, they recover what is asked, the
features of the image with that letter, the letter that was looked for and the number that was
counted; in later layers also whether the compared images are alike, and the answer. Finding,
counting and comparing consist of these steps.
"""
READ_LAYER = 2
"""The layer whose values most readings are taken from, early enough for later rows and layers to
use them. What a head is taught to look at is read from that head's own layer."""
POINTING_WEIGHT = 0.3
"""Weight of the pointings: a few heads should divide their attention equally between given rows
(see `pointings_of`)."""
WORD_HEAD, COUNT_HEAD, FIND_HEAD, REPEAT_HEAD, ANSWER_HEAD = (1, 0), (1, 1), (1, 5), (2, 3), (3, 0)
ALIKE_HEADS = {"content": (1, 3), "colour": (1, 4)}
COMPARE_HEADS = {"content": (2, 4), "colour": (2, 5)}
"""Layer and query head."""


class _Pointing(NamedTuple):
    """What a head is taught to look at."""

    name: str
    head: tuple[int, int]
    """Layer and query head."""
    rows: Int[Array, "prompts pointing"]
    """The rows that look."""
    targets: Bool[Array, "prompts pointing rows"]
    """The rows that they should look at; none for rows that are not taught."""


def loss_and_correct(
    module: Any,
    readers: dict[str, Array],
    batch: Batch,
    plans: VisionPlan,
    groups: Int[np.ndarray, "layers heads_or_1"],
    shared_rows: SharedRows | None = None,
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """The training loss, and what is logged about it.

    Args:
      module: the model.
      readers: the readers, from `new_readers`.
      batch: prompts with the same numbers of images and questions.
      plans: the vision tower's plan of each image size, stacked (`Encoder.plans`).
      groups: key groups that each head, or every head of a layer, keeps (`groups_of_layers`).
      shared_rows: those of the batch, if bsjax's attention is to be used.

    Returns:
      The loss, a scalar; which answers are right when decoded greedily, [prompts, questions]; and,
      by name, the share of readings that are right and the share of attention that is on target.
    """
    features = image_features(module, batch, plans)
    hidden, (q, k, v) = hidden_states(module, batch, features, groups, shared_rows)
    logits = logits_at(module, hidden, batch.answer_rows)
    wanted = batch.answers >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.answers, 0))
    right = right_answers(logits, batch)
    # Ends of answers are learned quickly and need little weight.
    is_end = jnp.cumsum(wanted[..., ::-1], axis=-1)[..., ::-1] == 1
    weight = jnp.where(wanted, jnp.where(is_end, 0.1, 1.0), 0.0)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    caption_rows = batch.last_rows[..., None] + np.arange(len(FEATURES))
    captions = logits_at(module, hidden, caption_rows)
    loss = (losses * weight).sum() / weight.sum()
    loss += CAPTION_WEIGHT * cross_entropy(captions, batch.captions).mean()
    readings = readings_of(readers, v, batch, q.shape[3])
    log = {}
    for name, (guesses, truth, is_read) in readings.items():
        count = jnp.maximum(is_read.sum(), 1)
        loss += READING_WEIGHTS[name] * (cross_entropy(guesses, truth) * is_read).sum() / count
        log[name] = ((guesses.argmax(axis=-1) == truth) & is_read).sum() / count
    for name, (layer, head), rows, targets in pointings_of(batch, groups):
        kv_head = head * k.shape[3] // q.shape[3]
        scores = _scores_of_rows(
            q[layer, :, :, head], k[layer, :, :, kv_head], rows, batch, module.language_model.scale
        )
        equally = targets / jnp.maximum(targets.sum(axis=-1, keepdims=True), 1)
        taught = targets.any(axis=-1)
        missed = optax.softmax_cross_entropy(scores, equally)
        loss += POINTING_WEIGHT * (missed * taught).sum() / jnp.maximum(taught.sum(), 1)
        on_target = (jax.nn.softmax(scores, axis=-1) * targets).sum(axis=-1)
        log[name] = on_target.sum() / jnp.maximum(taught.sum(), 1)
    return loss, (right, log)


def pointings_of(batch: Batch, groups: Int[np.ndarray, "layers heads_or_1"]) -> Iterator[_Pointing]:
    """What a few heads are taught to look at.

    - A letter in a question looks at the letter of its image.
    - The word for what is to be found or counted looks at the letters of the images that show it.
      A second head also looks at the first row of the prompt, so that the attention mass there
      encodes the number of images. Rows with nothing to look at look at the first row, too.
    - The last row of an image looks at the last rows of earlier images that are alike, and at the
      first row.
    - In later layers, the last word of a comparison looks at the other letter if the two images are
      alike. The last word of "What comes twice?" looks at the last row of the image that repeats an
      earlier one.
    - The row before the answer looks at the last word.
    """
    rows = batch.token_ids.shape[1]
    first = jnp.arange(rows) == 0

    def of_images(images: Array, rows_of_images: Array) -> Array:
        """Rows of some images [prompts, pointing, images] as a mask [prompts, pointing, rows]."""
        places = jax.nn.one_hot(rows_of_images, rows)
        return jnp.einsum("pni,pir->pnr", images.astype(jnp.float32), places) > 0

    def or_first(targets: Array) -> Array:
        return targets | (first & ~targets.any(axis=-1, keepdims=True))

    letters = batch.last_rows + 2
    meant, compared = jnp.asarray(batch.meant), jnp.asarray(batch.compared)
    by_letter = _of_tasks(batch, *BY_LETTER)[..., None]
    of_words = of_images(meant, letters)
    yield _Pointing("word looks", WORD_HEAD, batch.word_rows, of_words & by_letter)
    of_compared = of_images(compared, letters)
    yield _Pointing("compared looks", WORD_HEAD, batch.compared_rows, of_compared)
    by_feature = _of_tasks(batch, "find", "count")[..., None]
    yield _Pointing("finds", FIND_HEAD, batch.word_rows, or_first(of_words) & by_feature)
    yield _Pointing("counts", COUNT_HEAD, batch.word_rows, (of_words | first) & by_feature)
    # Only later layers know which images are alike.
    repeat = _of_tasks(batch, "repeat")[..., None]
    is_last = jnp.cumsum(meant, axis=-1) == meant.sum(axis=-1, keepdims=True)
    of_last = of_images(meant & is_last, batch.last_rows)
    yield _Pointing("repeat looks", REPEAT_HEAD, batch.word_rows, or_first(of_last) & repeat)
    words = jax.nn.one_hot(batch.word_rows, rows) > 0
    yield _Pointing("answer looks", ANSWER_HEAD, batch.answer_rows[..., 0], words)
    letter_compared = jax.nn.one_hot(batch.compared_rows, rows) > 0
    for index, name in enumerate(FEATURES):
        feature = jnp.asarray(batch.features[..., index])
        alike = feature[:, :, None] == feature[:, None, :]
        same = (_of_image(meant, feature) == _of_image(compared, feature))[..., None]
        targets = or_first(letter_compared & same) & compared.any(axis=-1, keepdims=True)
        yield _Pointing(f"{name} compares", COMPARE_HEADS[name], batch.word_rows, targets)
        layer, _ = ALIKE_HEADS[name]
        if (groups[layer] != ALL_KEY_GROUPS.value).any():
            # In a sparse layer, images cannot look at other images.
            continue
        earlier = of_images(jnp.tril(alike, -1), batch.last_rows)
        yield _Pointing(f"{name} looks", ALIKE_HEADS[name], batch.last_rows, earlier | first)


def _scores_of_rows(
    q: Float[Array, "prompts rows head_dim"],
    k: Float[Array, "prompts rows head_dim"],
    rows: Int[Array, "prompts pointing"],
    batch: Batch,
    scale: float,
) -> Float[Array, "prompts pointing rows"]:
    """Scaled scores of some rows for all keys that they see in one dense head."""
    total, questions = batch.token_ids.shape[1], batch.tasks.shape[1]
    # The question that a row belongs to; -1 for shared rows.
    question = (jnp.arange(total) - (total - questions * QUESTION_ROWS)) // QUESTION_ROWS
    question = jnp.maximum(question, -1)
    order = jnp.asarray(batch.order)
    seen = (order >= 0)[:, None, :]
    seen &= order[:, None, :] <= jnp.take_along_axis(order, rows, axis=1)[..., None]
    seen &= (question < 0) | (question == question[rows][..., None])
    pointing = jnp.take_along_axis(q, rows[..., None], axis=1)
    scores = jnp.einsum("pnd,prd->pnr", pointing, k) * scale
    return jnp.where(seen, scores, -1e30)


def readings_of(
    readers: dict[str, Array], v: Array, batch: Batch, heads: int
) -> dict[str, tuple[Array, Array, Array]]:
    """The readings by name: scores read from the values of layers, the truth, and whether it is
    asked for.
    """

    def at(values: Array, rows: Array) -> Array:
        values = values.reshape(*values.shape[:2], -1)
        return jnp.take_along_axis(values, rows[..., None], axis=1)

    # The letter comes after the image's end token. Readers use the values of the head that is
    # taught to look there.
    last_and_letter = jnp.concatenate([batch.last_rows, batch.last_rows + 2], axis=1)
    of_word, of_find, of_answer = (
        v[layer, :, :, head * v.shape[3] // heads]
        for layer, head in (WORD_HEAD, FIND_HEAD, ANSWER_HEAD)
    )
    known = at(of_word, last_and_letter)
    last = at(v[READ_LAYER], batch.last_rows)
    letter_rows = jnp.concatenate([batch.word_rows, batch.compared_rows], axis=1)
    by_letter = _of_tasks(batch, *BY_LETTER)[..., None]
    meant, compared = jnp.asarray(batch.meant), jnp.asarray(batch.compared)
    of_letters = jnp.concatenate([meant & by_letter, compared], axis=1)
    asked = at(v[READ_LAYER], letter_rows)
    labels, always = jnp.asarray(batch.labels), jnp.ones((), bool)
    readings = {"letter known": (at(of_find, batch.last_rows + 2), labels, always)}
    found = meant & _of_tasks(batch, "find")[..., None]
    at_word, answer = at(v[READ_LAYER], batch.word_rows), at(of_answer, batch.word_rows)
    readings["letter found"] = at_word, _of_image(found, labels), found.any(axis=-1)
    readings["number counted"] = at_word, meant.sum(axis=-1), _of_tasks(batch, "count")
    for index, name in enumerate(FEATURES):
        features = jnp.asarray(batch.features[..., index])
        readings[name + " known"] = known, jnp.tile(features, 2), always
        readings[name + " alike"] = last, jnp.asarray(batch.alike[..., index]), always
        of_asked = _of_image(of_letters, features)
        readings[name + " asked"] = asked, of_asked, of_letters.any(axis=-1)
        same = _of_image(meant, features) == _of_image(compared, features)
        readings[name + " compared"] = answer, same.astype(jnp.int32), compared.any(axis=-1)
    about = batch.tasks * len(FEATURES) + batch.about
    readings["question known"] = at_word, jnp.asarray(about), always
    readings["answer known"] = answer, jnp.asarray(batch.answers[..., 0]), always
    return {
        name: (values @ readers[name], truth, jnp.broadcast_to(is_read, truth.shape))
        for name, (values, truth, is_read) in readings.items()
    }


def _of_image(
    which: Bool[Array, "prompts asked images"], values: Int[Array, "prompts images"]
) -> Int[Array, "prompts asked"]:
    """The value of the image that is meant, if exactly one is."""
    return jnp.einsum("pni,pi->pn", which * 1, values)


def _of_tasks(batch: Batch, *names: str) -> Bool[Array, "prompts questions"]:
    """Which questions belong to the named tasks."""
    return jnp.isin(batch.tasks, jnp.asarray([list(TASKS).index(name) for name in names]))


def new_readers(config: PretrainedConfig, seed: int) -> dict[str, Array]:
    """The initial matrices of the readers, which are not part of the model."""
    text = config.get_text_config()
    head_dim = text.hidden_size // text.num_attention_heads
    width = text.num_key_value_heads * head_dim
    random = np.random.default_rng([seed, 10])
    shapes = {
        "letter known": (head_dim, len(LABELS)),
        "letter found": (width, len(LABELS)),
        "number counted": (width, len(LABELS) + 1),
        "question known": (width, len(TASKS) * len(FEATURES)),
        "answer known": (head_dim, text.vocab_size),
    }
    for name, values in zip(FEATURES, (CONTENTS, COLOURS), strict=True):
        shapes[f"{name} known"] = head_dim, len(values)
        shapes[f"{name} asked"] = width, len(values)
        shapes[f"{name} alike"] = width, len(LABELS)
        shapes[f"{name} compared"] = head_dim, 2
    return {
        name: jnp.asarray(random.normal(0, shape[0] ** -0.5, shape), jnp.float32)
        for name, shape in shapes.items()
    }


def right_answers(
    logits: Float[Array, "prompts questions answer_tokens vocabulary"], batch: Batch
) -> Bool[Array, "prompts questions"]:
    """Which answers are right when decoded greedily."""
    right = jnp.argmax(logits, axis=-1) == batch.answers
    return (right | (batch.answers < 0)).all(axis=-1)
