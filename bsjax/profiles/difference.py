"""How two profiles of the same model differ."""

from collections.abc import Mapping
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
    """Mean over all heads in the first profile."""
    second_mean: float
    """Mean over all heads in the second profile."""
    largest: float
    """The largest change of a head, second minus first, with its sign."""
    layer: int
    """The layer of that head."""
    head: int


@dataclass(frozen=True, eq=False)
class Difference:
    """Two profiles of the same shape, compared head by head."""

    first: Profile
    second: Profile
    changed: Bool[np.ndarray, "layers heads"]
    """Whether a head has another category in the second profile."""
    confusion: Int[np.ndarray, "categories categories"]
    """Number of heads by category in the first profile (row) and in the second (column)."""
    statistics: tuple[StatisticChange, ...]
    """Changes of the statistics that both profiles have."""
    only_first: tuple[str, ...]
    """Statistics that only the first profile has."""
    only_second: tuple[str, ...]
    """Statistics that only the second profile has."""

    @property
    def same(self) -> bool:
        """Whether the model gives the same results with both: categories and sinks are equal."""
        return not self.changed.any() and self.first.sinks == self.second.sinks


def compare(first: Profile, second: Profile) -> Difference:
    """Compares two profiles.

    Raises:
      ProfileError: their families, numbers of layers or numbers of heads differ.
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
    ours, theirs = _statistics_of(first), _statistics_of(second)
    names = [name for name in ours if name in theirs]
    return Difference(
        first,
        second,
        changed=first.categories != second.categories,
        confusion=np.bincount(pairs.ravel(), minlength=count**2).reshape(count, count),
        statistics=tuple(_statistic_change(name, ours[name], theirs[name]) for name in names),
        only_first=tuple(name for name in ours if name not in names),
        only_second=tuple(name for name in theirs if name not in names),
    )


def _statistics_of(profile: Profile) -> Mapping[str, np.ndarray]:
    return {} if profile.evidence is None else profile.evidence.statistics


def _statistic_change(name: str, ours: np.ndarray, theirs: np.ndarray) -> StatisticChange:
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
