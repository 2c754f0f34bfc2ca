"""Measures accuracy and FLOPs of the small trained model, dense and sparse.

    python -m examples.evaluate [--checkpoint FOLDER] [--profile FILE] [--scenes N] [--hybrid RUN]
        [--resume FILE]

Prompts are held out from training and profiling; one set has as many images as were profiled, the
other more. These head categories are evaluated on them:

- categories at several FLOPs budgets, chosen by the one-shot rule (per-head threshold, by output
  error and by attention mass) and by refinement end to end;
- refinement on prompts of two and three images, to see whether it carries over to more images;
- a profile of the model, as `make profile` writes it;
- controls, which must lose accuracy if the prompts can show a loss: the profile's categories dealt
  to other heads of the model or of the same layer (at the same FLOPs), and one category for all
  heads;
- with `--hybrid`, a model trained with sparse layers, and the dense-trained one at equal FLOPs.

`--resume` keeps everything measured, so that an interrupted run can be continued.

Writes docs/evaluation.md, docs/evaluation.png and benchmarks/results/evaluation.json.
"""

import argparse
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int8, Int32

import bsjax
from bsjax.attention import resolve_backend
from bsjax.masks.categories import HeadCategory
from bsjax.profiling import Evaluator, Measurements, measure, refine
from bsjax.profiling.state import NO_STATE, State, conditions_of

from .arguments import whole
from .evaluation_report import plot, report
from .shipped import CHECKPOINT, PROFILE, converted
from .train_small_vlm.conversations import PROFILED_IMAGES, draw_conversations, messages
from .train_small_vlm.held_out import HeldOut
from .train_small_vlm.questions import TASKS

ROOT = Path(__file__).parent.parent
BUDGETS = (0.25, 0.41, 0.5, 0.6, 0.7)
FEWER_IMAGES = (2, 3)
MORE_IMAGES = (9, 10, 11, 12)
DEALS = 3
RESAMPLES = 4000
# Few rounds of correction: there are many budgets to refine to, and few heads.
REFINING_ROUNDS = 2
REFINING_MARGIN = 8

Categories = Int8[np.ndarray, "layers heads"]
Right = Bool[np.ndarray, "scenes questions"]
"""Which prompts are answered right."""


@dataclass(frozen=True)
class Condition:
    """Head categories to evaluate.

    Attributes:
      kind: how they were chosen; a line of the plot, a section of the tables.
      name: distinguishes conditions of one kind.
      categories: the category of every head.
    """

    kind: str
    name: str
    categories: Categories


def one_shot_conditions(measurements: Measurements) -> Iterator[Condition]:
    """The one-shot rule at all budgets that it reaches, by both criteria."""
    for kind, criterion in (("one-shot, error", "output_error"), ("one-shot, mass", "mass")):
        for budget in BUDGETS:
            try:
                categories = measurements.one_shot(target_reduction=budget, criterion=criterion)
            except bsjax.ProfileError:
                continue
            yield Condition(kind, f"at least {budget:.0%}", categories)


def refined_conditions(
    kind: str,
    measurements: Measurements,
    evaluator: Evaluator,
    budgets: Sequence[float] = BUDGETS,
) -> Iterator[Condition]:
    """Refinement at all budgets that it reaches, on the evaluator's prompts."""
    for budget in budgets:
        try:
            refined = refine(
                None,
                measurements,
                evaluator,
                target_reduction=budget,
                rounds=REFINING_ROUNDS,
                margin=REFINING_MARGIN,
            )
        except bsjax.ProfileError:
            continue
        yield Condition(kind, f"at least {budget:.0%}", refined.categories)


def control_conditions(categories: Categories, seed: int) -> Iterator[Condition]:
    """The same categories dealt to other heads, and one category for all.

    Heads of the last layer, whose categories change nothing, keep theirs.
    """
    random = np.random.default_rng([seed, 8])
    for number in range(DEALS):
        dealt = categories.copy()
        dealt[:-1] = random.permutation(categories[:-1].ravel()).reshape(categories[:-1].shape)
        yield Condition("dealt at random", f"deal {number + 1}", dealt)
    for number in range(DEALS):
        dealt = random.permuted(categories, axis=1)
        yield Condition("dealt within layers", f"deal {number + 1}", dealt)
    for category in (
        HeadCategory.INTRA_IMAGE_SINK,
        HeadCategory.INTRA_IMAGE,
        HeadCategory.SINK,
    ):
        yield Condition("one for all heads", category.name, np.full_like(categories, category))


