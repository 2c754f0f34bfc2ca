"""What a prompt looks like, token by token, and the order in which the model runs it.

    prompt order   T T A a a a T T B b b T C c c c T        T text, A B C sinks, a b c the rest
    packed order   T T T T T T | A B C | a a a | b b | c c c

The order of the keys does not change attention, as long as each token keeps its position. In packed
order the keys that an image query sees are a few contiguous ranges: text before it, sinks before
it, its own image. In prompt order they are scattered over nearly every block.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from bsjax.checks import shown, whole_number
from bsjax.errors import TemplateError
from bsjax.masks.visibility import TokenInfo

# Far more than any model accepts, and far below the limit of int32.
_MOST_TOKENS = 100_000_000


@dataclass(frozen=True)
class Sinks:
    """Which tokens of every image are sinks: its first tokens, and those at some offsets.

    Args:
      first: how many tokens at the start of an image are sinks. At least one always is, so that
        every image query has a key to look at.
      offsets: more sinks, counted from the image's first token. Offsets beyond the end of an image
        are ignored for that image.

    Raises:
      TemplateError: `first` is below 1 or an offset is negative.
    """

    first: int = 1
    offsets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.offsets, str) or not isinstance(self.offsets, Iterable):
            raise TemplateError(
                f"Sinks: `offsets` must be a tuple of whole numbers, got {shown(self.offsets)}."
            )
        first = whole_number("Sinks: `first`", self.first, least=1, error=TemplateError)
        offsets = tuple(
            whole_number(
                "Sinks: an offset from an image's first token", offset, least=0, error=TemplateError
            )
            for offset in self.offsets
        )
        object.__setattr__(self, "first", first)
        # Sorted, so that equal sinks compare equal and look the same in a file.
        object.__setattr__(self, "offsets", tuple(sorted(set(offsets))))

    def of_image(self, tokens: int) -> Bool[np.ndarray, "tokens"]:
        """Which tokens of an image of `tokens` tokens are sinks."""
        sink = np.zeros(tokens, bool)
        sink[: self.first] = True
        sink[[offset for offset in self.offsets if offset < tokens]] = True
        return sink


@dataclass(frozen=True)
class Text:
    """A run of text tokens, for `Template.from_segments`."""

    tokens: int


@dataclass(frozen=True)
class Image:
    """One image's tokens, for `Template.from_segments`."""

    tokens: int


