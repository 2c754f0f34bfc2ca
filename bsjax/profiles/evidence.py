"""What the categories of a measured profile were chosen from, and how well they did."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int8

from bsjax.checks import as_number, shown, whole_number
from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory, KeyGroup
from bsjax.masks.flops import LayerFlops
from bsjax.profiles.criteria import MEASURED_CRITERIA

MEASURED_STATISTICS = (
    *(f"mass_{group.name}" for group in KeyGroup),
    *(f"error_{category.name}" for category in HeadCategory if category),
)
"""What is measured for every head: the attention mass of each key group, averaged over samples, and
the relative error of each sparse category's output, as a quantile over samples."""

DAMAGE_STATISTICS = tuple(f"damage_{category.name}" for category in HeadCategory if category)
"""What refinement measures for every head: KL(dense || sparse), in nats, of next-token
distributions when this head alone has the category."""

# Masses are sums of many float32 numbers, so they add up to 1 only approximately.
_MASS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class AttentionFlops:
    """Attention FLOPs of prefill over a set of samples, all layers and heads.

    Attributes:
      dense: FLOPs if all heads were dense.
      sparse: FLOPs with the heads' categories.

    Raises:
      ProfileError: a value is not a finite number, or `sparse` is not above 0 and at most `dense`.
    """

    dense: int | float
    sparse: int | float

    def __post_init__(self) -> None:
        _numbers("attention_flops", {"dense": self.dense, "sparse": self.sparse})
        if not 0 < self.sparse <= self.dense:
            raise ProfileError(
                "`attention_flops`: `sparse` must be above 0 and at most `dense`, got "
                f"{self.sparse} of {self.dense}."
            )

    @property
    def reduction(self) -> float:
        """The share of the dense FLOPs that is saved."""
        return (self.dense - self.sparse) / self.dense


