"""A prompt, chunk by chunk: where chunks end, and what the programs are given for each.

    prompt         T T A a a a T T | B b b T C c c T       two chunks, in prompt order
    their rows     T T T T A a a a | T T B b b C c c
    cache          T T T T T T A B C a a a b b c c

The cache has the rows of the whole prompt in packed order, which is known before the first chunk
runs. All text, all sinks and the other tokens of each image are therefore contiguous, wherever
chunks end. The rows of a chunk are its own tokens, text first, but with the sinks left in their
images. If every head is dense, the cache and the chunks are in prompt order. Layers with a window
keep a ring of the last positions instead (`bsjax.models.cache.WindowRows`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32

from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import Capacity, Schedule, build_span_schedule, category_tables
from bsjax.masks.template import Template
from bsjax.masks.visibility import TokenInfo, Visibility
from bsjax.models.cache import (
    PADDING_ROW,
    CachedRows,
    GlobalRows,
    OutputRows,
    Runs,
    WindowRows,
    ring_rows,
)
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.reuse import NOTHING, Reuse
from bsjax.runtime.sizes import MOST_IMAGES, Sizes, cache_rows

MOST_RUNS = 3
"""The most runs of rows of the cache that a chunk has: text, sinks and other image tokens."""


class ChunkArguments(NamedTuple):
    """What the programs are given about a chunk: a pytree, padded to one of the chunks' sizes.

    Attributes:
      token_ids: int32 [rows].
      position_ids: int32 [axes, rows].
      feature_row: int32 [rows], the row of each image token in the array of image features;
        `PADDING_ROW` for text and padding.
      cached_rows: for each kind of layers, how it writes and reads the cache.
      outputs: the row whose hidden state the program needs: that of the chunk's last token. Only in
        the prompt's last chunk does it see any keys; elsewhere its result is never read. None if
        the hidden states of all rows are needed.
    """

    token_ids: Any
    position_ids: Any
    feature_row: Any
    cached_rows: tuple[CachedRows, ...]
    outputs: OutputRows | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """One chunk of a prompt.

    Attributes:
      start: position of the chunk's first token.
      end: one past the position of its last token.
      order: the prompt position of each row, without padding rows.
      arguments: what the programs are given.
      images_end: how many image tokens this chunk and all chunks before it have.
    """

    start: int
    end: int
    order: Int32[np.ndarray, "tokens"]
    arguments: ChunkArguments
    images_end: int


class Chunks:
    """The chunks of a prompt.

    Args:
      inputs: the prompt.
      sizes: sizes of chunks.
      stacked_heads: how many query heads share a key head.
      new_tokens: how many tokens may follow the prompt.
      reuse: which tokens are in the cache already.
      most_parts: how many parts the long tiles of text rows in a chunk's schedule may be split
        into, all together; 0 splits none.
      all_outputs: whether the hidden states of all rows are needed, not only that of the prompt's
        last token.

    Attributes:
      inputs: as given.
      borders: for each chunk, the position of its first token, one past that of its last token, and
        the rows that it is padded to.
      cache_rows: rows of the cache.
      feature_rows: rows of the array of image features, enough for the image tokens of a chunk and
        of a group of images. Image token i of the prompt has row i modulo this number.
    """

    def __init__(
        self,
        inputs: ModelInputs,
        sizes: Sizes,
        stacked_heads: int,
        new_tokens: int,
        *,
        reuse: Reuse = NOTHING,
        most_parts: int = 0,
        all_outputs: bool = False,
    ) -> None:
        self.inputs = inputs
        self.cache_rows = reuse.cache_rows or cache_rows(inputs.tokens + new_tokens)
        self.feature_rows = sizes.chunks[-1] + inputs.group_tokens
        # If the tokens of an image see each other, all of its keys must be in the cache before any
        # of its queries runs: no chunk may end inside an image.
        whole_images = any(of.bidirectional_images for of in inputs.visibilities)
        self.borders = chunk_borders(
            inputs.template,
            sizes.chunks_for(self.cache_rows),
            whole_images=whole_images,
            start=reuse.start,
        )
        self._stacked_heads = stacked_heads
        self._most_parts = most_parts
        self._all_outputs = all_outputs
        self._tables = category_tables(inputs.head_category)
        self._device_keys: TokenInfo | None = None
        ends = (*reuse.span_starts[1:], inputs.tokens)
        spans = [Span(first, end) for first, end in zip(reuse.span_starts, ends, strict=True)]
        self._keys = Rows([inputs.template], spans, packed=inputs.is_sparse)
        is_image = inputs.template.image >= 0
        self._images_before = np.append(0, np.cumsum(is_image))
        feature_row = self.feature_row(self._images_before[:-1])
        self._feature_row = np.where(is_image, feature_row, PADDING_ROW)

    def __iter__(self) -> Iterator[Chunk]:
        """Builds one chunk after the other."""
        return (self.chunk(*borders) for borders in self.borders)

    def feature_row(
        self, image_tokens: Int[np.ndarray, "image_tokens"]
    ) -> Int[np.ndarray, "image_tokens"]:
        """The rows of image tokens' features, given their indices among all image tokens."""
        return image_tokens % self.feature_rows

    @cached_property
    def _row_of_token(self) -> Int[np.ndarray, "tokens"]:
        row = np.empty(self.inputs.tokens, np.int32)
        row[self._keys.position] = np.arange(self.inputs.tokens, dtype=np.int32)
        return row

    def chunk(self, start: int, end: int, rows: int) -> Chunk:
        """The chunk of the tokens `start` to `end` (exclusive), padded to `rows` rows."""
        inputs = self.inputs
        queries = Rows(
            [inputs.template], [Span(start, end)], packed=inputs.is_sparse, sinks_apart=False
        )
        order = queries.position

        def by_row(values: Any, padding: int) -> Int32[np.ndarray, "*axes rows"]:
            padded = np.full((*values.shape[:-1], rows), padding, np.int32)
            padded[..., : order.size] = values[..., order]
            return padded

        arguments = ChunkArguments(
            token_ids=by_row(inputs.token_ids, 0),
            position_ids=by_row(inputs.position_ids, 0),
            feature_row=by_row(self._feature_row, PADDING_ROW),
            cached_rows=tuple(
                self._cached_rows(visibility, queries, rows) for visibility in inputs.visibilities
            ),
            outputs=None if self._all_outputs else self._last_row(queries, rows),
        )
        return Chunk(start, end, order, arguments, int(self._images_before[end]))

    def _last_row(self, queries: Rows, rows: int) -> OutputRows:
        """The row of the chunk's last token. It sees keys only if it is the prompt's last token."""
        inputs = self.inputs
        ((_, end, _),) = queries.spans
        is_last = end == inputs.tokens
        last = Rows(queries.templates, [Span(end - 1, end)] * is_last, packed=queries.packed)
        visibility = inputs.visibilities[inputs.last_kind]
        keys, key_rows = self._keys_of(visibility, queries, rows)
        # The row has one tile, which may be split into parts.
        capacity = _room_for(1 + self._most_parts)
        schedule = self._schedule(visibility, last, keys, 1, key_rows, capacity)
        return OutputRows(np.flatnonzero(queries.position == end - 1).astype(np.int32), schedule)

    def _ring(self, visibility: Visibility) -> int:
        """Rows of the ring of layers with a window."""
        assert visibility.window is not None
        return ring_rows(visibility.window, self.cache_rows)

    def _keys_of(self, visibility: Visibility, queries: Rows, rows: int) -> tuple[Rows, int]:
        """The keys that a chunk sees, and the rows that they are padded to."""
        if visibility.window is None:
            return self._keys, self.cache_rows
        ((start, end, _),) = queries.spans
        first = max(0, start - (visibility.window - 1))
        keys = Rows(queries.templates, [Span(first, end)], packed=queries.packed)
        return keys, self._ring(visibility) + rows

    def _cached_rows(self, visibility: Visibility, queries: Rows, rows: int) -> CachedRows:
        keys, key_rows = self._keys_of(visibility, queries, rows)
        capacity = schedule_capacity(
            rows, self.inputs.blocks[0], self._stacked_heads, self._most_parts
        )
        schedule = self._schedule(visibility, queries, keys, rows, key_rows, capacity)
        if visibility.window is None:
            return GlobalRows(schedule, runs_of(self._row_of_token[queries.position], rows))
        ((first, _, _),) = keys.spans
        ((start, end, _),) = queries.spans
        ring = self._ring(visibility)
        # The place of each position from `first` on, if the chunk's rows followed the ring's.
        place = np.arange(first, end) % ring
        place[queries.position - first] = ring + np.arange(queries.tokens)
        place_of_key = np.zeros(key_rows, np.int32)
        place_of_key[: keys.tokens] = place[keys.position - first]
        row_of_ring = np.arange(ring, dtype=np.int32)
        kept = np.arange(max(start, end - ring), end)
        row_of_ring[kept % ring] = place[kept - first]
        return WindowRows(schedule, place_of_key, row_of_ring)

    def _schedule(
        self,
        visibility: Visibility,
        queries: Rows,
        keys: Rows,
        rows: int,
        key_rows: int,
        capacity: Capacity,
    ) -> Schedule:
        block_q, block_kv = self.inputs.blocks
        schedule = build_span_schedule(
            queries,
            keys,
            self._tables,
            block_q=block_q,
            block_kv=block_kv,
            visibility=visibility,
            query_rows=rows,
            key_rows=key_rows,
            stacked_heads=self._stacked_heads,
            capacity=capacity,
            most_parts=self._most_parts,
        )
        if keys is self._keys:
            # All chunks have the same keys, which are copied to the device only once.
            self._device_keys = self._device_keys or jax.device_put(schedule.keys)
            schedule = replace(schedule, keys=self._device_keys)
        return schedule


