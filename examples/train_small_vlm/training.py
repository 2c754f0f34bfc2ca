"""Optimizer, stages, and the training loop, which continues from its last checkpoint."""

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
from jax.tree_util import keystr
from jaxtyping import Array

from bsjax.unfinished import write_text

from .batches import Batch, Encoder, ImageBatch
from .files import MERGE_SIZE, PATCH_SIZE
from .forward import SharedRows, groups_of_layers, run_tower
from .loss import loss_and_correct, new_readers
from .questions import TASKS
from .scenes import COLOURS, CONTENTS

IMAGES_PER_BATCH = 32
TOWER_IMAGES_PER_BATCH = 128

TOWER_RATE = 0.1
"""Learning rate of the tower relative to the language model's, low to keep what it has learned."""

TOWER_FALL = ((0.5, 1.0), (1.0, 0.0))
MODEL_FALL = ((0.24, 1.0), (0.3, 0.3), (1.0, 0.0))
"""Pairs (share of the steps, learning rate relative to its peak); linear in between. The rate is
large until the model has learned which image a question is about, and smaller for learning to
compare and count."""

_UNIT = PATCH_SIZE * MERGE_SIZE


@dataclass(frozen=True)
class Settings:
    """What differs between training runs; everything else is fixed in the code.

    Attributes:
      tower_steps: number of batches of single images that the vision tower is first trained on.
      steps: number of batches of prompts that the whole model is then trained on.
      learning_rate: peak learning rate of matrices, which Muon optimizes. The rate rises to the
        peak over `warmup_steps`, stays there, and falls (`TOWER_FALL`, `MODEL_FALL`).
      adam_learning_rate: peak learning rate of all other parameters, with the same schedule.
      warmup_steps: number of steps over which learning rates rise.
      weight_decay: weight decay of matrices.
      seed: seed for parameters and data.
      sparse_layers: layers in which all heads are INTRA_IMAGE_SINK from the start.
    """

    tower_steps: int = 1000
    steps: int = 2600
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
      until: share of the steps after which the phase ends.
      images: numbers of images in its prompts.
      tasks: tasks of its questions.
    """

    until: float
    images: tuple[int, ...]
    tasks: tuple[str, ...] = tuple(TASKS)


PHASES = (
    # First, the model learns which image a question is about, with few images.
    Phase(0.06, (2, 3), ("content", "colour", "find")),
    Phase(0.3, (2, 3)),
    Phase(0.5, (2, 3, 5)),
    Phase(0.75, (3, 5, 8)),
    Phase(1.0, (3, 5, 8, 12)),
)


def batch_of_step(settings: Settings, encoder: Encoder, step: int) -> Batch:
    """The batch of a step. It depends on seed and step only, so that a run can be continued."""
    phase = next(phase for phase in PHASES if step < phase.until * settings.steps)
    random = np.random.default_rng([settings.seed, 2, step])
    images = phase.images[random.integers(len(phase.images))]
    prompts, questions = IMAGES_PER_BATCH // images, min(2 * images, 12)
    return encoder.batch(random, prompts, images, questions, tasks=phase.tasks)


class Stage(Protocol):
    """A part of the training that `run_stage` runs step by step."""

    steps: int
    state: State

    def step(self, index: int) -> dict[str, float]:
        """One step; returns what to log, to be averaged over steps."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Results that are logged less often than the training loss."""
        ...


