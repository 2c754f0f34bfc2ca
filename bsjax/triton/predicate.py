"""The predicate of `bsjax.masks.visibility`, for pairs of queries and keys, inside a kernel."""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def sees(
    query_position,
    query_image,
    key_position,
    key_image,
    own_from,
    other_from,
    WINDOW: tl.constexpr,
):
    """Whether queries see keys: `bsjax.masks.visibility.sees`, and a test compares the two.

    `WINDOW` is the window, or 0 for none.
    """
    seen_from = tl.where(key_image == query_image, own_from, other_from)
    seen_from = tl.where(query_image < 0, key_position, seen_from)
    seen = seen_from <= query_position
    if WINDOW > 0:
        seen = seen & (key_position > query_position - WINDOW)
    return seen
