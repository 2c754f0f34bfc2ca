"""Loss, optimizer and the training loop, with checkpoints it can go on from.

The modules are bsjax's own. Attention is dense here: prompts are short, a batch of them goes
through at once, and what a row sees is the package's own predicate as a matrix. Layers that are
chosen to be sparse see what INTRA_IMAGE_SINK lets them see, from the first step on.
"""

import json
import time
from collections.abc import Callable, Sequence
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
from jaxtyping import Array, Bool, Float, Int
from transformers import PretrainedConfig

from bsjax.categories import ALL_KEY_GROUPS, HeadCategory, TokenInfo, visible
from bsjax.models.qwen2_vl.vision_plan import VisionPlan

from .batches import QUESTION_ROWS, Batch, Encoder, ImageBatch
from .files import MERGE_SIZE, PATCH_SIZE
from .questions import TASKS
from .scenes import COLOURS, CONTENTS

IMAGES_PER_BATCH = 32
TOWER_IMAGES_PER_BATCH = 128

CAPTION_WEIGHT = 0.3
"""Of the captions of each image (`Batch.captions`), beside the answers. They teach what questions
are made of: what an image shows, which it is, and whether it has been seen before."""


_UNIT = PATCH_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class Settings:
    """What a training run is determined by, beside the number of devices.

    Attributes:
      tower_steps: batches of single images that the vision tower is trained on before.
      steps: batches of prompts that the whole model is trained on.
      learning_rate: greatest one; it rises to it over `warmup_steps` and then falls to 0 along a
        cosine, in both stages.
      warmup_steps: see `learning_rate`.
      weight_decay: of matrices.
      seed: of parameters and data.
      sparse_layers: layers that are INTRA_IMAGE_SINK from the start, all their heads.
    """

    tower_steps: int = 1000
    steps: int = 1700
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.05
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
    Phase(0.2, (2, 3), ("content", "colour", "find")),
    Phase(0.38, (2, 3)),
    Phase(0.55, (2, 3, 5)),
    Phase(0.78, (3, 5, 8)),
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
) -> Float[Array, "prompts rows hidden"]:
    """Hidden states of all rows; `groups` are the key groups that heads keep, or all of a layer."""
    prompts, rows = batch.token_ids.shape
    shared = rows - batch.tasks.shape[1] * QUESTION_ROWS
    embeddings = module.embed(jnp.asarray(batch.token_ids).reshape(-1)).reshape(prompts, rows, -1)
    image_rows = jnp.asarray(batch.image_rows).reshape(prompts, -1)
    embeddings = embeddings.at[jnp.arange(prompts)[:, None], image_rows].set(
        features.reshape(*image_rows.shape, -1), mode="drop"
    )

    def run(embeddings: Array, position_ids: Array, info: TokenInfo) -> Array:
        def attend(q: Array, k: Array, v: Array, groups: Array) -> tuple[Array, None]:
            seen = _seen(TokenInfo(*(part[:shared] for part in info)), groups)
            return _prompt_attention(q, k, v, seen, info.position, module.attention_scale), None

        return module.run_layers(embeddings, position_ids, (attend,), groups)[0]

    info = TokenInfo(batch.order, batch.image, batch.sink)
    return jax.vmap(run)(embeddings, batch.position_ids, info)


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
    module: Any, batch: Batch, plans: VisionPlan, groups: Int[Array, "layers heads_or_1"]
) -> tuple[Array, Array]:
    """The loss of a batch, and which answers are right when taken greedily."""
    hidden = hidden_states(module, batch, image_features(module, batch, plans), groups)
    logits = logits_at(module, hidden, batch.answer_rows)
    wanted = batch.answers >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.answers, 0))
    right = right_answers(logits, batch)
    # Ends of answers are learned at once and need no weight of their own.
    is_end = jnp.cumsum(wanted[..., ::-1], axis=-1)[..., ::-1] == 1
    weight = jnp.where(wanted, jnp.where(is_end, 0.1, 1.0), 0.0)
    captions = optax.softmax_cross_entropy_with_integer_labels(
        logits_at(module, hidden, batch.caption_rows), batch.captions
    )
    loss = (losses * weight).sum() / weight.sum() + CAPTION_WEIGHT * captions.mean()
    return loss, right


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
        graph, parameters = nnx.split(module)
        groups = groups_of_layers(encoder.config, settings.sparse_layers)
        optimizer = make_optimizer(settings, self.steps)
        self.state = _first_state(parameters, optimizer)
        plans = encoder.plans

        def loss(parameters: Any, batch: Batch) -> tuple[Array, Array]:
            return loss_and_correct(nnx.merge(graph, parameters), batch, plans, groups)

        self._train = train_step(loss, optimizer)
        self._evaluate = jax.jit(loss)

    def step(self, index: int) -> dict[str, float]:
        """One batch of scenes."""
        batch = batch_of_step(self._settings, self._encoder, index)
        self.state, loss, right = self._train(self.state, batch)
        return {"loss": float(loss), **shares(np.asarray(right), batch.tasks)}

    def evaluate(self) -> dict[str, float]:
        """Share of right answers about held-out scenes of eight images."""
        random = np.random.default_rng([self._settings.seed, 3])
        batch = self._encoder.batch(random, 24, 8, 12, test=True)
        _, right = self._evaluate(self.state.parameters, batch)
        return shares(np.asarray(right), batch.tasks)


def make_optimizer(settings: Settings, steps: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients; the learning rate rises, then falls along a cosine."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, min(settings.warmup_steps, steps), steps
    )
    matrices = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay, mask=matrices),
    )


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