class TowerStage:
    """Trains the vision tower alone: content and colour of single images, from their mean feature.

    The language model then starts with features that already describe an image.
    """

    def __init__(self, module: nnx.Module, settings: Settings, encoder: Encoder) -> None:
        self.steps = settings.tower_steps
        self._settings, self._encoder = settings, encoder
        graph, tower = nnx.split(module.visual)
        width = encoder.config.vision_config.out_hidden_size
        outputs = len(CONTENTS) + len(COLOURS)
        random = np.random.default_rng([settings.seed, 4])
        head = jnp.asarray(random.normal(0, width**-0.5, (width, outputs)), jnp.float32)
        optimizer = make_optimizer(settings, self.steps, TOWER_FALL)
        parameters = (tower, head)
        self.state = _first_state(parameters, optimizer)
        plans = encoder.plans

        def loss(parameters: Any, batch: ImageBatch) -> tuple[Array, Array]:
            tower, head = parameters
            encode = partial(run_tower, nnx.merge(graph, tower))
            plan_of_image = jax.tree.map(lambda part: jnp.asarray(part)[batch.size_class], plans)
            features = jax.vmap(encode)(batch.pixel_values, plan_of_image)
            # Rows of padding patches come last in every image.
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
        """Nothing: training images are never repeated, so their accuracy in the log suffices."""
        return {}


class ModelStage:
    """Trains the whole model on questions about scenes."""

    def __init__(self, module: nnx.Module, settings: Settings, encoder: Encoder) -> None:
        self.steps = settings.steps
        self._settings, self._encoder = settings, encoder
        graph, model = nnx.split(module)
        model = quiet_start(model, encoder.config.text_config.hidden_size)
        parameters = (model, new_readers(encoder.config, settings.seed))
        groups = groups_of_layers(encoder.config, settings.sparse_layers)
        optimizer = make_optimizer(settings, self.steps, MODEL_FALL)
        self.state = _first_state(parameters, optimizer)
        plans = encoder.plans

        def loss(parameters: Any, inputs: tuple[Batch, SharedRows | None]) -> tuple[Array, Any]:
            model, readers = parameters
            batch, shared = inputs
            return loss_and_correct(nnx.merge(graph, model), readers, batch, plans, groups, shared)

        self._train = train_step(loss, optimizer)
        self._evaluate = jax.jit(loss)

    def step(self, index: int) -> dict[str, float]:
        """One batch of scenes."""
        batch = batch_of_step(self._settings, self._encoder, index)
        self.state, loss, (right, read) = self._train(self.state, self._inputs(batch))
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
        """The share of right answers to questions about held-out scenes of eight images."""
        random = np.random.default_rng([self._settings.seed, 3])
        batch = self._encoder.batch(random, 24, 8, 12, test=True)
        _, (right, _) = self._evaluate(self.state.parameters, self._inputs(batch))
        return shares(np.asarray(right), batch.tasks)

    def _inputs(self, batch: Batch) -> tuple[Batch, SharedRows | None]:
        """A batch and, where there is a GPU, what bsjax's kernels need."""
        if jax.default_backend() != "gpu":
            return batch, None
        return batch, SharedRows.of(batch, self._encoder.config)


def make_optimizer(
    settings: Settings, steps: int, fall: Sequence[tuple[float, float]]
) -> optax.GradientTransformation:
    """Muon for matrices, Adam for the rest.

    When the whole model is trained, the vision tower changes slowly.

    Args:
      settings: learning rates, warmup and weight decay.
      steps: number of steps in the stage.
      fall: pairs (share of the steps, learning rate relative to its peak).
    """

    def rate(peak: float) -> optax.Schedule:
        first, *rest = (int(share * steps) for share, _ in fall)
        boundaries = [min(settings.warmup_steps, first), first, *rest[:-1]]
        lengths = np.diff([first, *rest])
        values = [peak * factor for _, factor in fall]
        parts = [
            optax.linear_schedule(0.0, peak, boundaries[0]),
            optax.constant_schedule(peak),
            *map(optax.linear_schedule, values, values[1:], lengths.tolist()),
        ]
        return optax.join_schedules(parts, boundaries)

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
    """The matrix axes of a kernel, stacked over layers or not; None for other parameters."""
    if "kernel" not in keystr(path):
        return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)


def quiet_start(parameters: Any, width: int) -> Any:
    """Initial parameters: layers add nothing to their input, and embeddings are large.

    Otherwise the random output of the layers would obscure which token a row is and which letter an
    image has.

    Args:
      parameters: the model's parameters as created.
      width: the width of its hidden states.
    """

    def start(path: Any, leaf: Array) -> Array:
        name = keystr(path)
        if "visual" in name:
            return leaf
        if "o_proj" in name or "down_proj" in name:
            return jnp.zeros_like(leaf)
        if "embed_tokens" in name:
            return leaf * width**0.5
        # The table is also the output layer; dividing the norm keeps the logits as they were.
        return leaf / width**0.5 if "'language_model']['norm']" in name else leaf

    return jax.tree_util.tree_map_with_path(start, parameters)