@dataclass(frozen=True, eq=False)
class Template:
    """A prompt's structure: which tokens belong to which image, and which of them are sinks.

    Made by `from_tokens` or `from_segments`. Images are contiguous and numbered 0, 1, 2, ... in
    prompt order.

    Attributes:
      image: int32, the image number of each token; -1 for text.
      sink: whether each token is a sink.
      image_first: the position of each image's first token.
      image_tokens: how many tokens each image has, in prompt order.

    Raises:
      TemplateError: images are not contiguous or not numbered in order, or a text token is a sink.
    """

    image: Int[np.ndarray, "tokens"]
    sink: Bool[np.ndarray, "tokens"]
    image_first: Int[np.ndarray, "images"] = field(init=False)
    image_tokens: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        # Checked before the numbers are cut off to 32 bits, which makes others of them.
        numbered = _integers("A template's image numbers", self.image)
        if numbered.size and not -1 <= numbered.min() <= numbered.max() < numbered.size:
            raise TemplateError(
                "A template's images must be numbered from 0, with -1 for text, got "
                f"{shown(self.image)}."
            )
        image = np.ascontiguousarray(numbered, dtype=np.int32)
        sink = np.ascontiguousarray(_truth_values("A template's sinks", self.sink))
        if image.ndim != 1 or image.shape != sink.shape:
            raise TemplateError(
                "A template's image and sink arrays must be one-dimensional and equally long, "
                f"got shapes {image.shape} and {sink.shape}."
            )
        starts = _run_starts(image)
        starts_image = image[starts] >= 0
        numbers = image[starts[starts_image]]
        if not np.array_equal(numbers, np.arange(numbers.size)):
            raise TemplateError(
                "A template's images must be contiguous and numbered 0, 1, 2, ... in prompt order, "
                f"with -1 for text; the runs found are numbered {numbers[:20].tolist()}."
            )
        if np.any(sink & (image < 0)):
            raise TemplateError("A text token cannot be a sink: text is visible to every image.")
        image.setflags(write=False)
        sink.setflags(write=False)
        object.__setattr__(self, "image", image)
        object.__setattr__(self, "sink", sink)
        lengths = np.diff(starts, append=image.size)[starts_image]
        object.__setattr__(self, "image_first", starts[starts_image])
        object.__setattr__(self, "image_tokens", tuple(lengths.tolist()))

    @classmethod
    def from_tokens(
        cls,
        token_ids: Sequence[int] | Int[np.ndarray, "tokens"],
        image_token_id: int,
        sinks: Sinks = Sinks(),  # noqa: B008 (frozen, hence safe to share)
        image_tokens: Sequence[int] | None = None,
    ) -> "Template":
        """The template of a tokenized prompt, in which each image token is a placeholder.

        Args:
          token_ids: ids of one prompt, as returned by a Hugging Face processor.
          image_token_id: the id of the placeholder (Qwen2-VL: 151655); -1 for a model that reads
            text only.
          sinks: which tokens of every image are sinks.
          image_tokens: how many tokens each image has. By default every run of placeholders is one
            image, so this is needed only if images follow each other with no token between them.

        Raises:
          TemplateError: `image_tokens` does not add up to the placeholders, or an image would be
            split by text.
        """
        ids = _integers("token_ids", token_ids)
        if ids.ndim != 1:
            raise TemplateError(f"token_ids must be one prompt of shape [tokens], got {ids.shape}.")
        placeholder = ids == whole_number(
            "image_token_id", image_token_id, least=-1, error=TemplateError
        )
        image = np.full(ids.shape, -1, np.int32)
        if image_tokens is None:
            run_starts = placeholder & ~np.concatenate(([False], placeholder[:-1]))
            image[placeholder] = (np.cumsum(run_starts) - 1)[placeholder]
        else:
            lengths = _integers("image_tokens", image_tokens).reshape(-1)
            if lengths.size and lengths.min() < 1:
                raise TemplateError(
                    f"Every image needs at least one token, got {lengths.tolist()}."
                )
            # Added in Python: in 64 bits a sum of large numbers can come out right, and NumPy then
            # writes beyond the end of an array.
            total = sum(lengths.tolist())
            if total != placeholder.sum():
                raise TemplateError(
                    f"The prompt has {int(placeholder.sum())} image placeholder tokens, but "
                    f"image_tokens adds up to {total} over {lengths.size} images."
                )
            image[placeholder] = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
        return cls._with_sinks(image, sinks)

    @classmethod
    def from_segments(
        cls,
        segments: Sequence[Text | Image],
        sinks: Sinks = Sinks(),  # noqa: B008
    ) -> "Template":
        """The template of a prompt given as runs: `[Text(12), Image(256), Text(5)]`.

        Raises:
          TemplateError: a segment is neither Text nor Image, an image has no token, or a text's
            length is negative.
        """
        if not isinstance(segments, Iterable):
            raise TemplateError(
                f"segments must be a list of Text(n) and Image(n), got {shown(segments)}."
            )
        numbers, lengths = [], []
        images = 0
        for segment in segments:
            if isinstance(segment, Image):
                least, number = 1, images
                images += 1
            elif isinstance(segment, Text):
                least, number = 0, -1
            else:
                raise TemplateError(f"A segment must be Text(n) or Image(n), got {shown(segment)}.")
            numbers.append(number)
            lengths.append(
                whole_number(f"{segment}: tokens", segment.tokens, least=least, error=TemplateError)
            )
        if sum(lengths) > _MOST_TOKENS:
            raise TemplateError(
                f"A prompt can have at most {_MOST_TOKENS:,} tokens, got {shown(sum(lengths))}."
            )
        image = np.repeat(np.asarray(numbers, np.int32), np.asarray(lengths, np.int64))
        return cls._with_sinks(image, sinks)

    @classmethod
    def _with_sinks(cls, image: np.ndarray, sinks: Sinks) -> "Template":
        if not isinstance(sinks, Sinks):
            raise TemplateError(f"sinks must be bsjax.Sinks, got {shown(sinks)}.")
        # An image that text splits has two runs with the same number; the constructor rejects it.
        sink = np.zeros(image.shape, bool)
        borders = [*_run_starts(image).tolist(), image.size]
        for start, end in itertools.pairwise(borders):
            if image[start] >= 0:
                sink[start:end] = sinks.of_image(end - start)
        return cls(image, sink)

    @property
    def tokens(self) -> int:
        """How many tokens the prompt has."""
        return self.image.size

    @property
    def num_images(self) -> int:
        """How many images the prompt has."""
        return len(self.image_tokens)

    @property
    def info(self) -> TokenInfo:
        """What the predicate needs to know about every token, in prompt order."""
        position = np.arange(self.tokens, dtype=np.int32)
        return TokenInfo(position, self.image, self.sink, np.zeros_like(position))

    @cached_property
    def packed_order(self) -> Int[np.ndarray, "tokens"]:
        """The prompt position of every row in packed order: text, then sinks, then the rest."""
        return self.packed_order_of(0, self.tokens)

    def packed_order_of(
        self, start: int, end: int, *, sinks_apart: bool = True
    ) -> Int[np.ndarray, "span"]:
        """int32: the positions `start` to `end` (exclusive) in packed order.

        Without `sinks_apart`, sinks stay in their images: text, then all image tokens by position.
        """
        sink = self.sink[start:end] & sinks_apart
        text = self.image[start:end] < 0
        parts = (text, sink, ~(text | sink))
        return start + np.concatenate([np.flatnonzero(part).astype(np.int32) for part in parts])

    def __repr__(self) -> str:
        return (
            f"Template(tokens={self.tokens}, images={self.num_images}, "
            f"text={int((self.image < 0).sum())}, sinks={int(self.sink.sum())})"
        )


def _integers(name: str, values: Any) -> Int[np.ndarray, "..."]:
    """Values as an array of integers.

    Raises:
      TemplateError: they are not whole numbers, or do not fit 64 bits.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        array = None
    # An empty list becomes an array of floats.
    if array is None or (array.size and array.dtype.kind not in "iu"):
        raise TemplateError(f"{name} must be whole numbers, got {shown(values)}.")
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise TemplateError(f"{name} must fit 64 bits, got {shown(values)}.")
    return array.astype(np.int64)


def _truth_values(name: str, values: Any) -> Bool[np.ndarray, "..."]:
    """Values as an array of truth values.

    Raises:
      TemplateError: they are neither truth values nor whole numbers.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        array = None
    if array is None or (array.size and array.dtype.kind not in "biu"):
        raise TemplateError(f"{name} must be True or False, got {shown(values)}.")
    return array.astype(bool)


def _run_starts(image: np.ndarray) -> np.ndarray:
    """Where runs of equal image numbers start."""
    if not image.size:
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.append(True, image[1:] != image[:-1]))
