"""Which key rows each query row sees: at most one range per key segment.

Rows are tokens in the order of a schedule: packed order, or prompt order when every head is dense.
The key rows of one *segment* (text, sinks, or the other image tokens; in prompt order there is one
segment of all rows) are sorted by position. A query row therefore sees one range [low, high) of a
segment, and from one row of a tile to the next neither end ever decreases.

Everything here is NumPy on the host, and linear in the number of tokens.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.template import Template
from bsjax.masks.visibility import CAUSAL, Visibility

TILE_WINDOWS = 4
"""In packed order and with a window, a tile spans at most this many windows of prompt positions (or
this many times its own length, where that is longer)."""


class KeySegment(NamedTuple):
    """Key rows sorted by position, so that a query row sees one range of them.

    Attributes:
      first_row: first key row.
      end_row: one past the last key row.
      before: first key row of the segment at or after each prompt position.
      own: the group of its keys for queries of their own image; all groups where keys of all groups
        are mixed.
      other: the group of its keys for all other image queries.
    """

    first_row: int
    end_row: int
    before: Int[np.ndarray, "tokens+1"]
    own: KeyGroup
    other: KeyGroup


class RowRanges(NamedTuple):
    """For each of several query rows, the key rows [low, high) of one segment that it sees."""

    low: Int[np.ndarray, "rows"]
    high: Int[np.ndarray, "rows"]


class QueryRows:
    """Query rows in the order of a schedule.

    Args:
      template: the prompt.
      tables: the key groups of each table of the schedule, None for an empty table. The order is
        prompt order if every table keeps all groups, else packed order.
      visibility: what the model itself lets a query see.

    Attributes:
      tokens: how many rows there are.
      packed: whether the order is packed order.
      order: int32 [tokens], the prompt position of each row.
      image: int32 [tokens], the image number of each row; -1 for text.
      runs: the first row of each run of rows that belong to one image, or to the text.
      segments: the key segments, in the order of their rows.
    """

    def __init__(
        self, template: Template, tables: Sequence[KeyGroup | None], visibility: Visibility
    ) -> None:
        self.tokens = template.tokens
        self.packed = any(groups not in (None, ALL_KEY_GROUPS) for groups in tables)
        if self.packed:
            text = template.image < 0
            parts = [
                (text, KeyGroup.TEXT, KeyGroup.TEXT),
                (template.sink, KeyGroup.OWN_SINK, KeyGroup.OTHER_SINK),
                (~text & ~template.sink, KeyGroup.OWN, KeyGroup.OTHER),
            ]
            self.order = template.packed_order
        else:
            parts = [(np.ones(self.tokens, bool), ALL_KEY_GROUPS, ALL_KEY_GROUPS)]
            self.order = np.arange(self.tokens, dtype=np.int32)
        self.image = template.image[self.order]
        self.runs = np.flatnonzero(np.append(-2, self.image[:-1]) != self.image)

        self.segments: list[KeySegment] = []
        first_row = 0
        for member, own, other in parts:
            before = np.zeros(self.tokens + 1, np.int32)
            np.cumsum(member, out=before[1:])
            end_row = first_row + int(before[-1])
            self.segments.append(KeySegment(first_row, end_row, before + first_row, own, other))
            first_row = end_row

        self._visibility = visibility
        self._image_first = template.image_first
        self._image_end = template.image_first + np.asarray(template.image_tokens, np.int64)

    def ranges(
        self, segment: KeySegment, groups: KeyGroup, rows: Int[np.ndarray, "rows"]
    ) -> RowRanges:
        """The key rows of a segment that each of `rows` sees in a head that keeps `groups`."""
        position, image = self.order[rows], self.image[rows]
        is_image = image >= 0
        begin = np.zeros_like(position)
        if self._visibility.window is not None:
            begin = np.maximum(position + 1 - self._visibility.window, 0)
        end = position + 1
        if self._visibility.bidirectional_images and self._image_end.size:
            end = np.where(is_image, self._image_end[image], end)
        low, high = segment.before[begin], segment.before[end]
        own, other = bool(groups & segment.own), bool(groups & segment.other)
        if not (own and other) and self._image_first.size:
            # For text rows, the index -1 reads the last image; they keep their ranges.
            image_first = segment.before[self._image_first[image]]
            if own:
                low = np.where(is_image, np.maximum(low, image_first), low)
            elif other:
                high = np.where(is_image, np.minimum(high, image_first), high)
            else:
                high = np.where(is_image, low, high)
        return RowRanges(low, np.maximum(low, high))

    def tile_starts(self, groups: KeyGroup, block_q: int) -> Int[np.ndarray, "tiles"]:
        """First rows of all tiles of a table.

        Tiles of a sparse table never hold rows of two images, with one exception: sink rows, as
        each image has few of them and they share most of their keys.

        With a window, rows far apart have no keys in common. In packed order, a tile of sink rows
        could reach over the whole prompt, and visit all of it after the other tiles are done.
        Tiles therefore also end after `TILE_WINDOWS` windows.
        """
        if not self.tokens:
            return np.zeros(0, np.int64)
        borders = [np.asarray([segment.first_row for segment in self.segments])]
        if groups != ALL_KEY_GROUPS:
            borders.append(self.runs[self.runs >= self.segments[-1].first_row])
        if self.packed and self._visibility.window is not None:
            span = self.order // (TILE_WINDOWS * max(self._visibility.window, block_q))
            borders.append(np.flatnonzero(np.diff(span)) + 1)
        starts = np.unique(np.concatenate(borders))
        starts = starts[starts < self.tokens]
        lengths = np.diff(starts, append=self.tokens)
        tiles = -(-lengths // block_q)
        index_in_run = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        return np.repeat(starts, tiles) + index_in_run * block_q

    def probes(self, starts: Int[np.ndarray, "tiles"], block_q: int) -> Int[np.ndarray, "probes"]:
        """Rows whose ranges suffice to know what all rows of each tile see.

        Without a window, all rows of one image, and all rows of the text, start at the same key.
        The union of what they see is then the union of what the first and the last of them see.

        With a window the same holds for a stretch of rows whose positions are consecutive, if the
        far end of the window stays inside one run of the segment's keys, or moves only past keys of
        other segments. Each end of the range then stays where it is, or advances by one key per
        row. Both advance only where the window holds keys of a single run. The last row's range
        then begins no later than the first row's ends, since a tile has no more rows than the
        window has positions. If a tile can have more, every row is a probe.

        Args:
          starts: first rows of the tiles.
          block_q: query rows of a tile, at most.
        """
        if not self.tokens:
            return np.arange(0)
        first = np.concatenate([starts, self.runs])
        if self._visibility.window is not None:
            if self._visibility.window < block_q:
                return np.arange(self.tokens)
            # Positions at which a run of text, of sinks or of other image tokens begins. The rows
            # of one segment and one image are consecutive in either order.
            begins = np.sort(self.order[np.append(0, self._steps)])
            far = begins + self._visibility.window - 1
            enters = self._row_at[far[far < self.tokens]]
            first = np.concatenate([first, self._steps, enters, enters + 1])
            first = first[first < self.tokens]
        return np.unique(np.concatenate([first, first[first > 0] - 1, [self.tokens - 1]]))

    @cached_property
    def _steps(self) -> Int[np.ndarray, "steps"]:
        """Rows whose position is not one more than that of the previous row."""
        return np.flatnonzero(np.diff(self.order) != 1) + 1

    @cached_property
    def _row_at(self) -> Int[np.ndarray, "tokens"]:
        """The row of each prompt position."""
        row = np.empty(self.tokens, np.int64)
        row[self.order] = np.arange(self.tokens)
        return row


def visible_pairs(template: Template, groups: KeyGroup, visibility: Visibility = CAUSAL) -> int:
    """The exact number of (query, key) pairs that a head sees if it keeps `groups`."""
    rows = QueryRows(template, [groups], visibility)
    every_row = np.arange(rows.tokens)
    ranges = [rows.ranges(segment, groups, every_row) for segment in rows.segments]
    return sum(int((high - low).sum(dtype=np.int64)) for low, high in ranges)


def density(template: Template, category: HeadCategory, visibility: Visibility) -> float:
    """The pairs that a head of this category sees, divided by those that a DENSE head sees."""
    pairs, dense_pairs = (
        visible_pairs(template, counted.groups, visibility)
        for counted in (category, HeadCategory.DENSE)
    )
    return pairs / max(dense_pairs, 1)
