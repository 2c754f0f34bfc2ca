"""Prompts that begin alike: one document and many questions, or several answers to one prompt.

What they share runs once. Prompts are sorted so that those that begin alike are neighbours; the
tree of their common prefixes then shows which groups save the most tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bsjax.runtime.inputs import ModelInputs

# A prefix takes a sequence of the cache for a while, and a chunk of its own.
_LEAST_TOKENS = 64
_LEAST_SAVED = 512


class SharedPrefix(NamedTuple):
    """Prompts that begin alike.

    Attributes:
      tokens: how many tokens they share.
      members: indices of the prompts, at least two.
    """

    tokens: int
    members: tuple[int, ...]


def shared_prefixes(prompts: Sequence[ModelInputs]) -> list[SharedPrefix]:
    """Groups of prompts that begin alike, such that the most tokens need not run again.

    A prompt is in at most one group. At least the last token of each prompt is its own, and no
    prefix ends inside an image.
    """
    # Several answers to one prompt share it, and its key.
    keys = {
        id(prompt): _sort_key(prompt) for prompt in {id(each): each for each in prompts}.values()
    }
    order = sorted(range(len(prompts)), key=lambda index: keys[id(prompts[index])])
    common = [0] + [
        common_tokens(prompts[before], prompts[after])
        for before, after in zip(order, order[1:], strict=False)
    ]

    def best(first: int, end: int) -> tuple[int, list[SharedPrefix]]:
        """The most tokens that the prompts `first` to `end` of the order save, and their groups."""
        if end - first < 2:
            return 0, []
        of_all = min(common[first + 1 : end])
        cuts = [index for index in range(first + 1, end) if common[index] == of_all]
        saved, groups = 0, []
        for start, stop in zip([first, *cuts], [*cuts, end], strict=True):
            saved_here, of_part = best(start, stop)
            saved += saved_here
            groups += of_part
        together = (end - first - 1) * of_all
        if of_all >= _LEAST_TOKENS and together >= max(saved, _LEAST_SAVED):
            return together, [SharedPrefix(of_all, tuple(sorted(order[first:end])))]
        return saved, groups

    return best(0, len(prompts))[1]


def common_tokens(one: ModelInputs, other: ModelInputs) -> int:
    """How many tokens two prompts begin with that are the same, images included.

    At least the last token of each is left out, and so is an image that is not wholly shared.
    """
    limit = min(one.tokens, other.tokens) - 1
    # Several answers to one prompt have one list of images.
    pairs = () if one.images is other.images else zip(one.images, other.images, strict=False)
    differs = np.flatnonzero(one.token_ids[:limit] != other.token_ids[:limit])
    common = int(differs[0]) if differs.size else limit
    firsts = one.template.image_first.tolist()
    for first, (image, of_other) in zip(firsts, pairs, strict=False):
        if first >= common:
            break
        if image.digest != of_other.digest:
            common = first
    # An image is computed as a whole.
    cut = int(one.template.image[common])
    return min(common, firsts[cut]) if cut >= 0 else common


def _sort_key(prompt: ModelInputs) -> bytes:
    """Sorts like the token ids, of which those of images tell images apart."""
    key = prompt.token_ids.astype(np.int64)
    for index, image in enumerate(prompt.images):
        first = int(prompt.template.image_first[index])
        key[first : first + image.tokens] = 2**32 + int(image.digest[:8], 16)
    return key.astype(">i8").tobytes()