def evaluate(
    prompts: HeldOut,
    conditions: list[Condition],
    seed: int,
    baseline: Right | None = None,
    state: State = NO_STATE,
) -> list[dict[str, Any]]:
    """One row per condition; changes are relative to `baseline`, or to the first condition."""
    rows = []
    for condition in conditions:
        start = time.perf_counter()
        right = answered(prompts, condition.categories, state)
        baseline = right if baseline is None else baseline
        rows.append(
            {
                "kind": condition.kind,
                "name": condition.name,
                "reduction": prompts.reduction(condition.categories),
                **accuracies(right, baseline, prompts.tasks, seed),
                "categories": condition.categories.tolist(),
                "right": ["".join(map(str, scene)) for scene in right.astype(int).tolist()],
            }
        )
        print(
            f"{condition.kind:26} {condition.name:18} FLOPs -{rows[-1]['reduction']:.1%}  "
            f"{rows[-1]['accuracy']['all'][0]:.2%}  {rows[-1]['change'][0]:+.2%}  "
            f"({time.perf_counter() - start:.0f} s)",
            flush=True,
        )
    return rows


def answered(prompts: HeldOut, categories: Categories, state: State) -> Right:
    """Which prompts are answered right, from the state if it has the result."""
    name = hashlib.sha256(f"{prompts.name} {categories.tolist()}".encode()).hexdigest()
    return state.recall(f"right {name}", lambda: {"right": prompts.right(categories)})["right"]


def accuracies(
    right: Right, baseline: Right, tasks: Int32[np.ndarray, "scenes questions"], seed: int
) -> dict[str, Any]:
    """Accuracy and its change, over all prompts and for each task, with 95 % confidence intervals.

    Questions about one scene are not independent, so the bootstrap resamples scenes, and the change
    is computed prompt by prompt. If all scenes have the same outcome, resampling has no spread. The
    interval then extends to the largest rate of another outcome that is still compatible with not
    having seen it once in that many scenes.
    """
    random = np.random.default_rng([seed, 9])
    scenes = len(right)
    weights = random.multinomial(scenes, np.full(scenes, 1 / scenes), RESAMPLES)

    def interval(values: np.ndarray, counted: np.ndarray, least: float = 0.0) -> list[float]:
        totals, counts = (values * counted).sum(axis=1), counted.sum(axis=1)
        mean = float(totals.sum() / counts.sum())
        if (values[counted] == mean).all():
            unseen = 1 - 0.025 ** (1 / np.count_nonzero(counts))
            return [mean, max(mean - unseen, least), min(mean + unseen, 1.0)]
        drawn = (weights @ totals) / np.maximum(weights @ counts, 1)
        return [mean, *np.quantile(drawn, (0.025, 0.975)).tolist()]

    everything = np.ones_like(tasks, bool)
    by_task = {name: tasks == i for i, name in enumerate(TASKS) if (tasks == i).any()}
    chosen = {"all": everything} | by_task
    change = right.astype(float) - baseline
    return {
        "accuracy": {name: interval(right.astype(float), which) for name, which in chosen.items()},
        "change": interval(change, everything, -1.0),
        "change_by_task": {name: interval(change, which, -1.0) for name, which in by_task.items()},
    }


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--profile", default=PROFILE, help="a file, or a shipped profile's name")
    parser.add_argument(
        "--scenes",
        type=whole(1),
        default=300,
        help="number of scenes in each set; six prompts per scene",
    )
    parser.add_argument(
        "--calibration",
        type=whole(1),
        default=64,
        help="number of prompts that categories are chosen on",
    )
    parser.add_argument("--hybrid", type=Path, help="folder of a training run with sparse layers")
    parser.add_argument("--resume", type=Path, help="a file that keeps everything measured")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--seed", type=whole(0), default=0)
    options = parser.parse_args()

    try:
        results = run(options)
    except bsjax.BsjaxError as error:
        raise SystemExit(f"error: {error}") from None
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / "evaluation.json"
    path.write_text(json.dumps(results) + "\n", encoding="utf-8")
    options.output.mkdir(parents=True, exist_ok=True)
    picture = options.output / "evaluation.png"
    plot(results, picture)
    page = options.output / "evaluation.md"
    page.write_text(report(results, picture.name), encoding="utf-8")
    print(f"{page}\n{picture}\n{path}")


