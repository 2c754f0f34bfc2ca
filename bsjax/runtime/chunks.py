"""Prompts, chunk by chunk: where chunks end, and what the programs are given for each.

    prompt         T T A a a a T T | B b b T C c c T       two chunks, in prompt order
    their rows     T T T T A a a a | T T B b b C c c
    cache          T T T T T T A B C a a a b b c c

The cache has the rows of the whole prompt in packed order, which is known before the first chunk
runs. All text, all sinks and the other tokens of each image are therefore contiguous, wherever
chunks end. The rows of a chunk are its own tokens, text first, but with the sinks left in their
images. If every head is dense, the cache and the chunks are in prompt order. Layers with a window
keep a ring of the last positions instead (`bsjax.models.cache.WindowRows`).

A cache may have several sequences, each with the rows of one prompt. A chunk is then filled with
the tokens of one prompt after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int, Int32

from bsjax.masks.categories import HeadCategory
from bsjax.masks.dealing import Attending, Dealt, deal
from bsjax.masks.query_rows import stretch
from bsjax.masks.rows import Rows, Span
from bsjax.masks.schedule import Capacity, Schedule, build_span_schedule, category_tables
from bsjax.masks.template import Template
from bsjax.masks.visibility import Visibility
from bsjax.models.cache import (
    PADDING_ROW,
    CachedRows,
    GlobalRows,
    OutputRows,
    Runs,
    WindowRows,
    ring_rows,
)
from bsjax.models.collectives import shared_out
from bsjax.prompts.prompt import PromptImage
from bsjax.runtime.inputs import ModelInputs
from bsjax.runtime.reuse import NOTHING, Reuse
from bsjax.runtime.sizes import MOST_PROMPTS, most_images

MOST_RUNS = 3
"""The most runs of rows of the cache that the tokens of a prompt in a chunk have: text, sinks and
other image tokens."""

_MORE_RANGES = 192
"""Ranges that a schedule of few tiles has room for, beyond those of each tile."""

# A chunk with no more images has room for sparse heads that wait for dense ones.
_USUAL_IMAGES = 16

# Rows of a run if a chunk may have several prompts, which are then likely to have few rows each.
_SHORT_RUN = 64


class CacheLayout(NamedTuple):
    """The shape of a cache.

    Attributes:
      rows: rows of a sequence, in layers that keep all tokens.
      sequences: how many sequences there are.
    """

    rows: int
    sequences: int = 1

    @property
    def most_prompts(self) -> int:
        """The most prompts of a chunk."""
        return min(self.sequences, MOST_PROMPTS)


@dataclass(frozen=True, eq=False)
class PlacedPrompt:
    """A prompt, the sequence of the cache that it has, and the part of it that runs.

    Attributes:
      inputs: the prompt.
      reuse: which tokens are in the cache already.
      sequence: index of its sequence.
      end: one past the position of the last token that runs. It is less than the prompt's length if
        others will continue from there.
    """

    inputs: ModelInputs
    reuse: Reuse = NOTHING
    sequence: int = 0
    end: int = -1

    def __post_init__(self) -> None:
        if self.end < 0:
            object.__setattr__(self, "end", self.inputs.tokens)

    @property
    def spans(self) -> list[Span]:
        """The spans of the tokens before `end`."""
        ends = (*self.reuse.span_starts[1:], self.end)
        return [Span(*borders) for borders in zip(self.reuse.span_starts, ends, strict=True)]

    @cached_property
    def row_of_token(self) -> Int[np.ndarray, "end"]:
        """The row of each token within its sequence."""
        rows = Rows([self.inputs.template], self.spans, packed=self.inputs.is_sparse)
        row = np.empty(self.end, np.int32)
        row[rows.position] = np.arange(self.end, dtype=np.int32)
        return row

    @cached_property
    def images_before(self) -> Int[np.ndarray, "positions"]:
        """How many image tokens that run come before each position."""
        counts = np.append(0, np.cumsum(self.inputs.template.image >= 0))
        return counts - counts[self.reuse.start]

    @property
    def images(self) -> tuple[PromptImage, ...]:
        """The images that run. None is cut."""
        first = self.inputs.template.image_first
        begin, end = np.searchsorted(first, [self.reuse.start, self.end])
        return self.inputs.images[begin:end]


class PromptSlice(NamedTuple):
    """Consecutive tokens of a prompt that are in one chunk.

    Attributes:
      prompt: the prompt.
      start: position of the first token.
      end: one past the position of the last token.
    """

    prompt: PlacedPrompt
    start: int
    end: int

    @property
    def is_last(self) -> bool:
        """Whether the prompt's last token is among them."""
        return self.end == self.prompt.inputs.tokens


