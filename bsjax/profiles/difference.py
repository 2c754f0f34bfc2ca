"""What differs between two profiles of one model."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory
from bsjax.profiles.profile import Profile


class StatisticChange(NamedTuple):
    """How one statistic differs."""

    name: str
    first_mean: float
    """Over all heads, in the first profile."""
    second_mean: float
    largest: float
    """The largest change of a head, with its sign: second less first."""
    layer: int
    """Of that head."""
    head: int


@dataclass(frozen=True, eq=False)
class Difference:
    """Two profiles of the same shape, compared head by head."""

    first: Profile
    second: Profile
    changed: Bool[np.ndarray, "layers heads"]
    """Heads that have another category."""
    confusion: Int[np.ndarray, "categories categories"]
    """Heads by their category in the first profile (row) and in the second (column)."""
    statistics: tuple[StatisticChange, ...]
    """Of what both measured."""
    only_first: tuple[str, ...]
    """Statistics that only the first profile has."""
    only_second: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether a model runs alike with both: equal categories, equal sinks."""
        return not self.changed.any() and self.first.sinks == self.second.sinks


def compare(first: Profile, second: Profile) -> Difference:
    """Compares two profiles.

    Raises:
      ProfileError: they are for models of another family, or with other layers or heads.
    """
    shapes = [
        f"{profile.family} with {profile.layers} layers of {profile.heads} heads"
        for profile in (first, second)
    ]
    if shapes[0] != shapes[1]:
        raise ProfileError(
            f"The first profile is for {shapes[0]}, the second for {shapes[1]}: only profiles of "
            "one model can be compared."
        )
    count = len(HeadCategory)
    pairs = first.categories.astype(np.int64) * count + second.categories
    names = [name for name in first.statistics if name in second.statistics]
    return Difference(
        first,
        second,
        changed=first.categories != second.categories,
        confusion=np.bincount(pairs.ravel(), minlength=count**2).reshape(count, count),
        statistics=tuple(_statistic_change(name, first, second) for name in names),
        only_first=tuple(name for name in first.statistics if name not in names),
        only_second=tuple(name for name in second.statistics if name not in names),
    )


def _statistic_change(name: str, first: Profile, second: Profile) -> StatisticChange:
    ours = np.asarray(first.statistics[name], np.float64)
    theirs = np.asarray(second.statistics[name], np.float64)
    change = theirs - ours
    layer, head = np.unravel_index(int(np.abs(change).argmax()), change.shape)
    return StatisticChange(
        name,
        float(ours.mean()),
        float(theirs.mean()),
        float(change[layer, head]),
        int(layer),
        int(head),
    )