def _sources() -> str:
    """A hash of the code that draws, asks and answers."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "train_small_vlm").glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Chooses categories, evaluates them, and returns everything measured."""
    model = converted(options.checkpoint)
    profile = bsjax.Profile.resolve(options.profile, model)
    assert profile is not None
    hybrid = None if options.hybrid is None else Hybrid.of(options.hybrid)
    conditions = conditions_of(model, resolve_backend("auto"))
    state = State(options.resume, {**conditions, "examples": _sources()})

    def calibrated(images: Sequence[int]) -> tuple[Measurements, Evaluator]:
        drawn = draw_conversations(options.calibration, images, seed=options.seed + 1)
        samples = [messages(scene, question) for scene, question in drawn]
        return (
            measure(model, samples, sinks=profile.sinks, state=state),
            Evaluator(model, samples, answer_tokens=2, sinks=profile.sinks, state=state),
        )

    measurements, evaluator = calibrated(PROFILED_IMAGES)
    dense = Condition("dense", "", np.zeros_like(profile.categories))
    profile_name = Path(options.profile).name.removesuffix(".json")
    conditions = [
        dense,
        Condition("profile", profile_name, profile.categories),
        *one_shot_conditions(measurements),
        *refined_conditions("refined", measurements, evaluator),
        *refined_conditions("refined on 2 and 3 images", *calibrated(FEWER_IMAGES)),
        *control_conditions(profile.categories, options.seed),
    ]
    if hybrid is not None:
        saved = measurements.reduction(hybrid.categories)
        conditions += refined_conditions("at the hybrid's FLOPs", measurements, evaluator, [saved])

    evidence = profile.evidence
    results: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": jax.devices()[0].device_kind,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "bsjax": bsjax.__version__,
            "jax": jax.__version__,
            "python": platform.python_version(),
        },
        "checkpoint_fingerprint": model.fingerprint,
        "profile": {
            "name": profile_name,
            "samples": evidence.sample_count if evidence else 0,
            "source": profile.source,
            "fingerprint": evidence.sample_fingerprint if evidence else None,
        },
        "calibration_prompts": options.calibration,
        "refining": {"rounds": REFINING_ROUNDS, "margin": REFINING_MARGIN},
        "seed": options.seed,
        "hybrid": None if hybrid is None else hybrid.description,
        "sets": {},
    }
    for name, images in {"as profiled": PROFILED_IMAGES, "more images": MORE_IMAGES}.items():
        drawn_alike = partial(HeldOut, scenes=options.scenes, images=images, seed=options.seed)
        prompts = drawn_alike(model, sinks=profile.sinks)
        print(f"\n{name}: {prompts.tasks.size} prompts of {images} images", flush=True)
        rows = evaluate(prompts, conditions, options.seed, state=state)
        if hybrid is not None:
            trained = Condition("hybrid", hybrid.name, hybrid.categories)
            rows += evaluate(
                drawn_alike(hybrid.model, sinks=hybrid.sinks),
                [trained],
                options.seed,
                answered(prompts, dense.categories, state),
                state,
            )
        results["sets"][name] = {
            "images": list(images),
            "prompts": int(prompts.tasks.size),
            "tasks": prompts.tasks.tolist(),
            "commonest": prompts.commonest(),
            "rows": rows,
        }
    return results


@dataclass(frozen=True)
class Hybrid:
    """A model with layers that were INTRA_IMAGE_SINK from the first training step on."""

    model: bsjax.LoadedModel
    categories: Categories
    sinks: bsjax.Sinks
    sparse_layers: tuple[int, ...]

    @classmethod
    def of(cls, run: Path) -> "Hybrid":
        """Reads the result of a training run; its settings say which layers are sparse."""
        try:
            settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
            layers = tuple(settings["sparse_layers"])
        except (OSError, ValueError, KeyError, TypeError):
            raise SystemExit(
                f"error: {run} does not have the settings.json of a training run."
            ) from None
        if not layers:
            raise SystemExit(f"error: {run} was trained without sparse layers.")
        model = converted(run / "checkpoint")
        text = model.config.get_text_config()
        categories = np.zeros((text.num_hidden_layers, text.num_attention_heads), np.int8)
        categories[list(layers)] = HeadCategory.INTRA_IMAGE_SINK
        # The model was trained with the first tokens of images as sinks.
        return cls(model, categories, bsjax.Sinks(), layers)

    @property
    def name(self) -> str:
        """Its sparse layers, in words."""
        return f"layers {', '.join(map(str, self.sparse_layers))}"

    @property
    def description(self) -> dict[str, Any]:
        """Its description in the results."""
        return {
            "sparse_layers": list(self.sparse_layers),
            "checkpoint_fingerprint": self.model.fingerprint,
        }


if __name__ == "__main__":
    main()