class ChunkArguments(NamedTuple):
    """What the programs are given about a chunk: a pytree, padded to one of the chunks' sizes.

    On several devices, each is given its own, with equally many rows.

    Attributes:
      token_ids: int32 [rows].
      position_ids: int32 [axes, rows].
      feature_row: int32 [rows], the row of each image token in the array of image features;
        `PADDING_ROW` for text and padding.
      cached_rows: for each kind of layers, how it writes and reads the cache.
      outputs: the rows whose hidden states the program needs: those of the last tokens of prompts.
        There are as many as a chunk may have prompts; the results of others are never read. None if
        the hidden states of all rows are needed.
    """

    token_ids: Any
    position_ids: Any
    feature_row: Any
    cached_rows: tuple[CachedRows, ...]
    outputs: OutputRows | None


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens that run together.

    Attributes:
      parts: the slices of prompts that it has.
      position: the position of each row in its prompt, -1 for padding; the rows of one device after
        the other.
      arguments: what the programs are given: `ChunkArguments`, or a `Shares` of them.
      images_end: how many image tokens this chunk and all chunks before it have.
      blocks: the blocks that the attention of each device visits, in all layers and heads, as far
        as it is known when rows are dealt; None on one device.
    """

    parts: tuple[PromptSlice, ...]
    position: Int32[np.ndarray, "rows"]
    arguments: Any
    images_end: int
    blocks: Int[np.ndarray, "devices"] | None = None

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return sum(each.end - each.start for each in self.parts)

    @property
    def last_parts(self) -> list[PromptSlice]:
        """The slices with the last token of a prompt, in the order of the program's outputs."""
        return [each for each in self.parts if each.is_last]


class ChunkRows:
    """The rows of a chunk: those of one device after those of another, each padded alike.

    Attributes:
      of_devices: the tokens of each device.
      of_each: rows of each device, with padding.
      position: the position of each row in its prompt; -1 for padding.
    """

    def __init__(self, of_devices: Sequence[Rows], rows: int) -> None:
        self.of_devices, self.of_each = of_devices, rows // len(of_devices)
        self.position = np.full(rows, -1, np.int32)
        for device, of_device in enumerate(of_devices):
            first = device * self.of_each
            self.position[first : first + of_device.tokens] = of_device.position

    def rows_of(self, index: int) -> tuple[Int[np.ndarray, "_"], Int32[np.ndarray, "_"]]:
        """The rows of a prompt's tokens, and their positions."""
        slices = [queries.rows_of(index) for queries in self.of_devices]
        rows = np.concatenate(
            [
                device * self.of_each + np.arange(own.start, own.stop)
                for device, own in enumerate(slices)
            ]
        )
        return rows, self.position[rows]


