"""Loss, optimizer and the training loop, with checkpoints it can go on from.

The modules are bsjax's own. Attention is dense here: prompts are short, a batch of them goes
through at once, and what a row sees is the package's own predicate as a matrix. Layers that are
chosen to be sparse see what INTRA_IMAGE_SINK lets them see, from the first step on.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from jax.tree_util import keystr
from jaxtyping import Array, Bool, Float, Int
from transformers import PretrainedConfig

from bsjax.categories import ALL_KEY_GROUPS, HeadCategory, TokenInfo, visible
from bsjax.models.qwen2_vl.vision_plan import VisionPlan

from .batches import FEATURES, QUESTION_ROWS, Batch, Encoder, ImageBatch
from .files import MERGE_SIZE, PATCH_SIZE
from .questions import TASKS
from .scenes import COLOURS, CONTENTS, LABELS

IMAGES_PER_BATCH = 32
TOWER_IMAGES_PER_BATCH = 128

CAPTION_WEIGHT = 0.3
"""Of what is said of each image, beside the answers (see `FEATURES`)."""
READING_WEIGHT = 0.5
"""Of what can be read from the values of layers: each image's features; how many images before are
alike; at the last word of a question, the answer. Finding, counting and comparing are made of
these; from answers alone they are not learned."""
FEATURE_LAYER, ALIKE_LAYER, ANSWER_LAYER = 1, 2, 3
"""From the values of which layers: where later rows, and later layers, can make something of it."""
POINTING_WEIGHT = 0.3
"""Of where two kinds of rows look with a few heads: the last word of a question at the letters of
the images it stands for, and later at the last row of the last of them, which knows how many were
alike before it; the last row of an image at those of earlier images that are alike."""
WORD_HEAD, LAST_HEAD = (1, 0), (2, 3)
ALIKE_HEADS = {"content": (1, 3), "colour": (1, 4)}
"""Layer and query head."""
TOWER_RATE = 0.1
"""Of the language model's learning rates: what the tower has learned alone is not to be lost."""

_UNIT = PATCH_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class Settings:
    """What a training run is determined by, beside the number of devices.

    Attributes:
      tower_steps: batches of single images that the vision tower is trained on before.
      steps: batches of prompts that the whole model is trained on.
      learning_rate: greatest one of matrices, which Muon changes; it rises to it over
        `warmup_steps`, stays to the middle of the steps and falls to 0, in both stages.
      adam_learning_rate: likewise, of all else.
      warmup_steps: see `learning_rate`.
      weight_decay: of matrices.
      seed: of parameters and data.
      sparse_layers: layers that are INTRA_IMAGE_SINK from the start, all their heads.
    """

    tower_steps: int = 1000
    steps: int = 2400
    learning_rate: float = 0.02
    adam_learning_rate: float = 2e-3
    warmup_steps: int = 50
    weight_decay: float = 0.01
    seed: int = 0
    sparse_layers: tuple[int, ...] = ()


class State(NamedTuple):
    """What training changes."""

    parameters: Any
    optimizer: Any


class Phase(NamedTuple):
    """A part of the training of the whole model.

    Attributes:
      until: share of the steps after which it ends.
      images: numbers of images that prompts have.
      tasks: of their questions.
    """

    until: float
    images: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(TASKS)


PHASES = (
    # Which image a question is about is learned among few images, or very late.
    Phase(0.08, (2, 3), ("content", "colour", "find")),
    Phase(0.4, (2, 3)),
    Phase(0.6, (2, 3, 5)),
    Phase(0.82, (3, 5, 8)),
    Phase(1.0, (3, 5, 8, 12)),
)


def batch_of_step(settings: Settings, encoder: Encoder, step: int) -> Batch:
    """The batch of a step: of the seed and the step alone, so that a run can be gone on with."""
    phase = next(phase for phase in PHASES if step < phase.until * settings.steps)
    random = np.random.default_rng([settings.seed, 2, step])
    images = phase.images[random.integers(len(phase.images))]
    prompts, questions = IMAGES_PER_BATCH // images, min(2 * images, 12)
    return encoder.batch(random, prompts, images, questions, tasks=phase.tasks)


