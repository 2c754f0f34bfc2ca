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


class TokenInfo(NamedTuple):
    """What the predicate knows of tokens: NumPy, JAX or in-kernel arrays of one shape."""

    position: Any
    """int32: index in prompt order."""
    image: Any
    """int32: image number, -1 for text."""
    sink: Any
    """bool: whether later images may look at this image token as a sink."""


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
    an integer (array) of the same bits. Only operators are used, so that NumPy, XLA and the kernel
    evaluate the same function.
    """
    text_key = key.image < 0
    own = key.image == query.image
    base = key.position <= query.position
    if bidirectional_images:
        base = base | (own & ~text_key)
    if window is not None:
        base = base & (key.position > query.position - window)

    def keeps(group: KeyGroup) -> Any:
        return (groups & group.value) != 0

    sink_key = (own & keeps(KeyGroup.OWN_SINK)) | (~own & keeps(KeyGroup.OTHER_SINK))
    other_key = (own & keeps(KeyGroup.OWN)) | (~own & keeps(KeyGroup.OTHER))
    image_key = (key.sink & sink_key) | (~key.sink & other_key)
    kept = (text_key & keeps(KeyGroup.TEXT)) | (~text_key & image_key)
    return base & (kept | (query.image < 0))
