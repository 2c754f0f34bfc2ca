"""The second stage: categories corrected by what they do to the model's answers, end to end.

The one-shot rule looks at each head's own output. What an error there does to the answer differs
from head to head and from layer to layer, and errors compound. So:

1. The *damage* of moving one head to a category, all others dense, is measured: KL(dense ||
   sparse) of next-token distributions. Where `max_evaluations` does not allow all of them, those
   near the one-shot threshold are measured, and the others estimated as a multiple of the squared
   one-shot error: KL grows with the square of a small perturbation.
2. Heads' moves in the order of damage per FLOP saved make a nested path of categories from dense to
   the sparsest (`bsjax.profiling.knapsack`).
3. The path is followed to the wanted FLOPs, or, by bisection with measured KL, as far as it stays
   within the wanted KL.
4. Damages do not add up exactly. So heads at the margin are measured once more, in context: moves
   back towards dense and further to sparse, one at a time. The moves back that help most per FLOP
   are exchanged for the moves on that hurt least, as long as the measured KL falls and the FLOPs
   budget is kept. Moves on that lower the KL are taken in any case.

What it costs: at most `max_evaluations` arrays of categories, a prefill of every sample each. Three
per head in step 1 (fewer where a category saves nothing), about ten in step 3, and in step 4 twice
`margin` and a few more for each of the `rounds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int8

from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import whole_number
from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import total_flops
from bsjax.profiling import selection
from bsjax.profiling.evaluation import Comparison, Evaluator
from bsjax.profiling.groups import SPARSE_CATEGORIES
from bsjax.profiling.knapsack import Move, hull, moves_of, path, taken
from bsjax.profiling.measurements import Measurements
from bsjax.profiling.ordered_samples import Messages, OrderedSamples
from bsjax.profiling.progress import Progress, no_progress
from bsjax.samples import Samples

MAX_EVALUATIONS = 1024
LEAST_EVALUATIONS = 2
ROUNDS = 4
MARGIN = 24

# What correction in context may take of the evaluations when not all damages can be measured.
_SHARE_OF_CORRECTION = 0.25


class Damage(NamedTuple):
    """End-to-end damage of each head in each of `SPARSE_CATEGORIES`, all others dense.

    Attributes:
      kl: in nats; 0 where a category saves nothing.
      measured: where it was measured; estimated from the one-shot error elsewhere.
    """

    kl: Float64[np.ndarray, "layers heads categories"]
    measured: Bool[np.ndarray, "layers heads categories"]


@dataclass(frozen=True, eq=False)
class Refinement:
    """Categories corrected end to end, and the whole path they were found on.

    Attributes:
      categories: the result.
      reduction: the share of attention FLOPs that it saves over the calibration samples.
      kl: its KL(dense || sparse) over them, in nats.
      top1: its top-1 agreement over them.
      damage: of every head.
      path: moves from dense to the sparsest, least damage per FLOP first.
      numbers: what was measured on the way, by name, as a profile's file has it.
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

        These follow from damages alone and were not corrected in context: `refine` with the same
        evaluator and another budget does that.

        Raises:
          ProfileError: the path does not reach it; the message says how far it goes.
        """
        return _at(self.path, self._measurements, selection.share("reduction", reduction))


def refine(
    model: LoadedModel | None,
    measurements: Measurements,
    samples: Sequence[Messages] | Samples | OrderedSamples | Evaluator,
    *,
    target_reduction: float | None = None,
    max_kl: float | None = None,
    criterion: str = "output_error",
    quantile: float = 0.9,
    answer_tokens: int = 8,
    max_evaluations: int = MAX_EVALUATIONS,
    rounds: int = ROUNDS,
    margin: int = MARGIN,
    backend: str = "auto",
    progress: Progress = no_progress,
) -> Refinement:
    """Chooses categories by their measured effect on the model's answers.

    Args:
      model: from `bsjax.load`; not used, and may be None, when an evaluator is given.
      measurements: of the model, from `measure`.
      samples: conversations to measure on, those of `measurements` as a rule; or an `Evaluator`
        made with the measurements' sinks, which remembers what it has compared: refining to
        several budgets then measures damages once.
      target_reduction: save at least this share of attention FLOPs (of the measurements' samples).
      max_kl: or save as much as possible with a KL(dense || sparse) of at most this many nats.
      criterion: of the one-shot rule, which says what to measure when not all can be, and whose
        categories the result is never worse than, on these samples, for the same
        `target_reduction`.
      quantile: of the one-shot rule.
      answer_tokens: as for `Evaluator`; not used when one is given.
      max_evaluations: how many arrays of categories to compare at most, at least 2; each takes one
        prefill per sample, unless the evaluator remembers it.
      rounds: of correction in context.
      margin: heads measured in each direction in a round.
      backend: of the attention; not used when an evaluator is given.
      progress: told of every evaluation.

    Raises:
      ProfileError: not exactly one of the two budgets, a value out of range, an evaluator with
        other sinks than the measurements', or a reduction that cannot be reached.
    """
    if (target_reduction is None) == (max_kl is None):
        raise ProfileError("Refining needs a target_reduction or a max_kl, one of them.")
    if max_kl is not None:
        max_kl = selection.checked_divergence("max_kl", max_kl)
    for name, value in (("rounds", rounds), ("margin", margin)):
        whole_number(name, value, least=0, error=ProfileError)
    whole_number("max_evaluations", max_evaluations, least=LEAST_EVALUATIONS, error=ProfileError)
    if isinstance(samples, Evaluator):
        evaluator = samples
        if evaluator.sinks != measurements.sinks:
            raise ProfileError(
                f"The evaluator's sinks are {evaluator.sinks}, the measurements' are "
                f"{measurements.sinks}: make it with sinks=measurements.sinks."
            )
    elif model is None:
        raise ProfileError("Refining on samples needs the model; with an Evaluator it has one.")
    else:
        evaluator = Evaluator(
            model,
            samples,
            answer_tokens=answer_tokens,
            sinks=measurements.sinks,
            backend=backend,
            progress=progress,
        )
    return _Refiner(
        measurements, evaluator, criterion, quantile, max_evaluations, rounds, margin, progress
    ).run(target_reduction, max_kl)


@dataclass
class _Refiner:
    """One call of `refine`."""

    measurements: Measurements
    evaluator: Evaluator
    criterion: str
    quantile: float
    max_evaluations: int
    rounds: int
    margin: int
    progress: Progress
    asked: set[bytes] = field(default_factory=set)
    """Categories compared so far, whether the evaluator remembered them or not: what is chosen must
    not depend on that."""

    def left(self) -> int:
        """How many more arrays of categories may be compared."""
        return self.max_evaluations - len(self.asked)

    def run(self, target_reduction: float | None, max_kl: float | None) -> Refinement:
        numbers: dict[str, int | float] = {}
        if target_reduction is not None:
            selection.share("target_reduction", target_reduction)
            one_shot_threshold = self.measurements.threshold_for(
                target_reduction, criterion=self.criterion, quantile=self.quantile
            )
            one_shot = self.measurements.one_shot(
                one_shot_threshold, criterion=self.criterion, quantile=self.quantile
            )
        else:
            one_shot = None
            one_shot_threshold = float(
                np.median(self.measurements.damage(self.criterion, self.quantile))
            )
        # Bisection halves a path of at most three moves per head.
        bisection = int(self.measurements.error[0].size).bit_length() + 1
        afterwards = 2 if max_kl is None else bisection
        damage = self._damages(one_shot_threshold, afterwards)
        moves = path(damage.kl, self.measurements.flops)

        if one_shot is not None:
            assert target_reduction is not None
            numbers["target_reduction"] = target_reduction
            categories = _at(moves, self.measurements, target_reduction)
            numbers["kl_path"] = self._kl(categories)
            numbers["kl_one_shot"] = self._kl(one_shot)
            if numbers["kl_one_shot"] < numbers["kl_path"]:
                categories = one_shot
        else:
            assert max_kl is not None
            numbers["max_kl"] = max_kl
            dense = np.zeros(damage.kl.shape[:2], np.int8)
            categories = self._farthest(moves, dense, max_kl)
            target_reduction = self.measurements.reduction(categories)
            numbers["kl_path"] = self._kl(categories)
            numbers["reduction_path"] = target_reduction

        kept = 0 if max_kl is None else bisection
        categories, rounds = self._corrected(categories, damage, target_reduction, kept)
        if max_kl is not None:
            # What correcting has gained buys more moves.
            saved = self._saved(categories)
            left = tuple(
                move
                for move in moves
                if self._saved_by(move.layer, move.after) > saved[move.layer, move.head]
            )
            categories = self._farthest(left, categories, max_kl)
        final = self._compare(categories)
        reduction = self.measurements.reduction(categories)
        numbers |= {
            "reduction": reduction,
            "kl": final.kl,
            "top_1_agreement": final.top1,
            "correction_rounds": rounds,
            "evaluations": len(self.asked),
            "max_evaluations": self.max_evaluations,
            "samples": len(self.evaluator.fingerprints),
            "answer_tokens": self.evaluator.answer_tokens,
            "damages_measured": int(damage.measured.sum()),
            "damages_estimated": int(((damage.kl > 0) & ~damage.measured).sum()),
        }
        return Refinement(
            categories, reduction, final.kl, final.top1, damage, moves, numbers, self.measurements
        )

    def _damages(self, threshold: float, afterwards: int) -> Damage:
        """Damages of all moves of single heads that save FLOPs.

        At least `afterwards` evaluations are left when there are as many.
        """
        one_shot = self.measurements.damage(self.criterion, self.quantile)
        flops = self.measurements.flops
        layers, heads, _ = one_shot.shape
        candidates = [
            (layer, head, index)
            for layer in range(layers)
            for head in range(heads)
            for index, category in enumerate(SPARSE_CATEGORIES)
            if flops[layer, category] < flops[layer, HeadCategory.DENSE]
        ]
        allowed = max(0, self.max_evaluations - afterwards)
        if len(candidates) > allowed:
            allowed = min(allowed, round(self.max_evaluations * (1 - _SHARE_OF_CORRECTION)))
        # Far from the threshold a head is sparse, or dense, whatever its damage is exactly.
        tiny = np.finfo(np.float64).tiny
        nearest = sorted(
            candidates,
            key=lambda place: abs(np.log(one_shot[place] + tiny) - np.log(threshold + tiny)),
        )[:allowed]

        kl = np.zeros(one_shot.shape)
        measured = np.zeros(one_shot.shape, bool)
        stage = "measuring damage"
        self.progress(stage, 0, len(nearest))
        for done, place in enumerate(sorted(nearest)):
            layer, head, index = place
            categories = np.zeros((layers, heads), np.int8)
            categories[layer, head] = SPARSE_CATEGORIES[index]
            kl[place] = self._kl(categories)
            measured[place] = True
            self.progress(stage, done + 1, len(nearest))
        error = self.measurements.error[self.measurements.several_images]
        proxy = (error.astype(np.float64) ** 2).mean(axis=0)
        known = measured & (proxy > 0)
        factor = np.median(kl[known] / proxy[known]) if known.any() else 1.0
        for place in set(candidates) - set(nearest):
            kl[place] = factor * proxy[place]
        return Damage(kl, measured)

    def _farthest(
        self, moves: tuple[Move, ...], start: Int8[np.ndarray, "layers heads"], max_kl: float
    ) -> Int8[np.ndarray, "layers heads"]:
        """The most of the moves, from the first on, whose measured KL is within `max_kl`.

        By bisection: KL grows along the moves, up to small dents. One evaluation is left, for
        `start`.
        """
        within, beyond = 0, len(moves) + 1
        while beyond - within > 1 and self.left() > 1:
            middle = (within + beyond) // 2
            if self._kl(taken(moves[:middle], start)) <= max_kl:
                within = middle
            else:
                beyond = middle
        return taken(moves[:within], start)

    def _corrected(
        self, categories: np.ndarray, damage: Damage, target: float, kept: int
    ) -> tuple[Int8[np.ndarray, "layers heads"], int]:
        """Exchanges moves at the margin while the measured KL falls; and how many rounds it took.

        Every round keeps at least `target`. At least `kept` evaluations are left when there are as
        many.
        """
        slopes: dict[Move, float] = {}
        for done in range(self.rounds):
            back, on = self._neighbours(categories, damage.kl)
            back.sort(key=lambda move: (-slopes.get(move, move.slope), move[:2]))
            on.sort(key=lambda move: (slopes.get(move, move.slope), move[:2]))
            # A round needs both directions, and one exchange to try.
            margin = min(self.margin, (self.left() - kept - 1) // 2)
            if margin < 1:
                return categories, done
            back, on = back[:margin], on[:margin]
            kl = self._kl(categories)
            stage = f"correcting, round {done + 1}"
            self.progress(stage, 0, len(back) + len(on))
            for number, move in enumerate(back):
                gain = kl - self._kl(_undone(move, categories))
                slopes[move] = gain / move.saved
                self.progress(stage, number + 1, len(back) + len(on))
            for number, move in enumerate(on):
                cost = self._kl(taken([move], categories)) - kl
                slopes[move] = cost / move.saved
                self.progress(stage, len(back) + number + 1, len(back) + len(on))
            back.sort(key=lambda move: (-slopes[move], move[:2]))
            on.sort(key=lambda move: (slopes[move], move[:2]))
            better = self._exchanged(categories, back, on, slopes, kl, target, kept)
            if better is None:
                return categories, done
            categories = better
        return categories, self.rounds

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
        """The categories after the first exchange, largest first, that lowers the measured KL.

        Moves on that lower it by themselves save FLOPs for nothing: they are part of every
        exchange, and one without any moves back.
        """
        count = len(back)
        while True:
            exchanged = categories.copy()
            undone = set()
            for move in back[:count]:
                exchanged = _undone(move, exchanged)
                undone.add(move[:2])
            for move in on:
                if slopes[move] >= 0 and self.measurements.reduction(exchanged) >= target:
                    break
                if move[:2] not in undone:
                    exchanged = taken([move], exchanged)
            reached = self.measurements.reduction(exchanged) >= target
            affordable = self.left() > kept or exchanged.tobytes() in self.asked
            if reached and affordable and self._kl(exchanged) < kl:
                return exchanged
            if not count:
                break
            count //= 2
        # Together they may do harm that the best of them alone, measured already, does not.
        return taken(on[:1], categories) if on and slopes[on[0]] < 0 else None

    def _neighbours(
        self, categories: np.ndarray, damage: np.ndarray
    ) -> tuple[list[Move], list[Move]]:
        """Each head's move that led here along its hull, and the one that leads on."""
        back, on = [], []
        for (layer, head), category in np.ndenumerate(categories):
            options = hull(damage[layer, head], self.measurements.flops[layer])
            saved = self._saved_by(layer, int(category))
            # Categories of the one-shot rule need not lie on the hull.
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
        flops = self.measurements.flops[layer]
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
        self.asked.add(np.ascontiguousarray(categories, np.int8).tobytes())
        return self.evaluator.compare(categories)

    def _kl(self, categories: np.ndarray) -> float:
        return self._compare(categories).kl


def _undone(move: Move, categories: np.ndarray) -> np.ndarray:
    """The categories with a move taken back."""
    result = categories.copy()
    result[move.layer, move.head] = move.before
    return result


def _at(
    moves: tuple[Move, ...], measurements: Measurements, reduction: float
) -> Int8[np.ndarray, "layers heads"]:
    """The shortest start of the path that saves at least this share."""
    layers, heads = measurements.mass.shape[1:3]
    categories = np.zeros((layers, heads), np.int8)
    dense = total_flops(categories, measurements.flops)
    saved = 0
    for count, move in enumerate(moves):
        saved += move.saved
        if saved / dense >= reduction:
            return taken(moves[: count + 1], categories)
    raise selection.out_of_reach(reduction, saved / dense)