def image_features(
    module: Any, batch: Batch, plans: VisionPlan
) -> Float[Array, "prompts images tokens hidden"]:
    """The tokens of all images, padded to those of the largest size."""
    plan_of_image = jax.tree.map(lambda part: jnp.asarray(part)[batch.size_class], plans)
    run = partial(_run_tower, module.visual)
    return jax.vmap(jax.vmap(run))(batch.pixel_values, plan_of_image)


def hidden_states(
    module: Any,
    batch: Batch,
    features: Float[Array, "prompts images tokens hidden"],
    groups: Int[Array, "layers heads_or_1"],
) -> tuple[Float[Array, "prompts rows hidden"], tuple[Array, Array, Array]]:
    """Hidden states of all rows; queries, keys and values of all layers.

    `groups` are the key groups that heads keep, or all heads of a layer. The arrays beside the
    hidden states have the shape [layers, prompts, rows, heads, head_dim].
    """
    prompts, rows = batch.token_ids.shape
    shared = rows - batch.tasks.shape[1] * QUESTION_ROWS
    embeddings = module.embed(jnp.asarray(batch.token_ids).reshape(-1)).reshape(prompts, rows, -1)
    image_rows = jnp.asarray(batch.image_rows).reshape(prompts, -1)
    embeddings = embeddings.at[jnp.arange(prompts)[:, None], image_rows].set(
        features.reshape(*image_rows.shape, -1), mode="drop"
    )
    info = TokenInfo(*map(jnp.asarray, (batch.order, batch.image, batch.sink)))

    def attend(q: Array, k: Array, v: Array, groups: Array) -> tuple[Array, None]:
        def of_prompt(q: Array, k: Array, v: Array, info: TokenInfo) -> Array:
            seen = _seen(TokenInfo(*(part[:shared] for part in info)), groups)
            return _prompt_attention(q, k, v, seen, info.position, module.attention_scale)

        by_prompt = (array.reshape(prompts, rows, *array.shape[1:]) for array in (q, k, v))
        return jax.vmap(of_prompt)(*by_prompt, info).reshape(q.shape), (q, k, v)

    # Rows of all prompts go through as one: gradients of matrices are one product each.
    position_ids = jnp.moveaxis(jnp.asarray(batch.position_ids), 0, 1).reshape(3, -1)
    embeddings = embeddings.reshape(prompts * rows, -1)
    hidden, kept = module.run_layers(embeddings, position_ids, (attend,), groups)
    q, k, v = (array.reshape(-1, prompts, rows, *array.shape[2:]) for array in kept)
    return hidden.reshape(prompts, rows, -1), (q, k, v)


def _run_tower(tower: Any, pixel_values: Array, plan: VisionPlan) -> Array:
    """The tokens of one padded image."""

    def attend_within(segment: Array) -> Any:
        same = (segment[:, None] == segment[None, :])[None]
        return lambda q, k, v: _masked_attention(q, k, v, same, q.shape[-1] ** -0.5)

    assert plan.window_schedule is not None
    attends = (attend_within(plan.schedule.image), attend_within(plan.window_schedule.image))
    return tower.run_blocks(pixel_values, plan, attends)


def _seen(info: TokenInfo, groups: Int[Array, "heads_or_1"]) -> Bool[Array, "heads_or_1 rows rows"]:
    """Which of the rows that all questions share each of them sees."""
    allowed = visible(
        TokenInfo(*(part[None, :, None] for part in info)),
        TokenInfo(*(part[None, None, :] for part in info)),
        groups[:, None, None],
        bidirectional_images=False,
        window=None,
    )
    # Padding rows see themselves, so that no row sees nothing. Rows of SINK heads need not.
    padding = info.position < 0
    return (allowed & ~padding) | (jnp.eye(info.position.size, dtype=bool) & padding)


