"""How categories are chosen and checked: one validated object for the API and the command line.

Importing this module imports neither NumPy nor JAX, so that `bsjax profile --help` is fast.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

from bsjax.checks import (
    LARGEST_WRITTEN,
    argument,
    as_number,
    shown,
    truth_value,
    whole_number,
)
from bsjax.errors import ProfileError
from bsjax.profiles.criteria import MEASURED_CRITERIA

LEAST_EVALUATIONS = 2
"""Refinement compares at least two arrays of categories."""


@dataclass(frozen=True)
class Threshold:
    """A budget per head: its damage, in terms of the criterion, is at most `value`.

    Raises:
      ProfileError: the value is not a finite number of at least 0.
    """

    value: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= as_number(self.value) < math.inf:
            raise ProfileError(
                f"{argument('threshold')} must be a number of at least 0, got {shown(self.value)}."
            )


@dataclass(frozen=True)
class Reduction:
    """A budget for the model: at least this share of its attention FLOPs is saved.

    Raises:
      ProfileError: the share is not between 0 and 1.
    """

    share: float

    def __post_init__(self) -> None:
        if not 0 < as_number(self.share) < 1:
            raise ProfileError(
                f"{argument('target_reduction')} must be a share between 0 and 1, got "
                f"{shown(self.share)}."
            )


@dataclass(frozen=True)
class Divergence:
    """A budget for the model: KL(dense || sparse) of next-token distributions is at most `nats`.

    Raises:
      ProfileError: the limit is not a finite number above 0.
    """

    nats: float

    def __post_init__(self) -> None:
        if not 0 < as_number(self.nats) < math.inf:
            raise ProfileError(
                f"{argument('max_kl')} must be a number of nats above 0, got {shown(self.nats)}."
            )


@dataclass(frozen=True)
class Settings:
    """How categories are chosen from measurements, and checked on held-out samples.

    The arguments of `bsjax.profile` with the same names are documented in more detail.

    Attributes:
      budget: what limits the choice.
      criterion: one of `MEASURED_CRITERIA`.
      quantile: share of the samples that must be within the threshold, in [0, 1].
      refine: whether the choice of the one-shot rule is refined.
      max_evaluations: the largest number of arrays of categories that refinement compares.
      rounds: the largest number of rounds of correction in context.
      margin: how many heads a round measures in each direction.
      answer_tokens: the most tokens of an answer to compare.
      held_out: share of the samples held out for the check, in [0, 1).
      seed: seed of the draw of held-out samples.

    Raises:
      ProfileError: a value is out of range, or the budget is a divergence without refinement.
    """

    budget: Threshold | Reduction | Divergence = Threshold()
    criterion: str = "output_error"
    quantile: float = 0.9
    refine: bool = False
    max_evaluations: int = 1024
    rounds: int = 4
    margin: int = 24
    answer_tokens: int = 8
    held_out: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.criterion not in MEASURED_CRITERIA:
            raise ProfileError(
                f"{argument('criterion')} must be one of {', '.join(MEASURED_CRITERIA)}, got "
                f"{shown(self.criterion)}."
            )
        # A share of attention is at most 1. Relative errors have no bound: what is left out of an
        # output may point in the opposite direction to what is kept.
        if isinstance(self.budget, Threshold) and self.criterion == "mass":
            if self.budget.value > 1:
                raise ProfileError(
                    f"{argument('threshold')} must be a share from 0 to 1 for the criterion "
                    f"'mass', got {shown(self.budget.value)}."
                )
        truth_value("refine", self.refine, error=ProfileError)
        if isinstance(self.budget, Divergence) and not self.refine:
            raise ProfileError(
                f"{argument('max_kl')} is a budget for refinement: turn on {argument('refine')}."
            )
        if not 0 <= as_number(self.quantile) <= 1:
            raise ProfileError(
                f"{argument('quantile')} must be a share from 0 to 1, got {shown(self.quantile)}."
            )
        if not 0 <= as_number(self.held_out) < 1:
            raise ProfileError(
                f"{argument('held_out')} must be a share in [0, 1), got {shown(self.held_out)}."
            )
        for name, least in (
            ("max_evaluations", LEAST_EVALUATIONS),
            ("rounds", 0),
            ("margin", 0),
            ("answer_tokens", 1),
            ("seed", 0),
        ):
            value = getattr(self, name)
            whole_number(name, value, least=least, most=LARGEST_WRITTEN, error=ProfileError)

    @classmethod
    def of(
        cls,
        *,
        threshold: float = Threshold.value,
        target_reduction: float | None = None,
        max_kl: float | None = None,
        **others: Any,
    ) -> "Settings":
        """Makes settings from the arguments of `bsjax.profile`.

        Args:
          threshold: the budget if neither of the others is given.
          target_reduction: a budget in place of the threshold.
          max_kl: a budget in place of the threshold, for refinement.
          **others: attributes other than the budget, by name.

        Raises:
          ProfileError: both `target_reduction` and `max_kl` are given, or a value is out of range.
        """
        if target_reduction is not None and max_kl is not None:
            raise ProfileError(
                f"Give {argument('target_reduction')} or {argument('max_kl')}, not both."
            )
        settings = cls(Threshold(threshold), **others)
        if target_reduction is not None:
            return replace(settings, budget=Reduction(target_reduction))
        if max_kl is not None:
            return replace(settings, budget=Divergence(max_kl))
        return settings
