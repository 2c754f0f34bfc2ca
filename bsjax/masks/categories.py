"""Head categories: which groups of keys the image queries of a head see.

A *template* numbers the images of a prompt. For a query token of image `a`, the keys fall into five
disjoint groups:

    TEXT        text tokens
    OWN_SINK    sink tokens of image a
    OWN         the other tokens of image a
    OTHER_SINK  sink tokens of other images
    OTHER       the other tokens of other images

A head category is the set of groups that it keeps. Text queries keep all five in every category.
"""

import enum
import operator
from typing import Any

from bsjax.checks import shown


class KeyGroup(enum.IntFlag):
    """A set of key groups, relative to a query token of one image."""

    TEXT = 1
    OWN_SINK = 2
    OWN = 4
    OTHER_SINK = 8
    OTHER = 16


ALL_KEY_GROUPS = (
    KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN | KeyGroup.OTHER_SINK | KeyGroup.OTHER
)


class HeadCategory(enum.IntEnum):
    """What an attention head needs to see (BlindSight). Its value is an index into the tables of a
    schedule.
    """

    DENSE = 0
    SINK = 1
    INTRA_IMAGE = 2
    INTRA_IMAGE_SINK = 3

    @classmethod
    def parse(cls, value: Any) -> "HeadCategory":
        """The category that `value` names.

        Args:
          value: a category, its number, or its name in any case, such as "intra-image-sink".

        Raises:
          ValueError: `value` is not a category; the message lists them all.
        """
        try:
            if isinstance(value, str):
                return cls[value.strip().upper().replace("-", "_")]
            return cls(operator.index(value))
        except (KeyError, TypeError, ValueError):
            names = ", ".join(f"{category.name} ({category.value})" for category in cls)
            raise ValueError(
                f"{shown(value)} is not a valid head category; the categories are {names}."
            ) from None

    @property
    def groups(self) -> KeyGroup:
        """The key groups that the image queries of a head in this category see."""
        return _GROUPS[self]


_GROUPS = {
    HeadCategory.DENSE: ALL_KEY_GROUPS,
    HeadCategory.SINK: KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OTHER_SINK,
    HeadCategory.INTRA_IMAGE: KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN,
    HeadCategory.INTRA_IMAGE_SINK: (
        KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN | KeyGroup.OTHER_SINK
    ),
}