def _prompt_attention(
    q: Array, k: Array, v: Array, seen: Array, order: Array, scale: float
) -> Array:
    """Attention of a prompt whose questions see what they share and themselves, not each other."""
    shared = seen.shape[-1]
    rows, heads, channels = q.shape
    before = _masked_attention(q[:shared], k[:shared], v[:shared], seen, scale)

    def of_questions(array: Array) -> Array:
        return array[shared:].reshape(-1, QUESTION_ROWS, *array.shape[1:])

    order_asked = of_questions(order)
    asked_q = of_questions(q).reshape(-1, QUESTION_ROWS, k.shape[1], heads // k.shape[1], channels)
    # Rows after the end of an answer are no keys.
    own_seen = (order_asked[:, None, :] <= order_asked[:, :, None]) & (order_asked >= 0)[:, None]
    scores = jnp.concatenate(
        [
            jnp.where(
                order[:shared] >= 0, jnp.einsum("ntkgd,ckd->nkgtc", asked_q, k[:shared]), -1e30
            ),
            jnp.where(
                own_seen[:, None, None],
                jnp.einsum("ntkgd,nckd->nkgtc", asked_q, of_questions(k)),
                -1e30,
            ),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores * scale, axis=-1)
    asked = jnp.einsum("nkgtc,ckd->ntkgd", weights[..., :shared], v[:shared])
    asked += jnp.einsum("nkgtc,nckd->ntkgd", weights[..., shared:], of_questions(v))
    return jnp.concatenate([before, asked.reshape(-1, heads, channels)])


def _masked_attention(
    q: Array, k: Array, v: Array, seen: Bool[Array, "heads_or_1 rows rows"], scale: float
) -> Array:
    """Softmax attention with the whole score matrix."""
    rows, heads, channels = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, channels)
    scores = jnp.einsum("qkgd,ckd->kgqc", grouped, k) * scale
    if len(seen) > 1:
        seen = seen.reshape(scores.shape)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("kgqc,ckd->qkgd", weights, v).reshape(rows, heads, channels)


def loss_and_correct(
    module: Any,
    readers: dict[str, Array],
    batch: Batch,
    plans: VisionPlan,
    groups: Int[Array, "layers heads_or_1"],
) -> tuple[Array, tuple[Array, dict[str, Array]]]:
    """The loss of a batch, which answers are right when taken greedily, and the shares of readings
    that are.
    """
    features = image_features(module, batch, plans)
    hidden, (q, k, v) = hidden_states(module, batch, features, groups)
    logits = logits_at(module, hidden, batch.answer_rows)
    wanted = batch.answers >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.answers, 0))
    right = right_answers(logits, batch)
    # Ends of answers are learned at once and need no weight of their own.
    is_end = jnp.cumsum(wanted[..., ::-1], axis=-1)[..., ::-1] == 1
    weight = jnp.where(wanted, jnp.where(is_end, 0.1, 1.0), 0.0)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    caption_rows = batch.last_rows[..., None] + np.arange(len(FEATURES))
    captions = logits_at(module, hidden, caption_rows)
    loss = (losses * weight).sum() / weight.sum()
    loss += CAPTION_WEIGHT * cross_entropy(captions, batch.captions).mean()
    readings = _readings(readers, v, batch)
    for name, (guesses, wanted) in readings.items():
        weight_of = READING_WEIGHT if name == "answer known" else READING_WEIGHT / 4
        loss += weight_of * cross_entropy(guesses, wanted).mean()
    log = {
        name: (guesses.argmax(axis=-1) == wanted).mean()
        for name, (guesses, wanted) in readings.items()
    }
    for name, (layer, head), rows, targets in _pointings(batch):
        kv_head = head * k.shape[3] // q.shape[3]
        attention = _attention_of_rows(
            q[layer, :, :, head], k[layer, :, :, kv_head], rows, batch, module.attention_scale
        )
        on_target = jnp.where(targets, attention, 0.0).sum(axis=-1)
        counts = targets.any(axis=-1)
        missed = -jnp.log(jnp.maximum(on_target, 1e-9))
        loss += POINTING_WEIGHT * (missed * counts).sum() / jnp.maximum(counts.sum(), 1)
        log[name] = (on_target * counts).sum() / jnp.maximum(counts.sum(), 1)
    return loss, (right, log)


