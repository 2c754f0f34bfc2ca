"""The second stage: categories corrected by their effect on the model's answers, end to end.

The one-shot rule looks at each head's own output. How much an error there changes the answer
differs between heads and layers, and errors compound. Refinement therefore takes four steps:

1. It measures the *damage* of moving one head to a sparse category while all others are dense:
   KL(dense || sparse) of next-token distributions. If `max_evaluations` does not allow measuring
   all damages, it measures those near the one-shot threshold and estimates the others as a multiple
   of the squared one-shot error, since KL grows with the square of a small perturbation.
2. It orders the moves of all heads by damage per FLOP saved. They form a nested path of categories
   from dense to the sparsest (`bsjax.profiling.knapsack`).
3. It follows the path until the wanted share of FLOPs is saved or, by bisection with measured KL,
   as far as the KL stays within its limit.
4. Damages do not add up exactly, so it measures the heads at the margin again, in context: moves
   back towards dense and moves on to sparser categories, one at a time. It exchanges the moves back
   that help most per FLOP for the moves on that hurt least, as long as the measured KL falls and
   the FLOPs budget is kept. It always makes moves on that lower the KL.

The cost is at most `max_evaluations` arrays of categories, each of which takes one prefill of every
sample: three per head in step 1 (fewer where a category saves nothing), about ten in step 3, and in
step 4 twice `margin` and a few more for each of the `rounds`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int8

from bsjax.checkpoint.loading import LoadedModel
from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import total_flops
from bsjax.profiling import selection
from bsjax.profiling.evaluation import Comparison, Evaluator
from bsjax.profiling.groups import SPARSE_CATEGORIES
from bsjax.profiling.knapsack import Move, apply_moves, greedy_path, hull, moves_of
from bsjax.profiling.measurements import Measurements
from bsjax.profiling.ordered_samples import Messages, OrderedSamples
from bsjax.profiling.settings import Divergence, Reduction, Settings
from bsjax.progress import Progress, no_progress
from bsjax.samples import Samples

# Share of the evaluations reserved for correction in context if not all damages can be measured.
_SHARE_OF_CORRECTION = 0.25


class Damage(NamedTuple):
    """End-to-end damage of each head in each of `SPARSE_CATEGORIES` while all others are dense.

    Attributes:
      kl: KL(dense || sparse) in nats; 0 where a category saves nothing.
      measured: whether it was measured; if not, it is estimated from the one-shot error.
    """

    kl: Float64[np.ndarray, "layers heads categories"]
    measured: Bool[np.ndarray, "layers heads categories"]


@dataclass(frozen=True, eq=False)
class Refinement:
    """Categories corrected end to end, and the whole path that they were found on.

    Attributes:
      categories: the resulting categories.
      reduction: the share of attention FLOPs that they save over the samples.
      kl: their KL(dense || sparse) over the samples, in nats.
      top1: their top-1 agreement over the samples.
      damage: damage of every head.
      path: moves from dense to the sparsest, least damage per FLOP first.
      numbers: what was measured on the way, by name, as in the `refinement` of a profile.
    """

    categories: Int8[np.ndarray, "layers heads"]
    reduction: float
    kl: float
    top1: float
    damage: Damage
    path: tuple[Move, ...]
    numbers: dict[str, int | float]
    _measurements: Measurements

    def at(self, reduction: float) -> Int8[np.ndarray, "layers heads"]:
        """The categories of the path that save at least this share of attention FLOPs.

        They follow from damages alone, without correction in context. To correct them as well, call
        `refine` with the same evaluator and another budget.

        Raises:
          ProfileError: the path does not reach this share; the message says how far it goes.
        """
        return _at(self.path, self._measurements, Reduction(reduction))


def refine(
    model: LoadedModel | None,
    measurements: Measurements,
    samples: Sequence[Messages] | Samples | OrderedSamples | Evaluator,
    *,
    target_reduction: float | None = None,
    max_kl: float | None = None,
    criterion: str = Settings.criterion,
    quantile: float = Settings.quantile,
    answer_tokens: int = Settings.answer_tokens,
    max_evaluations: int = Settings.max_evaluations,
    rounds: int = Settings.rounds,
    margin: int = Settings.margin,
    backend: str = "auto",
    progress: Progress = no_progress,
) -> Refinement:
    """Chooses categories by their measured effect on the model's answers.

    Args:
      model: from `bsjax.load`; not used, and may be None, if an evaluator is given.
      measurements: measurements of the model, from `measure`.
      samples: conversations to measure on, usually those of `measurements`; or an `Evaluator` made
        with the sinks of the measurements. An evaluator remembers what it has compared, so that
        refining to several budgets measures damages once.
      target_reduction: save at least this share of attention FLOPs over the measurements' samples.
      max_kl: instead, save as much as possible with a KL(dense || sparse) of at most this many
        nats.
      criterion: criterion of the one-shot rule, which decides which damages to measure if not all
        can be measured. For the same `target_reduction`, the result is never worse on these samples
        than the categories of the one-shot rule.
      quantile: quantile of the one-shot rule.
      answer_tokens: as for `Evaluator`; not used if one is given.
      max_evaluations: the largest number of arrays of categories to compare, at least 2. Each takes
        one prefill per sample, unless the evaluator remembers it.
      rounds: the largest number of rounds of correction in context.
      margin: how many heads to measure in each direction in a round.
      backend: backend of the attention; not used if an evaluator is given.
      progress: called after every evaluation, as `progress(stage, done, total)`.

    Raises:
      ProfileError: not exactly one of the two budgets is given, a value is out of range, the
        evaluator has other sinks than the measurements, or the reduction cannot be reached.
    """
    if (target_reduction is None) == (max_kl is None):
        raise ProfileError("Refining needs a target_reduction or a max_kl, and not both.")
    settings = Settings.of(
        target_reduction=target_reduction,
        max_kl=max_kl,
        refine=True,
        criterion=criterion,
        quantile=quantile,
        answer_tokens=answer_tokens,
        max_evaluations=max_evaluations,
        rounds=rounds,
        margin=margin,
    )
    if isinstance(samples, Evaluator):
        evaluator = samples
    elif model is None:
        raise ProfileError("model is None: refining on samples needs a model or an Evaluator.")
    else:
        evaluator = Evaluator(
            model,
            samples,
            answer_tokens=answer_tokens,
            sinks=measurements.sinks,
            backend=backend,
            progress=progress,
        )
    return refine_with(settings, measurements, evaluator, progress)


def refine_with(
    settings: Settings, measurements: Measurements, evaluator: Evaluator, progress: Progress
) -> Refinement:
    """Like `refine`, with its settings in one object. The budget must not be a threshold.

    Raises:
      ProfileError: see `refine`.
    """
    if evaluator.sinks != measurements.sinks:
        raise ProfileError(
            f"The evaluator's sinks are {evaluator.sinks}, but those of the measurements are "
            f"{measurements.sinks}: make it with sinks=measurements.sinks."
        )
    refiner = _Refiner(settings, measurements, evaluator, progress)
    if isinstance(settings.budget, Divergence):
        return refiner.within_divergence(settings.budget)
    assert isinstance(settings.budget, Reduction)
    return refiner.at_reduction(settings.budget)


class _Refiner:
    """One call of `refine`."""

    def __init__(
        self,
        settings: Settings,
        measurements: Measurements,
        evaluator: Evaluator,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._measurements = measurements
        self._evaluator = evaluator
        self._progress = progress
        self._one_shot_damage = measurements.damage(settings.criterion, settings.quantile)
        # Categories compared so far, whether the evaluator remembered them or not, because the
        # choice must not depend on what it remembers.
        self._asked: set[bytes] = set()

    def at_reduction(self, budget: Reduction) -> Refinement:
        """Categories that save at least the wanted share of FLOPs."""
        one_shot, threshold = selection.one_shot(
            self._one_shot_damage, self._measurements.flops, budget
        )
        damage = self._damages(threshold, afterwards=2)
        moves = greedy_path(damage.kl, self._measurements.flops)
        categories = _at(moves, self._measurements, budget)
        kl_path, kl_one_shot = self._kl(categories), self._kl(one_shot)
        if kl_one_shot < kl_path:
            categories = one_shot
        categories, rounds = self._corrected(categories, damage, budget.share, kept=0)
        numbers = {
            "target_reduction": budget.share,
            "kl_path": kl_path,
            "kl_one_shot": kl_one_shot,
        }
        return self._result(categories, damage, moves, rounds, numbers)

    def within_divergence(self, budget: Divergence) -> Refinement:
        """Categories that save as much as possible within a divergence."""
        # Bisection repeatedly halves a path of at most three moves per head.
        bisection = int(self._measurements.error[0].size).bit_length() + 1
        damage = self._damages(float(np.median(self._one_shot_damage)), afterwards=bisection)
        moves = greedy_path(damage.kl, self._measurements.flops)
        dense = np.zeros(damage.kl.shape[:2], np.int8)
        categories = self._farthest(moves, dense, budget.nats)
        reached = self._measurements.reduction(categories)
        numbers = {
            "max_kl": budget.nats,
            "kl_path": self._kl(categories),
            "reduction_path": reached,
        }
        categories, rounds = self._corrected(categories, damage, reached, kept=bisection)
        # Correction has lowered the KL, which leaves room for more moves.
        saved = self._saved(categories)
        left = tuple(
            move
            for move in moves
            if self._saved_by(move.layer, move.after) > saved[move.layer, move.head]
        )
        categories = self._farthest(left, categories, budget.nats)
        return self._result(categories, damage, moves, rounds, numbers)

    def _result(
        self,
        categories: Int8[np.ndarray, "layers heads"],
        damage: Damage,
        moves: tuple[Move, ...],
        rounds: int,
        numbers: Mapping[str, int | float],
    ) -> Refinement:
        final = self._compare(categories)
        reduction = self._measurements.reduction(categories)
        numbers = {
            **numbers,
            "reduction": reduction,
            "kl": final.kl,
            "top_1_agreement": final.top1,
            "correction_rounds": rounds,
            "evaluations": len(self._asked),
            "max_evaluations": self._settings.max_evaluations,
            "samples": len(self._evaluator.fingerprints),
            "answer_tokens": self._evaluator.answer_tokens,
            "damages_measured": int(damage.measured.sum()),
            "damages_estimated": int(((damage.kl > 0) & ~damage.measured).sum()),
        }
        return Refinement(
            categories, reduction, final.kl, final.top1, damage, moves, numbers, self._measurements
        )

    def _left(self) -> int:
        """How many more arrays of categories may be compared."""
        return self._settings.max_evaluations - len(self._asked)

    def _damages(self, threshold: float, afterwards: int) -> Damage:
        """Damages of all moves of single heads that save FLOPs.

        Args:
          threshold: threshold of the one-shot rule; damages near it are measured first.
          afterwards: number of evaluations to leave for later steps, if there are that many.
        """
        one_shot = self._one_shot_damage
        flops = self._measurements.flops
        layers, heads, _ = one_shot.shape
        candidates = [
            (layer, head, index)
            for layer in range(layers)
            for head in range(heads)
            for index, category in enumerate(SPARSE_CATEGORIES)
            if flops[layer, category] < flops[layer, HeadCategory.DENSE]
        ]
        allowed = max(0, self._settings.max_evaluations - afterwards)
        if len(candidates) > allowed:
            allowed = min(
                allowed, round(self._settings.max_evaluations * (1 - _SHARE_OF_CORRECTION))
            )
        # Far from the threshold a head ends up sparse, or dense, whatever its exact damage.
        tiny = np.finfo(np.float64).tiny
        nearest = sorted(
            candidates,
            key=lambda place: abs(np.log(one_shot[place] + tiny) - np.log(threshold + tiny)),
        )[:allowed]

        kl = np.zeros(one_shot.shape)
        measured = np.zeros(one_shot.shape, bool)
        stage = "measuring damage"
        self._progress(stage, 0, len(nearest))
        for done, place in enumerate(sorted(nearest)):
            layer, head, index = place
            categories = np.zeros((layers, heads), np.int8)
            categories[layer, head] = SPARSE_CATEGORIES[index]
            kl[place] = self._kl(categories)
            measured[place] = True
            self._progress(stage, done + 1, len(nearest))
        error = self._measurements.error[self._measurements.several_images]
        proxy = (error.astype(np.float64) ** 2).mean(axis=0)
        known = measured & (proxy > 0)
        factor = np.median(kl[known] / proxy[known]) if known.any() else 1.0
        for place in set(candidates) - set(nearest):
            kl[place] = factor * proxy[place]
        return Damage(kl, measured)

    def _farthest(
        self, moves: tuple[Move, ...], start: Int8[np.ndarray, "layers heads"], max_kl: float
    ) -> Int8[np.ndarray, "layers heads"]:
        """Makes as many moves, in order, as keep the measured KL within `max_kl`.

        The number is found by bisection, since KL grows along the moves, except for small dips. One
        evaluation is reserved for `start`.
        """
        within, beyond = 0, len(moves) + 1
        while beyond - within > 1 and self._left() > 1:
            middle = (within + beyond) // 2
            if self._kl(apply_moves(moves[:middle], start)) <= max_kl:
                within = middle
            else:
                beyond = middle
        return apply_moves(moves[:within], start)

    def _corrected(
        self, categories: np.ndarray, damage: Damage, target: float, kept: int
    ) -> tuple[Int8[np.ndarray, "layers heads"], int]:
        """Exchanges moves at the margin while the measured KL falls.

        Args:
          categories: the categories to start from.
          damage: damage of every head.
          target: share of attention FLOPs to keep saving.
          kept: number of evaluations to leave for later steps, if there are that many.

        Returns:
          The corrected categories, and the number of rounds done.
        """
        slopes: dict[Move, float] = {}
        for done in range(self._settings.rounds):
            back, on = self._neighbours(categories, damage.kl)
            back.sort(key=lambda move: (-slopes.get(move, move.slope), move[:2]))
            on.sort(key=lambda move: (slopes.get(move, move.slope), move[:2]))
            # A round measures both directions and tries at least one exchange.
            margin = min(self._settings.margin, (self._left() - kept - 1) // 2)
            if margin < 1:
                return categories, done
            back, on = back[:margin], on[:margin]
            kl = self._kl(categories)
            stage = f"correcting, round {done + 1}"
            self._progress(stage, 0, len(back) + len(on))
            for number, move in enumerate(back):
                gain = kl - self._kl(_undone(move, categories))
                slopes[move] = gain / move.saved
                self._progress(stage, number + 1, len(back) + len(on))
            for number, move in enumerate(on):
                cost = self._kl(apply_moves([move], categories)) - kl
                slopes[move] = cost / move.saved
                self._progress(stage, len(back) + number + 1, len(back) + len(on))
            back.sort(key=lambda move: (-slopes[move], move[:2]))
            on.sort(key=lambda move: (slopes[move], move[:2]))
            better = self._exchanged(categories, back, on, slopes, kl, target, kept)
            if better is None:
                return categories, done
            categories = better
        return categories, self._settings.rounds

    def _exchanged(
        self,
        categories: np.ndarray,
        back: list[Move],
        on: list[Move],
        slopes: dict[Move, float],
        kl: float,
        target: float,
        kept: int,
    ) -> np.ndarray | None:
        """Tries exchanges, the largest first, and returns the first that lowers the measured KL.

        Moves on that lower the KL by themselves cost nothing: they are part of every exchange, and
        also form one without moves back. Returns None if no exchange lowers the KL.
        """
        count = len(back)
        while True:
            exchanged = categories.copy()
            undone = set()
            for move in back[:count]:
                exchanged = _undone(move, exchanged)
                undone.add(move[:2])
            for move in on:
                if slopes[move] >= 0 and self._measurements.reduction(exchanged) >= target:
                    break
                if move[:2] not in undone:
                    exchanged = apply_moves([move], exchanged)
            reached = self._measurements.reduction(exchanged) >= target
            affordable = self._left() > kept or exchanged.tobytes() in self._asked
            if reached and affordable and self._kl(exchanged) < kl:
                return exchanged
            if not count:
                break
            count //= 2
        # Together, moves on may do harm that the best one alone, already measured, does not.
        return apply_moves(on[:1], categories) if on and slopes[on[0]] < 0 else None

    def _neighbours(
        self, categories: np.ndarray, damage: np.ndarray
    ) -> tuple[list[Move], list[Move]]:
        """For each head, the move along its hull to its category, and the move on from there."""
        back, on = [], []
        for (layer, head), category in np.ndenumerate(categories):
            options = hull(damage[layer, head], self._measurements.flops[layer])
            saved = self._saved_by(layer, int(category))
            # A category of the one-shot rule may lie off the hull.
            below = [option for option in options if option.saved < saved]
            above = [option for option in options if option.saved > saved]
            index = HeadCategory(category)
            here_damage = 0.0 if saved == 0 else damage[layer, head, index - 1]
            here = options[0]._replace(category=index, saved=saved, damage=float(here_damage))
            if below:
                back += moves_of(layer, head, [below[-1], here])
            if above:
                on += moves_of(layer, head, [here, above[0]])
        return back, on

    def _saved_by(self, layer: int, category: int) -> int:
        flops = self._measurements.flops[layer]
        return int(flops[HeadCategory.DENSE] - flops[category])

    def _saved(self, categories: np.ndarray) -> np.ndarray:
        return np.asarray(
            [
                [self._saved_by(layer, category) for category in row.tolist()]
                for layer, row in enumerate(categories)
            ],
            np.int64,
        )

    def _compare(self, categories: np.ndarray) -> Comparison:
        self._asked.add(np.ascontiguousarray(categories, np.int8).tobytes())
        return self._evaluator.compare(categories)

    def _kl(self, categories: np.ndarray) -> float:
        return self._compare(categories).kl


def _undone(move: Move, categories: np.ndarray) -> np.ndarray:
    """The categories with a move undone."""
    result = categories.copy()
    result[move.layer, move.head] = move.before
    return result


def _at(
    moves: tuple[Move, ...], measurements: Measurements, budget: Reduction
) -> Int8[np.ndarray, "layers heads"]:
    """Categories after the fewest moves along the path that save the wanted share of FLOPs."""
    layers, heads = measurements.mass.shape[1:3]
    categories = np.zeros((layers, heads), np.int8)
    dense = total_flops(categories, measurements.flops)
    saved = 0
    for count, move in enumerate(moves):
        saved += move.saved
        if saved / dense >= budget.share:
            return apply_moves(moves[: count + 1], categories)
    raise selection.out_of_reach(budget, saved / dense)
