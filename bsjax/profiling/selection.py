"""One category per head from per-head damage: the one-shot rule of BlindSight, and its budget mode.

A head takes the category with the fewest FLOPs whose damage stays within the threshold in the given
quantile of the samples. FLOPs depend on the kind of layer: where a window hides most of the keys
anyway, little is saved.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float, Int8, Int64

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import total_flops
from bsjax.profiling.groups import GROUPS, SPARSE_CATEGORIES

CRITERIA = ("output_error", "mass")
"""What the threshold bounds: the relative error of the head's output, or the attention it drops."""

# Between categories of equal FLOPs, those that see more come first.
_BY_WIDTH = (
    HeadCategory.DENSE,
    HeadCategory.INTRA_IMAGE_SINK,
    HeadCategory.INTRA_IMAGE,
    HeadCategory.SINK,
)


def share(name: str, value: Any, *, zero: bool = False) -> float:
    """`value` as a share in (0, 1), or in [0, 1] with `zero`.

    Raises:
      ProfileError: it is not; the message names `name`.
    """
    number = _as_float(value)
    if not (0 <= number <= 1 if zero else 0 < number < 1):
        raise ProfileError(
            f"{name} must be {'a share from 0 to 1' if zero else 'a share between 0 and 1'}, got "
            f"{value!r}."
        )
    return number


def checked_threshold(value: Any, criterion: str) -> float:
    """`value` as a threshold of a criterion.

    A share of attention is at most 1. Relative errors have no bound: an output that is left out may
    point against what is kept.

    Raises:
      ProfileError: an unknown criterion; no share from 0 to 1 for `mass`, no finite number from 0
        for `output_error`.
    """
    if checked_criterion(criterion) == "mass":
        return share("threshold", value, zero=True)
    number = _as_float(value)
    if not 0 <= number < math.inf:
        raise ProfileError(f"threshold must be a number from 0, got {value!r}.")
    return number


def checked_criterion(criterion: Any) -> str:
    """A name in `CRITERIA`.

    Raises:
      ProfileError: it is not.
    """
    if criterion not in CRITERIA:
        raise ProfileError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}.")
    return criterion


def checked_divergence(name: str, value: Any) -> float:
    """`value` as a divergence to keep within, in nats.

    Raises:
      ProfileError: it is no finite number above 0; the message names `name`.
    """
    number = _as_float(value)
    if not 0 < number < math.inf:
        raise ProfileError(f"{name} must be a number of nats above 0, got {value!r}.")
    return number


def _as_float(value: Any) -> float:
    """A number of any library as Python's; NaN for what is none, texts of digits too."""
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except (OverflowError, TypeError, ValueError):
        return math.nan


def missing_mass(
    mass: Float[np.ndarray, "*batch groups"],
) -> Float[np.ndarray, "*batch categories"]:
    """Attention mass that each of `SPARSE_CATEGORIES` drops, from the mass of each key group.

    In [0, 1], though sums of float32 numbers may come out a little above.
    """
    dropped = [[not group & category.groups for group in GROUPS] for category in SPARSE_CATEGORIES]
    return np.clip(mass.astype(np.float64) @ np.asarray(dropped, np.float64).T, 0.0, 1.0)


def in_quantile(
    values: Float[np.ndarray, "samples *rest"], quantile: float
) -> Float[np.ndarray, "*rest"]:
    """The least value that this share of the samples does not exceed: always one of the samples'.

    Raises:
      ProfileError: the quantile is not in [0, 1].
    """
    quantile = share("quantile", quantile, zero=True)
    return np.quantile(values, quantile, axis=0, method="inverted_cdf")


def within_threshold(
    damage: Float[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
    threshold: float,
) -> Int8[np.ndarray, "layers heads"]:
    """The category with the fewest FLOPs of each head whose damage is at most `threshold`.

    Args:
      damage: of each of `SPARSE_CATEGORIES`; dense does none.
      flops: attention FLOPs of a head of each layer, by `HeadCategory`.
      threshold: the most damage.
    """
    allowed = np.concatenate([np.ones((*damage.shape[:2], 1), bool), damage <= threshold], axis=2)
    cost = np.where(allowed, flops[:, None, :], np.iinfo(np.int64).max)
    order = np.asarray(_BY_WIDTH)
    return order[cost[..., order].argmin(axis=2)].astype(np.int8)


def reduction_of(
    categories: Int8[np.ndarray, "layers heads"],
    flops: Int64[np.ndarray, "layers all_categories"],
) -> float:
    """The share of dense attention's FLOPs that the categories save."""
    dense = total_flops(np.zeros_like(categories), flops)
    return (dense - total_flops(categories, flops)) / dense


def threshold_for(
    damage: Float[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
    target_reduction: float,
) -> float:
    """The least threshold whose categories save at least this share of attention FLOPs.

    Raises:
      ProfileError: the target is no share, or no threshold reaches it; the message says how much
        can be reached.
    """
    target = share("target_reduction", target_reduction)
    # What is allowed changes at these values alone, and only ever grows.
    thresholds = np.unique(damage)

    def reached(index: int) -> float:
        return reduction_of(within_threshold(damage, flops, thresholds[index]), flops)

    first, last = 0, thresholds.size - 1
    if reached(last) < target:
        raise out_of_reach(target, reached(last))
    while first < last:
        middle = (first + last) // 2
        if reached(middle) >= target:
            last = middle
        else:
            first = middle + 1
    return float(thresholds[first])


def out_of_reach(target: float, most: float) -> ProfileError:
    """The error of a budget that no categories reach."""
    return ProfileError(
        f"target_reduction={target:g} cannot be reached on these samples: with every head in its "
        f"cheapest category attention FLOPs fall by {most:.1%}. Ask for less, or profile with "
        "prompts of more images."
    )