def _pointings(batch: Batch) -> Iterator[tuple[str, tuple[int, int], Array, Array]]:
    """What heads are taught to look at: a name, layer and head, rows [prompts, pointing], and the
    rows to look at, [prompts, pointing, rows]; nowhere for those that are not taught.
    """
    rows = batch.token_ids.shape[1]
    letters = jax.nn.one_hot(batch.last_rows + 2, rows)
    of_words = jnp.einsum("pqi,pir->pqr", batch.meant.astype(jnp.float32), letters)
    yield "word looks", WORD_HEAD, batch.word_rows, of_words > 0
    last = jax.nn.one_hot(batch.last_rows, rows)
    later = jnp.flip(jnp.cumsum(jnp.flip(batch.meant, -1), axis=-1), -1) - batch.meant
    of_words = jnp.einsum("pqi,pir->pqr", (batch.meant & (later == 0)).astype(jnp.float32), last)
    yield "word looks last", LAST_HEAD, batch.word_rows, of_words > 0
    for index, name in enumerate(FEATURES):
        feature = jnp.asarray(batch.features[..., index])
        alike = jnp.tril(feature[:, :, None] == feature[:, None, :], -1)
        # With no such image, at itself.
        alike |= jnp.eye(alike.shape[1], dtype=bool) & ~alike.any(axis=-1, keepdims=True)
        of_images = jnp.einsum("pqi,pir->pqr", alike.astype(jnp.float32), last)
        yield f"{name} looks", ALIKE_HEADS[name], batch.last_rows, of_images > 0


def _attention_of_rows(
    q: Float[Array, "prompts rows head_dim"],
    k: Float[Array, "prompts rows head_dim"],
    rows: Int[Array, "prompts pointing"],
    batch: Batch,
    scale: float,
) -> Float[Array, "prompts pointing rows"]:
    """What some rows pay to all rows with one head, if it is dense."""
    total, questions = batch.token_ids.shape[1], batch.tasks.shape[1]
    # Which question a row is of; -1 before them.
    question = (jnp.arange(total) - (total - questions * QUESTION_ROWS)) // QUESTION_ROWS
    question = jnp.maximum(question, -1)
    order = jnp.asarray(batch.order)
    seen = (order >= 0)[:, None, :]
    seen &= order[:, None, :] <= jnp.take_along_axis(order, rows, axis=1)[..., None]
    seen &= (question < 0) | (question == question[rows][..., None])
    pointing = jnp.take_along_axis(q, rows[..., None], axis=1)
    scores = jnp.einsum("pnd,prd->pnr", pointing, k) * scale
    return jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)


def _readings(readers: dict[str, Array], v: Array, batch: Batch) -> dict[str, tuple[Array, Array]]:
    """What is read from the values of layers, as scores, and what it should be; by name."""
    values = v.reshape(*v.shape[:3], -1)

    def at(layer: int, rows: Array) -> Array:
        return jnp.take_along_axis(values[layer], rows[..., None], axis=1)

    # The letter stands behind the image's end.
    rows = jnp.concatenate([batch.last_rows, batch.last_rows + 2], axis=1)
    readings = {}
    for index, name in enumerate(FEATURES):
        wanted = jnp.tile(batch.features[..., index], 2)
        readings[name + " known"] = at(FEATURE_LAYER, rows) @ readers[name + " known"], wanted
        alike = at(ALIKE_LAYER, batch.last_rows) @ readers[name + " alike"]
        readings[name + " alike"] = alike, batch.alike[..., index]
    known = at(ANSWER_LAYER, batch.word_rows) @ readers["answer known"]
    readings["answer known"] = known, batch.answers[..., 0]
    return readings


def new_readers(config: PretrainedConfig, seed: int) -> dict[str, Array]:
    """The matrices that read values, at the start; no part of the model."""
    text = config.get_text_config()
    width = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    random = np.random.default_rng([seed, 10])
    sizes = {"content known": len(CONTENTS), "colour known": len(COLOURS)}
    sizes |= {f"{name} alike": len(LABELS) for name in FEATURES}
    sizes["answer known"] = text.vocab_size
    return {
        name: jnp.asarray(random.normal(0, width**-0.5, (width, size)), jnp.float32)
        for name, size in sizes.items()
    }


