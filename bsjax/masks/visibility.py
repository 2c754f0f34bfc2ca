"""Which keys a query sees: the one predicate that NumPy, XLA and every kernel evaluate.

Two things decide together: the model's own `Visibility`, which depends on the kind of layer
(causal, optionally bidirectional inside images, optionally limited to a sliding window), and the
`KeyGroup`s that a head keeps for its image queries. Text queries keep all groups in every head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from bsjax.checks import truth_value, whole_number
from bsjax.errors import MaskError
from bsjax.masks.categories import KeyGroup

# Greater than the position of any query, padding rows excepted.
_NEVER = 2**31 - 1


@dataclass(frozen=True)
class Visibility:
    """What the layers of one kind let any query see, before head categories: causal by default.

    Attributes:
      bidirectional_images: whether all tokens of an image see each other (Gemma 3).
      window: how many positions back a query sees, its own included; None for all.

    Raises:
      MaskError: `window` is not a whole number of at least 1, or `bidirectional_images` is not a
        boolean.
    """

    bidirectional_images: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        truth_value("bidirectional_images", self.bidirectional_images, error=MaskError)
        if self.window is not None:
            window = whole_number("window", self.window, least=1, most=_NEVER, error=MaskError)
            object.__setattr__(self, "window", window)


CAUSAL = Visibility()
"""A query sees every key up to its own position."""


class TokenInfo(NamedTuple):
    """What the predicate needs to know about tokens: NumPy or JAX arrays of one shape.

    Attributes:
      position: int32, index in prompt order.
      image: int32, image number; -1 for text.
      sink: bool, whether the token is a sink, which later images may look at.
      conversation: int32, which of several conversations the token belongs to.
    """

    position: Any
    image: Any
    sink: Any
    conversation: Any


PADDING_POSITION = 2**31 - 1
"""The position of padding rows, which no query sees."""

PADDING = TokenInfo(PADDING_POSITION, -1, False, -1)
"""What the predicate is told about padding rows."""


class KeyVisibility(NamedTuple):
    """From which query position on a head sees each key: NumPy or JAX arrays that broadcast.

    Attributes:
      position: int32, the key's index in prompt order. Text queries from this position on see it.
      image: int32, image number; -1 for text.
      own_from: int32. Queries of the key's own image see it from this position on.
      other_from: int32. All other image queries see it from this position on.
    """

    position: Any
    image: Any
    own_from: Any
    other_from: Any


def visible(query: TokenInfo, key: TokenInfo, groups: Any, visibility: Visibility) -> Any:
    """Whether `query` sees `key` in a head that keeps `groups`.

    Args:
      query: the queries; its fields must broadcast against those of `key`.
      key: the keys: NumPy arrays if `query` has NumPy arrays, JAX arrays if it has JAX arrays.
      groups: a `KeyGroup`, or an integer (array) with the same bits.
      visibility: what the model itself lets a query see.

    Returns:
      A boolean array of the shape that the arguments broadcast to.
    """
    seen = sees(query.position, query.image, key_visibility(key, groups, visibility), visibility)
    return seen & (query.conversation == key.conversation)


def key_visibility(key: TokenInfo, groups: Any, visibility: Visibility) -> KeyVisibility:
    """The half of the predicate that depends on keys alone; kernels compute it only once."""
    where = key.image.__array_namespace__().where
    own = where(key.sink, _keeps(groups, KeyGroup.OWN_SINK), _keeps(groups, KeyGroup.OWN))
    other = where(key.sink, _keeps(groups, KeyGroup.OTHER_SINK), _keeps(groups, KeyGroup.OTHER))
    other = where(key.image < 0, _keeps(groups, KeyGroup.TEXT), other)
    own_from = key.position * 0 if visibility.bidirectional_images else key.position
    return KeyVisibility(
        key.position, key.image, where(own, own_from, _NEVER), where(other, key.position, _NEVER)
    )


def _keeps(groups: Any, group: KeyGroup) -> Any:
    return (groups & group.value) != 0


def sees(query_position: Any, query_image: Any, key: KeyVisibility, visibility: Visibility) -> Any:
    """The half of the predicate that depends on pairs: two selects and a comparison for each.

    For queries and keys of one conversation: the ranges of a schedule never leave it.
    """
    where = key.image.__array_namespace__().where
    seen_from = where(key.image == query_image, key.own_from, key.other_from)
    seen_from = where(query_image < 0, key.position, seen_from)
    seen = seen_from <= query_position
    if visibility.window is not None:
        seen = seen & (key.position > query_position - visibility.window)
    return seen
