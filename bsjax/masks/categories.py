"""Which keys a query may see: the one predicate of the code base, and the head categories it knows.

A *template* numbers the images of a prompt. For a query token of image `a` the keys fall into five
disjoint groups:

    TEXT        text tokens
    OWN_SINK    sink tokens of image a
    OWN         the other tokens of image a
    OTHER_SINK  sink tokens of other images
    OTHER       the other tokens of other images

A head category is the set of groups it keeps. Text queries keep all five in every category. What a
category keeps is intersected with the model's own *base visibility*: causal, with whole images
visible to themselves when `bidirectional_images`, inside a sliding `window` when there is one.
"""

import enum
import operator
from typing import Any, NamedTuple


class KeyGroup(enum.IntFlag):
    """Bit set of key groups, as seen from a query token of one image."""

    TEXT = 1
    OWN_SINK = 2
    OWN = 4
    OTHER_SINK = 8
    OTHER = 16


ALL_KEY_GROUPS = (
    KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN | KeyGroup.OTHER_SINK | KeyGroup.OTHER
)


class HeadCategory(enum.IntEnum):
    """What an attention head needs (BlindSight). The value indexes a schedule's tables."""

    DENSE = 0
    SINK = 1
    INTRA_IMAGE = 2
    INTRA_IMAGE_SINK = 3

    @classmethod
    def parse(cls, value: Any) -> "HeadCategory":
        """A category from itself, its number, or its name in any case: "intra-image-sink".

        Raises:
          ValueError: it is none; the message lists them.
        """
        try:
            if isinstance(value, str):
                return cls[value.strip().upper().replace("-", "_")]
            return cls(operator.index(value))
        except (KeyError, TypeError, ValueError):
            names = ", ".join(f"{category.name} ({category.value})" for category in cls)
            raise ValueError(
                f"{value!r} is no head category; the categories are {names}."
            ) from None

    @property
    def groups(self) -> KeyGroup:
        """The key groups that image queries of such a head see."""
        return _GROUPS[self]


_GROUPS = {
    HeadCategory.DENSE: ALL_KEY_GROUPS,
    HeadCategory.SINK: KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OTHER_SINK,
    HeadCategory.INTRA_IMAGE: KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN,
    HeadCategory.INTRA_IMAGE_SINK: (
        KeyGroup.TEXT | KeyGroup.OWN_SINK | KeyGroup.OWN | KeyGroup.OTHER_SINK
    ),
}


class BaseVisibility(NamedTuple):
    """What a kind of layer lets any query see, before head categories: causal, but for these."""

    bidirectional_images: bool = False
    """Whether an image's tokens all see each other (Gemma 3)."""
    window: int | None = None
    """How many positions back a query sees, its own included; None for all."""


# A position that no query has, padding rows apart.
_NEVER = 2**31 - 1


class TokenInfo(NamedTuple):
    """What the predicate knows of tokens: NumPy, JAX or in-kernel arrays of one shape."""

    position: Any
    """int32: index in prompt order."""
    image: Any
    """int32: image number, -1 for text."""
    sink: Any
    """bool: whether later images may look at this image token as a sink."""


class KeyVisibility(NamedTuple):
    """What the predicate needs to know of keys, given what a head keeps: arrays of one shape."""

    position: Any
    """int32: index in prompt order, from which text queries see the key."""
    image: Any
    """int32: image number, -1 for text."""
    own_from: Any
    """int32: first position from which queries of the key's own image see it."""
    other_from: Any
    """int32: first position from which all other image queries see it."""


def visible(
    query: TokenInfo,
    key: TokenInfo,
    groups: Any,
    *,
    bidirectional_images: bool,
    window: int | None,
) -> Any:
    """Whether `query` sees `key` in a head that keeps `groups`.

    The fields of `query` and `key` must broadcast against each other; `groups` is a `KeyGroup`, or
    an integer (array) of the same bits. NumPy, XLA and the kernel evaluate the same function.

    Its two halves can be called apart: `key_visibility` looks at each key alone, and `sees` is left
    with two choices and one comparison per pair, which partial blocks of the kernel spend their
    time on.
    """
    keys = key_visibility(key, groups, bidirectional_images=bidirectional_images)
    return sees(query.position, query.image, keys, window=window)


def key_visibility(key: TokenInfo, groups: Any, *, bidirectional_images: bool) -> KeyVisibility:
    """From which position on a head that keeps `groups` sees each key."""
    where = key.image.__array_namespace__().where

    def keeps(group: KeyGroup) -> Any:
        return (groups & group.value) != 0

    is_text = key.image < 0
    own_image = where(key.sink, keeps(KeyGroup.OWN_SINK), keeps(KeyGroup.OWN))
    other_image = where(key.sink, keeps(KeyGroup.OTHER_SINK), keeps(KeyGroup.OTHER))
    own_from = key.position
    if bidirectional_images:
        own_from = where(is_text, key.position, 0)
    return KeyVisibility(
        key.position,
        key.image,
        where(where(is_text, keeps(KeyGroup.TEXT), own_image), own_from, _NEVER),
        where(where(is_text, keeps(KeyGroup.TEXT), other_image), key.position, _NEVER),
    )


def sees(query_position: Any, query_image: Any, key: KeyVisibility, *, window: int | None) -> Any:
    """Whether queries at these positions, of these images (-1: text), see the keys."""
    where = key.image.__array_namespace__().where
    seen_from = where(key.image == query_image, key.own_from, key.other_from)
    seen_from = where(query_image < 0, key.position, seen_from)
    seen = seen_from <= query_position
    if window is not None:
        seen = seen & (key.position > query_position - window)
    return seen