class Chunks:
    """The chunks of some prompts.

    Args:
      prompts: the prompts, in the order in which they run. All have the same head categories.
      layout: the shape of the cache.
      sizes: rows of a chunk, ascending.
      stacked_heads: how many query heads share a key head.
      feature_rows: rows of the array of image features, enough for the image tokens of a chunk and
        of a group of images. Image token i of those that run has row i modulo this number.
      most_parts: how many parts the long tiles of text rows in a chunk's schedule may be split
        into, all together; 0 splits none.
      all_outputs: whether the hidden states of all rows are needed, not only those of the prompts'
        last tokens.
      devices: how many devices the rows of a chunk and those of the cache are divided among.
      on_a_mesh: whether programs run on the devices of a mesh.

    Attributes:
      prompts: as given.
      layout: as given.
      feature_rows: as given.
      borders: for each chunk, its slices of prompts, and the rows that it is padded to.
    """

    def __init__(
        self,
        prompts: Sequence[PlacedPrompt],
        layout: CacheLayout,
        sizes: Sequence[int],
        stacked_heads: int,
        *,
        feature_rows: int,
        most_parts: int = 0,
        all_outputs: bool = False,
        devices: int = 1,
        on_a_mesh: bool = False,
    ) -> None:
        self._devices, self._on_a_mesh = devices, on_a_mesh
        self.prompts, self.layout, self.feature_rows = tuple(prompts), layout, feature_rows
        self._inputs = prompts[0].inputs
        # If the tokens of an image see each other, all of its keys must be in the cache before any
        # of its queries runs: no chunk may end inside an image.
        whole_images = any(
            visibility.bidirectional_images for visibility in self._inputs.visibilities
        )
        self.borders = chunk_borders(
            self.prompts,
            sizes,
            most_prompts=layout.most_prompts,
            devices=devices,
            whole_images=whole_images,
        )
        self._stacked_heads = stacked_heads
        self._most_parts = most_parts
        self._all_outputs = all_outputs
        self._tables = category_tables(self._inputs.head_category)
        # The keys of the last chunk: often those of the next one too.
        self._keys: tuple[tuple[PlacedPrompt, ...], Rows, list[Any]] | None = None
        images = [int(prompt.images_before[prompt.end]) for prompt in self.prompts]
        firsts = np.cumsum([0, *images]).tolist()
        self._first_image = {
            id(prompt): first for prompt, first in zip(self.prompts, firsts, strict=False)
        }

    def __iter__(self) -> Iterator[Chunk]:
        """Builds one chunk after the other."""
        return (self.chunk(*borders) for borders in self.borders)

    def feature_row(
        self, image_tokens: Int[np.ndarray, "image_tokens"]
    ) -> Int[np.ndarray, "image_tokens"]:
        """The rows of image tokens' features, given their indices among all that run."""
        return image_tokens % self.feature_rows

    def chunk(self, slices: Sequence[PromptSlice], rows: int) -> Chunk:
        """The chunk of these tokens, padded to `rows` rows."""
        queries = Rows(
            [each.prompt.inputs.template for each in slices],
            [Span(each.start, each.end, index) for index, each in enumerate(slices)],
            packed=self._inputs.is_sparse,
            sinks_apart=False,
        )
        keys = [
            self._keys_of(visibility, slices, queries, rows)
            for visibility in self._inputs.visibilities
        ]
        of_devices, blocks = [queries], None
        if self._devices > 1:
            dealt = self._dealt(queries, keys, rows)
            blocks = dealt.blocks
            of_devices = list(map(queries.taken, dealt.rows))
        placed = ChunkRows(of_devices, rows)
        outputs = None if self._all_outputs else self._last_rows(slices, placed, keys)
        arguments = [
            self._arguments_of(device, slices, placed, keys, outputs)
            for device in range(self._devices)
        ]
        images_end = [
            self._first_image[id(each.prompt)] + int(each.prompt.images_before[each.end])
            for each in slices
        ]
        return Chunk(tuple(slices), placed.position, shared_out(arguments), max(images_end), blocks)

    def _dealt(self, queries: Rows, keys: Sequence[tuple[Rows, int]], rows: int) -> Dealt:
        """The query rows of each device."""
        inputs = self._inputs
        block_q, block_kv = inputs.blocks
        family, config, _ = inputs.architecture
        kinds = family.layer_kinds(config)
        attending = [
            Attending(
                kind_keys,
                visibility,
                np.bincount(
                    inputs.head_category[kinds == kind].ravel(), minlength=len(HeadCategory)
                ),
            )
            for kind, (visibility, (kind_keys, _)) in enumerate(
                zip(inputs.visibilities, keys, strict=True)
            )
        ]
        return deal(
            queries,
            attending,
            self._devices,
            rows // self._devices,
            block_q=block_q,
            block_kv=block_kv,
            stacked_heads=self._stacked_heads,
        )

    def _arguments_of(
        self,
        device: int,
        slices: Sequence[PromptSlice],
        placed: ChunkRows,
        keys: Sequence[tuple[Rows, int]],
        outputs: OutputRows | None,
    ) -> ChunkArguments:
        """What the programs of one device are given."""
        queries = placed.of_devices[device]
        positions = [queries.position[queries.rows_of(index)] for index in range(len(slices))]
        prompts = [each.prompt for each in slices]
        by_row = partial(_by_row, list(zip(prompts, positions, strict=True)), placed.of_each)
        return ChunkArguments(
            token_ids=by_row(lambda prompt, position: prompt.inputs.token_ids[position], 0),
            position_ids=by_row(
                lambda prompt, position: prompt.inputs.position_ids[:, position], 0
            ),
            feature_row=by_row(self._feature_rows, PADDING_ROW),
            cached_rows=tuple(
                self._cached_rows(visibility, device, slices, placed, kind_keys)
                for visibility, kind_keys in zip(self._inputs.visibilities, keys, strict=True)
            ),
            outputs=outputs,
        )

    def _feature_rows(
        self, prompt: PlacedPrompt, position: Int[np.ndarray, "rows"]
    ) -> Int[np.ndarray, "rows"]:
        index = self._first_image[id(prompt)] + prompt.images_before[position]
        is_image = prompt.inputs.template.image[position] >= 0
        return np.where(is_image, self.feature_row(index), PADDING_ROW)

    def _last_rows(
        self,
        slices: Sequence[PromptSlice],
        placed: ChunkRows,
        keys: Sequence[tuple[Rows, int]],
    ) -> OutputRows:
        """The rows of the prompts' last tokens. All others see no keys."""
        inputs, most = self._inputs, self.layout.most_prompts
        ends = [index for index, each in enumerate(slices) if each.is_last]
        rows = np.zeros(most, np.int32)
        for output, index in enumerate(ends):
            chunk_rows, position = placed.rows_of(index)
            (row,) = np.flatnonzero(position == slices[index].end - 1)
            rows[output] = chunk_rows[row]
        last = Rows(
            [each.prompt.inputs.template for each in slices],
            [Span(slices[index].end - 1, slices[index].end, index) for index in ends],
            packed=inputs.is_sparse,
        )
        capacity = schedule_capacity(
            most, inputs.blocks[0], self._stacked_heads, self._most_parts, most, images=most
        )
        visibility = inputs.visibilities[inputs.last_kind]
        last_keys = keys[inputs.last_kind]
        return OutputRows(rows, self._schedule(visibility, last, *last_keys, most, capacity))

    def _ring(self, visibility: Visibility) -> int:
        """Rows of a sequence in layers with a window."""
        assert visibility.window is not None
        return ring_rows(visibility.window, self.layout.rows)

    def _keys_of(
        self, visibility: Visibility, slices: Sequence[PromptSlice], queries: Rows, rows: int
    ) -> tuple[Rows, int]:
        """The keys that a chunk sees, and the rows that they are padded to."""
        if visibility.window is not None:
            spans = [
                Span(max(0, each.start - (visibility.window - 1)), each.end, index)
                for index, each in enumerate(slices)
            ]
            keys = Rows(queries.templates, spans, packed=queries.packed)
            return keys, self.layout.most_prompts * self._ring(visibility) + rows
        prompts = tuple(each.prompt for each in slices)
        if self._keys is None or self._keys[0] != prompts:
            spans, first_rows = [], []
            for index in np.argsort([prompt.sequence for prompt in prompts]).tolist():
                first_row = prompts[index].sequence * self.layout.rows
                for start, end, _ in prompts[index].spans:
                    spans.append(Span(start, end, index))
                    first_rows.append(first_row + start)
            keys = Rows(queries.templates, spans, packed=queries.packed, first_row=first_rows)
            self._keys = prompts, keys, []
        return self._keys[1], self.layout.sequences * self.layout.rows

    def _cached_rows(
        self,
        visibility: Visibility,
        device: int,
        slices: Sequence[PromptSlice],
        placed: ChunkRows,
        keys: tuple[Rows, int],
    ) -> CachedRows:
        rows, most_prompts = placed.of_each, self.layout.most_prompts
        block_q, stretches = self._inputs.blocks[0], 0
        if visibility.window is not None:
            # Of each prompt, the chunk has tokens in one more than fit into them.
            stretches = most_prompts + placed.position.size // stretch(visibility.window, block_q)
        capacity = schedule_capacity(
            rows,
            block_q,
            self._stacked_heads,
            self._most_parts,
            most_prompts,
            # A device may be dealt tokens of nearly all images of a chunk.
            images=min(most_images(placed.position.size, self._devices), rows),
            stretches=stretches,
        )
        schedule = self._schedule(visibility, placed.of_devices[device], *keys, rows, capacity)
        cache_row = np.full(placed.position.size, PADDING_ROW, np.int32)
        sequences = self.layout.sequences
        if visibility.window is None:
            of_device = self.layout.rows // self._devices
            for index, each in enumerate(slices):
                chunk_rows, position = placed.rows_of(index)
                # Of those that this device has; others are negative or too large.
                own = each.prompt.row_of_token[position] - device * of_device
                is_own = (own >= 0) & (own < of_device)
                first = each.prompt.sequence * of_device
                cache_row[chunk_rows] = np.where(is_own, first + own, PADDING_ROW)
            runs = self._runs(cache_row, sequences * of_device)
            return GlobalRows(schedule, runs, sequences)
        ring = self._ring(visibility)
        all_rows = sequences * ring
        window, key_rows = keys
        place_of_key = np.zeros(key_rows, np.int32)
        for index, each in enumerate(slices):
            (chunk_rows, position), (start, end, _) = placed.rows_of(index), window.spans[index]
            first_row = each.prompt.sequence * ring
            place = first_row + np.arange(start, end) % ring
            # The chunk's own rows follow those of all rings.
            place[position - start] = all_rows + chunk_rows
            window_rows = window.rows_of(index)
            place_of_key[window_rows] = place[window.position[window_rows] - start]
            kept = np.where(position >= end - ring, first_row + position % ring, PADDING_ROW)
            cache_row[chunk_rows] = kept
        return WindowRows(schedule, place_of_key, self._runs(cache_row, all_rows))

    def _runs(self, cache_row: Int[np.ndarray, "rows"], all_rows: int) -> Runs:
        """The runs of a chunk in a cache that has `all_rows` rows."""
        rows, most = cache_row.size, self.layout.most_prompts
        if most == 1:
            return runs_of(cache_row, MOST_RUNS, min(rows, all_rows), all_rows)
        length = min(_SHORT_RUN, rows, all_rows)
        return runs_of(cache_row, rows // length + most * MOST_RUNS, length, all_rows)

    def _schedule(
        self,
        visibility: Visibility,
        queries: Rows,
        keys: Rows,
        key_rows: int,
        rows: int,
        capacity: Capacity,
    ) -> Schedule:
        block_q, block_kv = self._inputs.blocks
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
        if not self._on_a_mesh and self._keys is not None and keys is self._keys[1]:
            # Chunks of the same prompts have the same keys, which are copied to the device once.
            device_keys = self._keys[2]
            if not device_keys:
                device_keys.append(jax.device_put(schedule.keys))
            schedule = replace(schedule, keys=device_keys[0])
        return schedule


def schedule_capacity(
    rows: int,
    block_q: int,
    stacked_heads: int,
    most_parts: int,
    most_prompts: int = 1,
    images: int | None = None,
    stretches: int = 0,
) -> Capacity:
    """Enough entries for the schedule of any chunk.

    Args:
      rows: rows of the chunk.
      block_q: rows of a tile, at most.
      stacked_heads: how many query heads the tiles of text rows stack.
      most_parts: how many parts these tiles may be split into, all together.
      most_prompts: how many prompts the chunk may have tokens of.
      images: how many images the chunk may have tokens of; by default `most_images`.
      stretches: how many more tiles of text rows, and of image rows, may end early because of a
        window (see `bsjax.masks.query_rows.stretch`).
    """
    images = most_images(rows) if images is None else images
    text_rows = max(1, block_q // stacked_heads)
    full_image_tiles, full_text_tiles = -(-rows // block_q), -(-rows // text_rows)
    # Of its last tile, each image may fill little, each prompt's text, and the padding rows, which
    # are in the tables for image rows.
    more_image_tiles = images + 1 + stretches
    more_text_tiles = most_prompts + stretches
    # Text rows, image rows and padding rows share the chunk: however they do, their full tiles are
    # no more items than if all rows were of one kind. What images do not need is for tables that
    # wait for each other: it should be enough for those of sparse heads to wait for dense ones.
    items = max(stacked_heads * full_image_tiles, full_text_tiles)
    items += stacked_heads * max(more_image_tiles, full_image_tiles + _USUAL_IMAGES)
    # A tile has at least one row.
    items = min(stacked_heads * rows, items + more_text_tiles) + most_parts
    image_tiles = min(rows, full_image_tiles + more_image_tiles)
    text_tiles = min(rows, full_text_tiles + more_text_tiles) + most_parts
    tiles = max(2 * image_tiles, text_tiles)
    # Each tile has a few ranges in each of the three key segments. Tiles whose rows are so far
    # apart that a window leaves gaps between their ranges have more.
    return Capacity(tiles, 10 * tiles + _MORE_RANGES, items)


def runs_of(cache_row: Int[np.ndarray, "tokens"], count: int, length: int, all_rows: int) -> Runs:
    """The runs of a chunk, given the row of the cache that each of its rows goes to.

    Args:
      cache_row: for each row of the chunk, its row of the cache; `PADDING_ROW` for padding and for
        rows that are not kept.
      count: how many runs there is room for.
      length: rows of a run. Longer ones are cut.
      all_rows: rows of the cache.
    """
    chunk_row = np.argsort(cache_row, kind="stable")
    chunk_row = chunk_row[: np.count_nonzero(cache_row != PADDING_ROW)]
    ordered = cache_row[chunk_row]
    index = np.arange(ordered.size)
    begins = np.append(True, np.diff(ordered) != 1)[: ordered.size]
    offset = index - np.maximum.accumulate(np.where(begins, index, 0))
    firsts = np.flatnonzero(offset % length == 0)
    assert firsts.size <= count
    runs = Runs(np.zeros(count, np.int32), np.full((count, length), PADDING_ROW, np.int32))
    # A run near the end of the cache starts earlier, so that it stays within bounds.
    runs.cache_row[: firsts.size] = np.minimum(ordered[firsts], all_rows - length)
    run = np.cumsum(offset % length == 0) - 1
    runs.chunk_row[run, ordered - runs.cache_row[run]] = chunk_row
    return runs


def chunk_borders(
    prompts: Sequence[PlacedPrompt],
    sizes: Sequence[int],
    *,
    whole_images: bool,
    most_prompts: int = 1,
    devices: int = 1,
) -> list[tuple[tuple[PromptSlice, ...], int]]:
    """Where chunks begin and end, and the rows that each is padded to.

    A chunk takes the next tokens of the first prompt that has any left, then those of the prompts
    after it. Of the sizes, it has the one that the tokens fill best, where the last tokens count as
    a multiple of the smallest size; of several that are filled nearly alike, the largest. A chunk
    has fewer tokens than its size if it would otherwise have more than its `most_images` or
    `most_prompts` prompts, or end inside an image although `whole_images` is set.

    Args:
      prompts: the prompts.
      sizes: rows of a chunk, ascending.
      whole_images: whether no chunk may end inside an image. An image that is larger than all sizes
        is then a chunk of its own, padded to a multiple of the largest size.
      most_prompts: how many prompts a chunk may have tokens of.
      devices: how many devices the rows of a chunk are divided among.

    Returns:
      For each chunk, its slices of prompts, and the rows that it is padded to.
    """
    borders = []
    pending = [PromptSlice(prompt, prompt.reuse.start, prompt.end) for prompt in prompts]
    while pending:
        left = sum(each.end - each.start for each in pending)
        fill = partial(_filled, pending[:most_prompts], whole_images=whole_images, devices=devices)
        filled = {size: fill(size) for size in sizes}
        size = max(sizes, key=partial(_share_filled, filled, left, sizes[0]))
        slices = filled[size]
        if not slices:
            # The chunk begins with an image that does not fit.
            own = _image_end(pending[0].prompt.inputs.template, pending[0].start) - pending[0].start
            size = -(-own // sizes[-1]) * sizes[-1]
            slices = fill(size)
        borders.append((tuple(slices), size))
        rest = pending[len(slices) - 1]._replace(start=slices[-1].end)
        pending = [rest] * (rest.start < rest.end) + pending[len(slices) :]
    return borders


def _filled(
    pending: Sequence[PromptSlice], size: int, whole_images: bool, devices: int
) -> list[PromptSlice]:
    """The first of the pending tokens that fit into a chunk of `size` rows."""
    slices = []
    room, images_left = size, most_images(size, devices)
    for each in pending:
        template = each.prompt.inputs.template
        firsts = np.asarray(template.image_first)
        ends = firsts + np.asarray(template.image_tokens, np.int64)
        end = min(each.start + room, each.end)
        next_image = int(np.searchsorted(ends, each.start, side="right"))
        if next_image + images_left < firsts.size:
            end = min(end, max(each.start, int(firsts[next_image + images_left])))
        cut = int(np.searchsorted(firsts, end, side="left")) - 1
        if whole_images and cut >= 0 and firsts[cut] < end < ends[cut]:
            end = int(firsts[cut])
        if end <= each.start:
            break
        slices.append(each._replace(end=end))
        room -= end - each.start
        images_left -= int(np.searchsorted(firsts, end, side="left")) - next_image
        if end < each.end or not room:
            break
    return slices


def _share_filled(
    filled: dict[int, list[PromptSlice]], left: int, smallest: int, size: int
) -> tuple[float, int]:
    """The share of a chunk's rows that are filled, and its size.

    A chunk counts as a few more rows than it has, for the time that every chunk takes: of sizes
    that are filled nearly alike, the largest is the best.

    Args:
      filled: what chunks of each size take.
      left: how many tokens are left. Those of a chunk that takes all count as a multiple of the
        smallest size.
      smallest: the smallest size.
      size: rows of the chunk.
    """
    tokens = sum(each.end - each.start for each in filled[size])
    if tokens == left:
        tokens = -(-tokens // smallest) * smallest
    return tokens / (size + smallest / 16), size


def _image_end(template: Template, position: int) -> int:
    """One past the last token of the image that has the token at `position`."""
    image = int(template.image[position])
    return int(template.image_first[image]) + template.image_tokens[image]


def _by_row(
    prompts: Sequence[tuple[PlacedPrompt, Int[np.ndarray, "_"]]],
    rows: int,
    value: Callable[..., Int[np.ndarray, "..."]],
    padding: int,
) -> Int32[np.ndarray, "*axes rows"]:
    """What `value` gives for prompts and positions in them, side by side and padded."""
    values = [value(prompt, positions) for prompt, positions in prompts]
    joined = np.concatenate(values, axis=-1)
    padded = np.full((*joined.shape[:-1], rows), padding, np.int32)
    padded[..., : joined.shape[-1]] = joined
    return padded