@dataclass(frozen=True)
class SinkDiscovery:
    """How sinks were found in data.

    Attributes:
      rule: how offsets were chosen, in words.
      mass_by_offset: for each offset from an image's first token, the attention that one image
        query of another image pays to one key at this offset, averaged over pairs, layers, heads
        and samples; 0 if no pair has this offset.
    """

    rule: str
    mass_by_offset: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Evidence:
    """The measurements behind a profile's categories.

    Attributes:
      criterion: one of `MEASURED_CRITERIA`.
      thresholds: the numbers that the criterion was applied with, by name.
      sample_count: how many samples the categories were chosen with.
      held_out_count: how many samples the choice was checked on.
      sample_fingerprint: fingerprint of all samples, including held-out ones.
      statistics: float64 [layers, heads] by name: `MEASURED_STATISTICS` and, after refinement,
        `DAMAGE_STATISTICS`.
      attention_flops: attention FLOPs over the samples that the categories were chosen with.
      attention_flops_per_kind: the same for each kind of layer of the model, local or global.
      sink_discovery: how sinks were found; None if they were given.
      refinement: what refinement measured, by name; None for categories of the one-shot rule.
      end_to_end: how sparse answers compare with dense ones on the held-out samples, by name; None
        without held-out samples.

    Raises:
      ProfileError: a value is out of range, or values contradict each other.
    """

    criterion: str
    thresholds: Mapping[str, int | float]
    sample_count: int
    sample_fingerprint: str
    statistics: Mapping[str, np.ndarray]
    attention_flops: AttentionFlops
    attention_flops_per_kind: tuple[LayerFlops, ...] = ()
    held_out_count: int = 0
    sink_discovery: SinkDiscovery | None = None
    refinement: Mapping[str, int | float] | None = None
    end_to_end: Mapping[str, int | float] | None = None

    def __post_init__(self) -> None:
        if self.criterion not in MEASURED_CRITERIA:
            raise ProfileError(
                f"`criterion` of evidence must be one of {', '.join(MEASURED_CRITERIA)}, got "
                f"{shown(self.criterion)}."
            )
        whole_number("`sample_count`", self.sample_count, least=1, error=ProfileError)
        whole_number("`held_out_count`", self.held_out_count, least=0, error=ProfileError)
        if (self.end_to_end is None) != (self.held_out_count == 0):
            raise ProfileError(
                f"`end_to_end` and {self.held_out_count} held-out samples contradict each other: "
                "it must hold the measurements on them, and be None without held-out samples."
            )
        for name in ("thresholds", "refinement", "end_to_end"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _numbers(name, getattr(self, name)))
        object.__setattr__(
            self,
            "statistics",
            {name: np.asarray(values, np.float64) for name, values in self.statistics.items()},
        )
        self._check_statistics()
        self._check_flops()

    def _check_statistics(self) -> None:
        wanted = MEASURED_STATISTICS + (DAMAGE_STATISTICS if self.refinement is not None else ())
        if set(self.statistics) != set(wanted):
            missing = sorted(set(wanted) - set(self.statistics))
            unknown = sorted(set(self.statistics) - set(wanted))
            raise ProfileError(
                f"`statistics` must be {', '.join(wanted)}; missing: "
                f"{', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}."
            )
        shape = self.statistics[wanted[0]].shape
        for name, values in self.statistics.items():
            if values.shape != shape:
                raise ProfileError(
                    f"`statistics[{name!r}]` has the shape {values.shape}, "
                    f"`statistics[{wanted[0]!r}]` has {shape}: all must have one number per layer "
                    "and head."
                )
            if not np.isfinite(values).all():
                raise ProfileError(f"`statistics[{name!r}]` has numbers that are not finite.")
            if np.any(values < 0):
                raise ProfileError(f"`statistics[{name!r}]` has numbers below 0.")
        mass = sum(self.statistics[f"mass_{group.name}"] for group in KeyGroup)
        if np.any(np.abs(mass - 1) > _MASS_TOLERANCE):
            raise ProfileError("`statistics`: the attention masses of a head must add up to 1.")

    def _check_flops(self) -> None:
        kinds, total = self.attention_flops_per_kind, self.attention_flops
        if not kinds:
            return
        layers = len(self.statistics[MEASURED_STATISTICS[0]])
        dense, sparse = sum(kind.dense for kind in kinds), sum(kind.sparse for kind in kinds)
        counted = sum(kind.layers for kind in kinds)
        if (dense, sparse, counted) != (total.dense, total.sparse, layers):
            raise ProfileError(
                f"`attention_flops_per_kind` adds up to {dense} dense and {sparse} sparse FLOPs in "
                f"{counted} layers; the model's {layers} have {total.dense} and {total.sparse}."
            )

    def check_categories(self, categories: Int8[np.ndarray, "layers heads"]) -> None:
        """Rejects categories that this evidence cannot lead to.

        Raises:
          ProfileError: another number of layers or heads was measured; or, without refinement, a
            head's measured error is above the threshold.
        """
        measured = self.statistics[MEASURED_STATISTICS[0]].shape
        if measured != categories.shape:
            raise ProfileError(
                f"`statistics` must have one number per layer and head, {categories.shape}, got "
                f"the shape {measured}."
            )
        if self.criterion != "output_error" or self.refinement is not None:
            return
        if "threshold" not in self.thresholds:
            raise ProfileError("`thresholds` of the criterion 'output_error' lack `threshold`.")
        threshold = self.thresholds["threshold"]
        for category in HeadCategory:
            if category is HeadCategory.DENSE:
                continue
            error = self.statistics[f"error_{category.name}"]
            wrong = (categories == category) & (error > threshold)
            if wrong.any():
                layer, head = np.argwhere(wrong)[0].tolist()
                raise ProfileError(
                    f"Head {head} of layer {layer} is {category.name} with an error of "
                    f"{error[layer, head]:.4g}, above the threshold of {threshold:.4g}: these "
                    "categories do not come from these statistics."
                )


def _numbers(name: str, values: Mapping[str, Any]) -> dict[str, int | float]:
    """Converts numbers, such as NumPy's or JAX's, to Python's and checks that they are finite."""
    numbers = {key: as_number(value) for key, value in values.items()}
    for key, number in numbers.items():
        if not math.isfinite(number):
            raise ProfileError(f"`{name}.{key}` must be a finite number, got {shown(values[key])}.")
    return numbers