def right_answers(
    logits: Float[Array, "prompts questions answer_tokens vocabulary"], batch: Batch
) -> Bool[Array, "prompts questions"]:
    """Which answers come out right when every token is the likeliest one."""
    right = jnp.argmax(logits, axis=-1) == batch.answers
    return (right | (batch.answers < 0)).all(axis=-1)


def logits_at(module: Any, hidden: Array, rows: Array) -> Array:
    """Logits after some rows of each prompt, shaped as `rows`."""
    flat = rows.reshape(rows.shape[0], -1, 1)
    return module.logits(jnp.take_along_axis(hidden, flat, axis=1).reshape(*rows.shape, -1))


def groups_of_layers(
    config: PretrainedConfig, sparse_layers: Sequence[int]
) -> Int[np.ndarray, "layers 1"]:
    """Key groups of layers that are INTRA_IMAGE_SINK or else DENSE."""
    layers = config.get_text_config().num_hidden_layers
    sparse = np.isin(np.arange(layers), sparse_layers)[:, None]
    kept = HeadCategory.INTRA_IMAGE_SINK.groups
    return np.where(sparse, kept.value, ALL_KEY_GROUPS.value).astype(np.int32)


class Stage(Protocol):
    """A part of the training that is done step by step, as `run_stage` does it."""

    steps: int
    state: State

    def step(self, index: int) -> dict[str, float]:
        """One step; returns what to log, to be averaged over steps."""
        ...

    def evaluate(self) -> dict[str, float]:
        """What to log now and then."""
        ...