def _first_state(parameters: Any, optimizer: optax.GradientTransformation) -> State:
    """The state before the first step, with a copy of the parameters, which steps overwrite."""
    return State(jax.tree.map(jnp.copy, parameters), optimizer.init(parameters))


def train_step(loss: Callable[..., Any], optimizer: optax.GradientTransformation) -> Any:
    """A jitted function from (state, batch) to (state, loss, auxiliary output of the loss)."""

    @partial(jax.jit, donate_argnums=0)
    def train(state: State, batch: Any) -> tuple[State, Array, Any]:
        (value, auxiliary), gradients = jax.value_and_grad(loss, has_aux=True)(
            state.parameters, batch
        )
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        return (
            State(optax.apply_updates(state.parameters, updates), optimizer_state),
            value,
            auxiliary,
        )

    return train


def shares(right: np.ndarray, tasks: np.ndarray) -> dict[str, float]:
    """The share of right answers, over all questions and for each task that occurs."""
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

    Writes checkpoints, and a line to `folder/log.jsonl` every `log_every` steps. Every fifth line
    and the last line also have the results of `stage.evaluate`.

    Args:
      stage: the stage; its state is updated in place.
      folder: folder for checkpoints and log.
      log_every: steps between lines of the log.
      save_every: steps between checkpoints.
      stop_after: a step after which to stop as if interrupted, for tests.
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
    """The checkpoints of a stage: of every thousandth step, and the last two."""
    return orbax.checkpoint.CheckpointManager(
        (folder / "checkpoints").absolute(),
        options=orbax.checkpoint.CheckpointManagerOptions(max_to_keep=2, keep_period=1000),
    )


def restore(stage: Stage, manager: orbax.checkpoint.CheckpointManager, step: int) -> None:
    """Puts a stage into the state it had after a step."""
    stage.state = manager.restore(step, args=orbax.checkpoint.args.StandardRestore(stage.state))


def _means(entries: list[dict[str, float]]) -> dict[str, float]:
    """The mean for each name, over the entries that have it."""
    names = dict.fromkeys(name for entry in entries for name in entry)
    return {
        name: round(float(np.mean([entry[name] for entry in entries if name in entry])), 4)
        for name in names
    }


def check_settings(file: Path, settings: Settings) -> None:
    """Writes the settings of a new run, or refuses to continue a run with other settings.

    A file that is torn, for instance by a power failure, is written again.

    Raises:
      SystemExit: the file belongs to a run with other settings.
    """
    text = json.dumps(asdict(settings), indent=2) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (RecursionError, ValueError):
            print(f"note: {file} is torn; it is written again with this run's settings")
        else:
            if known != json.loads(text):
                raise SystemExit(
                    f"error: {file} is from a run with other settings. Choose another folder, or "
                    "delete it."
                )
            return
    write_text(file, text)


def read_log(log_file: Path) -> list[dict[str, Any]]:
    """The lines of a log; says which are torn, and leaves them out."""
    if not log_file.exists():
        return []
    lines = []
    text = log_file.read_text(encoding="utf-8", errors="replace")
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if type(entry["step"]) is not int:
                raise TypeError
            lines.append(entry)
        except (KeyError, RecursionError, TypeError, ValueError):
            print(f"note: line {number} of {log_file} is torn and left out")
    return lines


def _lines_until(log_file: Path, step: int) -> list[dict[str, Any]]:
    """The log up to a step. Later lines are removed from the file: their steps will run again."""
    if not log_file.exists():
        return []
    kept = [line for line in read_log(log_file) if line["step"] <= step]
    write_text(log_file, "".join(json.dumps(line) + "\n" for line in kept))
    return kept