def schedule_capacity(rows: int, block_q: int, stacked_heads: int, most_parts: int) -> Capacity:
    """Enough entries for the schedule of any chunk of up to `MOST_IMAGES` images.

    Args:
      rows: rows of the chunk.
      block_q: rows of a tile, at most.
      stacked_heads: how many query heads the tiles of text rows stack.
      most_parts: how many parts these tiles may be split into, all together.
    """
    # The 16 more are for tiles that end early: where text ends, and every few lengths of a window.
    of_images = -(-rows // block_q) + MOST_IMAGES
    of_text = -(-rows // max(1, block_q // stacked_heads))
    return _room_for(max(of_images, of_text) + most_parts + 16)


def _room_for(tiles: int) -> Capacity:
    # Each tile has a few ranges in each of the three key segments. Tiles whose rows are so far
    # apart that a window leaves gaps between their ranges have more.
    return Capacity(tiles, 10 * tiles + 4 * MOST_IMAGES)


def runs_of(cache_row: Int[np.ndarray, "tokens"], rows: int) -> Runs:
    """The runs of a chunk, given the row of the cache of each of its rows.

    Args:
      cache_row: for each row of the chunk except padding, its row of the cache.
      rows: rows of the chunk, padding included.
    """
    order = np.zeros(rows, np.int32)
    order[: cache_row.size] = np.argsort(cache_row)
    in_order = cache_row[order[: cache_row.size]]
    firsts = np.append(0, np.flatnonzero(np.diff(in_order) != 1) + 1)
    assert firsts.size <= MOST_RUNS
    columns = np.zeros((3, MOST_RUNS), np.int32)
    columns[:, : firsts.size] = firsts, in_order[firsts], np.diff(firsts, append=in_order.size)
    return Runs(order, *columns)


def chunk_borders(
    template: Template, sizes: Sequence[int], *, whole_images: bool, start: int = 0
) -> list[tuple[int, int, int]]:
    """Where the chunks of a prompt begin and end, and the rows that each is padded to.

    The size of a chunk is the largest that does not exceed the number of tokens left, rounded up to
    a multiple of the smallest size. A chunk has fewer tokens than its size if it would otherwise
    have more than `MOST_IMAGES` images, or end inside an image although `whole_images` is set.

    Args:
      template: the prompt.
      sizes: rows of a chunk, ascending.
      whole_images: whether no chunk may end inside an image. An image that is larger than all sizes
        is then a chunk of its own, padded to a multiple of the largest size.
      start: position of the first token that has to run.

    Returns:
      For each chunk, the position of its first token, one past that of its last token, and the rows
      that it is padded to.
    """
    firsts = np.asarray(template.image_first)
    ends = firsts + np.asarray(template.image_tokens, np.int64)
    borders = []
    while start < template.tokens:
        left = template.tokens - start
        padded = -(-left // sizes[0]) * sizes[0]
        size = max(size for size in sizes if size <= padded)
        while True:
            end = min(start + size, template.tokens)
            first_image = int(np.searchsorted(ends, start, side="right"))
            if first_image + MOST_IMAGES < firsts.size:
                end = min(end, int(firsts[first_image + MOST_IMAGES]))
            cut = int(np.searchsorted(firsts, end, side="left")) - 1
            if whole_images and cut >= 0 and firsts[cut] < end < ends[cut]:
                end = int(firsts[cut])
            if end > start:
                break
            # The chunk begins with an image that does not fit.
            larger = [bigger for bigger in sizes if bigger > size]
            own = int(ends[first_image] - start)
            size = larger[0] if larger else -(-own // sizes[-1]) * sizes[-1]
        borders.append((start, end, size))
        start = end
    return borders
