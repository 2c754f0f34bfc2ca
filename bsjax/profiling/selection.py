"""One category per head from per-head damage: the one-shot rule of BlindSight, and its budget mode.

A head gets the category with the fewest FLOPs whose damage stays within the threshold for the given
share of the samples. FLOPs depend on the kind of layer: in a layer whose window hides most of the
keys anyway, little is saved.
"""

import numpy as np
from jaxtyping import Float, Int8, Int64

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.flops import dense_flops, total_flops
from bsjax.profiling.groups import GROUPS, SPARSE_CATEGORIES
from bsjax.profiling.settings import Reduction, Threshold

# Among categories with equal FLOPs, those that see more come first.
_BY_WIDTH = (
    HeadCategory.DENSE,
    HeadCategory.INTRA_IMAGE_SINK,
    HeadCategory.INTRA_IMAGE,
    HeadCategory.SINK,
)


def missing_mass(
    mass: Float[np.ndarray, "*batch groups"],
) -> Float[np.ndarray, "*batch categories"]:
    """Attention mass that each of `SPARSE_CATEGORIES` drops, from the mass of each key group.

    Clipped to [0, 1], because sums of float32 numbers may be slightly above 1.
    """
    dropped = [[not group & category.groups for group in GROUPS] for category in SPARSE_CATEGORIES]
    return np.clip(mass.astype(np.float64) @ np.asarray(dropped, np.float64).T, 0.0, 1.0)


def in_quantile(
    values: Float[np.ndarray, "samples *rest"], quantile: float
) -> Float[np.ndarray, "*rest"]:
    """The smallest value of a sample that at least this share of the samples does not exceed."""
    return np.quantile(values, quantile, axis=0, method="inverted_cdf")


def within_threshold(
    damage: Float[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
    threshold: float,
) -> Int8[np.ndarray, "layers heads"]:
    """For each head, the category with the fewest FLOPs whose damage is at most `threshold`.

    Args:
      damage: damage of each of `SPARSE_CATEGORIES`; dense attention does no damage.
      flops: attention FLOPs of a head of each layer, by `HeadCategory`.
      threshold: the largest damage allowed.
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
    dense = dense_flops(categories, flops)
    return (dense - total_flops(categories, flops)) / dense


def one_shot(
    damage: Float[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
    budget: Threshold | Reduction,
) -> tuple[Int8[np.ndarray, "layers heads"], float]:
    """The categories of the one-shot rule within a budget, and the threshold that gives them.

    Raises:
      ProfileError: see `threshold_for`.
    """
    if isinstance(budget, Reduction):
        threshold = threshold_for(damage, flops, budget)
    else:
        threshold = budget.value
    return within_threshold(damage, flops, threshold), threshold


def threshold_for(
    damage: Float[np.ndarray, "layers heads categories"],
    flops: Int64[np.ndarray, "layers all_categories"],
    budget: Reduction,
) -> float:
    """The smallest threshold whose categories save at least the wanted share of FLOPs.

    Raises:
      ProfileError: no threshold saves that much; the message says how much can be saved.
    """
    # The allowed categories change only at these values, and only ever grow in number.
    thresholds = np.unique(damage)

    def reached(index: int) -> float:
        return reduction_of(within_threshold(damage, flops, thresholds[index]), flops)

    first, last = 0, thresholds.size - 1
    if reached(last) < budget.share:
        raise out_of_reach(budget, reached(last))
    while first < last:
        middle = (first + last) // 2
        if reached(middle) >= budget.share:
            last = middle
        else:
            first = middle + 1
    return float(thresholds[first])


def out_of_reach(budget: Reduction, most: float) -> ProfileError:
    """The error for a reduction that no categories reach.

    Args:
      budget: the reduction asked for.
      most: the largest share that can be saved.
    """
    return ProfileError(
        f"target_reduction={budget.share:g} cannot be reached on these samples: with every head in "
        f"its cheapest category, attention FLOPs fall by {most:.1%}. Ask for less, or profile with "
        "prompts that have more images."
    )