class TowerStage:
    """The vision tower alone: content and colour of single images, from their mean feature.

    Beginning with a tower that sees something spares the language model hours: which image a
    question asks for is learned in a tenth of the steps.
    """

    def __init__(self, module: nnx.Module, settings: Settings, encoder: Encoder) -> None:
        self.steps = settings.tower_steps
        self._settings, self._encoder = settings, encoder
        graph, tower = nnx.split(module.visual)
        width = encoder.config.vision_config.out_hidden_size
        outputs = len(CONTENTS) + len(COLOURS)
        random = np.random.default_rng([settings.seed, 4])
        head = jnp.asarray(random.normal(0, width**-0.5, (width, outputs)), jnp.float32)
        optimizer = make_optimizer(settings, self.steps)
        parameters = (tower, head)
        self.state = _first_state(parameters, optimizer)
        plans = encoder.plans

        def loss(parameters: Any, batch: ImageBatch) -> tuple[Array, Array]:
            tower, head = parameters
            encode = partial(_run_tower, nnx.merge(graph, tower))
            plan_of_image = jax.tree.map(lambda part: jnp.asarray(part)[batch.size_class], plans)
            features = jax.vmap(encode)(batch.pixel_values, plan_of_image)
            # Rows of padding patches stand last in every image.
            tokens = jnp.asarray([height * width // _UNIT**2 for height, width in encoder.sizes])[
                batch.size_class
            ]
            valid = jnp.arange(features.shape[1]) < tokens[:, None]
            mean = (features * valid[..., None]).sum(axis=1) / tokens[:, None]
            logits = mean @ head
            content, colour = logits[:, : len(CONTENTS)], logits[:, len(CONTENTS) :]
            cross_entropy = optax.softmax_cross_entropy_with_integer_labels
            value = cross_entropy(content, batch.content) + cross_entropy(colour, batch.colour)
            right = jnp.stack(
                [content.argmax(-1) == batch.content, colour.argmax(-1) == batch.colour]
            )
            return value.mean(), right.mean(axis=1)

        self._train = train_step(loss, optimizer)

    def step(self, index: int) -> dict[str, float]:
        """One batch of single images."""
        random = np.random.default_rng([self._settings.seed, 5, index])
        batch = self._encoder.images(random, TOWER_IMAGES_PER_BATCH)
        self.state, loss, (content, colour) = self._train(self.state, batch)
        return {"loss": float(loss), "content": float(content), "colour": float(colour)}

    def evaluate(self) -> dict[str, float]:
        """Nothing beyond what every step tells: training images are never seen twice."""
        return {}


class ModelStage:
    """The whole model: questions about scenes."""

    def __init__(self, module: nnx.Module, settings: Settings, encoder: Encoder) -> None:
        self.steps = settings.steps
        self._settings, self._encoder = settings, encoder
        graph, model = nnx.split(module)
        model = quiet_start(model, encoder.config.text_config.hidden_size)
        parameters = (model, new_readers(encoder.config, settings.seed))
        groups = groups_of_layers(encoder.config, settings.sparse_layers)
        optimizer = make_optimizer(settings, self.steps)
        self.state = _first_state(parameters, optimizer)
        plans = encoder.plans

        def loss(parameters: Any, batch: Batch) -> tuple[Array, Any]:
            model, readers = parameters
            return loss_and_correct(nnx.merge(graph, model), readers, batch, plans, groups)

        self._train = train_step(loss, optimizer)
        self._evaluate = jax.jit(loss)

    def step(self, index: int) -> dict[str, float]:
        """One batch of scenes."""
        batch = batch_of_step(self._settings, self._encoder, index)
        self.state, loss, (right, read) = self._train(self.state, batch)
        return {
            "loss": float(loss),
            **shares(np.asarray(right), batch.tasks),
            **{name: float(share) for name, share in read.items()},
        }

    @property
    def model(self) -> Any:
        """The model's parameters, as `nnx.split` gives them."""
        return self.state.parameters[0]

    def evaluate(self) -> dict[str, float]:
        """Share of right answers about held-out scenes of eight images."""
        random = np.random.default_rng([self._settings.seed, 3])
        batch = self._encoder.batch(random, 24, 8, 12, test=True)
        _, (right, _) = self._evaluate(self.state.parameters, batch)
        return shares(np.asarray(right), batch.tasks)


def make_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """Muon for matrices, AdamW for the rest: half of the steps that AdamW alone needs.

    Where parameters are those of the whole model, its vision tower changes slowly.
    """

    def rate(peak: float) -> optax.Schedule:
        warmup = min(settings.warmup_steps, steps // 2)
        parts = [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, 0.0, steps - steps // 2),
        ]
        return optax.join_schedules(parts, [warmup, steps // 2])

    muon = optax.contrib.muon(
        rate(settings.learning_rate),
        adam_learning_rate=rate(settings.adam_learning_rate),
        weight_decay=settings.weight_decay,
        muon_weight_dimension_numbers=partial(jax.tree_util.tree_map_with_path, _matrix),
    )
    slower = optax.masked(
        optax.scale(TOWER_RATE),
        partial(jax.tree_util.tree_map_with_path, lambda path, _: "visual" in keystr(path)),
    )
    return optax.chain(optax.clip_by_global_norm(1.0), muon, slower)


def _matrix(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes of a linear map's matrix, of all layers stacked or of one; None for the rest."""
    if "kernel" not in keystr(path):
        return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def quiet_start(parameters: Any, width: int) -> Any:
    """Parameters with which layers first add nothing to their input, and tokens are loud in it.

    Else layers drown which token a row is. Then it takes long to learn which image a question is
    about, and an image's letter is never found by what the image shows.

    Args:
      parameters: of the model, as they are made.
      width: of its hidden states.
    """

    def start(path: Any, leaf: Array) -> Array:
        name = keystr(path)
        if "visual" in name:
            return leaf
        if "o_proj" in name or "down_proj" in name:
            return jnp.zeros_like(leaf)
        if "embed_tokens" in name:
            return leaf * width**0.5
        # The table is the output layer too, and logits shall stay as they were.
        return leaf / width**0.5 if "'language_model']['norm']" in name else leaf

    return jax.tree_util.tree_map_with_path(start, parameters)


def _first_state(parameters: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, with parameters of its own: steps overwrite them."""
    return State(jax.tree.map(jnp.copy, parameters), optimizer.init(parameters))


def train_step(loss: Callable[..., Any], optimizer: optax.GradientTransformation) -> Any:
    """Jitted `(state, batch) -> state, loss, what the loss returns beside it`."""

    @partial(jax.jit, donate_argnums=0)
    def train(state: State, batch: Any) -> tuple[State, Array, Any]:
        (value, beside), gradients = jax.value_and_grad(loss, has_aux=True)(state.parameters, batch)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        return State(optax.apply_updates(state.parameters, updates), optimizer_state), value, beside

    return train


def shares(right: np.ndarray, tasks: np.ndarray) -> dict[str, float]:
    """Share of right answers, for each task that was asked and for all."""
    result = {"all": float(right.mean())}
    for index, name in enumerate(TASKS):
        if (tasks == index).any():
            result[name] = float(right[tasks == index].mean())
    return result


def run_stage(
    stage: Stage,
    folder: Path,
    *,
    log_every: int = 50,
    save_every: int = 200,
    stop_after: int | None = None,
) -> None:
    """Runs a stage to its end, from the last checkpoint in `folder` if there is one.

    Writes checkpoints and `folder/log.jsonl`: a line every `log_every` steps, and what
    `stage.evaluate` says in every fifth of them and the last.

    Args:
      stage: what is trained; its state is the trained one afterwards.
      folder: of checkpoints and log.
      log_every: steps between lines of the log.
      save_every: steps between checkpoints.
      stop_after: stop there as if interrupted, for tests.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log_file = folder / "log.jsonl"
    with checkpoints_of(folder) as manager:
        first = manager.latest_step() or 0
        if first:
            restore(stage, manager, first)
        lines = _lines_until(log_file, first)
        start = time.perf_counter() - (lines[-1]["seconds"] if lines else 0.0)
        since: list[dict[str, float]] = []
        for done in range(first + 1, stage.steps + 1):
            since.append(stage.step(done - 1))
            ended = done == stage.steps
            if done % log_every == 0 or ended:
                line = {
                    "step": done,
                    "seconds": round(time.perf_counter() - start, 1),
                    "training": _means(since),
                }
                if done % (5 * log_every) == 0 or ended:
                    line["held_out"] = _means([stage.evaluate()])
                with log_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{folder.name}: {json.dumps(line)}", flush=True)
                since = []
            if done % save_every == 0 or ended:
                manager.save(done, args=orbax.checkpoint.args.StandardSave(stage.state))
            if done == stop_after:
                break


def checkpoints_of(folder: Path) -> orbax.checkpoint.CheckpointManager:
    """The checkpoints of a stage: the last ones, and every thousandth step for good."""
    return orbax.checkpoint.CheckpointManager(
        (folder / "checkpoints").absolute(),
        options=orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2, keep_period=1000),
    )


def restore(stage: Stage, manager: orbax.checkpoint.CheckpointManager, step: int) -> None:
    """Puts a stage into the state it had after a step."""
    stage.state = manager.restore(step, args=orbax.checkpoint.args.StandardRestore(stage.state))


def _means(entries: list[dict[str, float]]) -> dict[str, float]:
    """Means by name, over the entries that have the name."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {
        name: round(float(np.mean([entry[name] for entry in entries if name in entry])), 4)
        for name in names
    }


def check_settings(file: Path, settings: Settings) -> None:
    """Writes the settings of a new run, or refuses to go on with another one's.

    Raises:
      SystemExit: the file is of a run with other settings.
    """
    text = json.dumps(asdict(settings), indent=2) + "\n"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    elif json.loads(file.read_text(encoding="utf-8")) != json.loads(text):
        raise SystemExit(
            f"error: {file} is of a run with other settings. Give another folder, or delete it."
        )


def _lines_until(log_file: Path, step: int) -> list[dict[str, Any]]:
    """The log up to a step; later lines, of steps that will be done again, are dropped."""
    if not log_file.exists():
        return []
    lines: Sequence[str] = log_file.read_text(encoding="utf-8").splitlines()
    kept = [line for line in map(json.loads, lines) if line["step"] <= step]
    log_file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept
