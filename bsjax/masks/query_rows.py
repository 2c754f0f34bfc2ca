"""Which key rows each query row sees: at most one range per key segment.

The key rows of one segment are sorted by position (`bsjax.masks.rows`). A query row therefore sees
one range [low, high) of a segment, and from one row of a tile to the next neither end ever
decreases.

Everything here is NumPy on the host, and linear in the number of tokens.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.rows import KeySegment, Rows, Span
from bsjax.masks.template import Template
from bsjax.masks.visibility import CAUSAL, Visibility

TILE_WINDOWS = 4
"""In packed order and with a window, the prompt positions of a tile's rows span at most this many
windows (or this many times `block_q`, if that is more)."""


def stretch(window: int, block_q: int) -> int:
    """The most prompt positions that the rows of a tile span, in packed order and with a window.

    Tiles end at its multiples.
    """
    return TILE_WINDOWS * max(window, block_q)


class RowRanges(NamedTuple):
    """For each of several query rows, the key rows [low, high) of one segment that it sees."""

    low: Int[np.ndarray, "rows"]
    high: Int[np.ndarray, "rows"]


class QueryRows:
    """The query rows of one span, and the key rows of their conversation.

    Rows are counted from the first row of the span.

    Args:
      queries: rows of queries.
      index: which span of `queries`.
      keys: rows of keys, in the same kind of order.
      visibility: what the model itself lets a query see.

    Attributes:
      tokens: how many query rows there are.
      text_rows: how many of them, the first ones, are text. In prompt order, all of them.
      position: int32 [tokens], the position of each row.
      image: int32 [tokens], the image number of each row; -1 for text.
      segments: the key segments of the conversation.
    """

    def __init__(self, queries: Rows, index: int, keys: Rows, visibility: Visibility) -> None:
        rows, span = queries.rows_of(index), queries.spans[index]
        info = queries.info
        self.position, self.image = info.position[rows], info.image[rows]
        self.tokens = self.position.size
        self.segments = keys.segments[span.conversation]
        self._packed = queries.packed
        self._visibility = visibility
        self._span = span
        self._key_spans = [each for each in keys.spans if each.conversation == span.conversation]
        self._template = template = queries.templates[span.conversation]
        self._image_first = template.image_first
        self._image_end = template.image_first + np.asarray(template.image_tokens, np.int64)
        # The first row of each run of rows that belong to one image, or to the text.
        self._runs = np.flatnonzero(np.append(-2, self.image[:-1]) != self.image)
        if queries.packed:
            self.text_rows = int(np.count_nonzero(self.image < 0))
            sinks = int(np.count_nonzero(info.sink[rows])) if queries.sinks_apart else 0
            self._borders = (0, self.text_rows, self.text_rows + sinks)
        else:
            self.text_rows = self.tokens
            self._borders = (0,)

    def ranges(
        self, segment: KeySegment, groups: KeyGroup, rows: Int[np.ndarray, "rows"]
    ) -> RowRanges:
        """The key rows of a segment that each of `rows` sees in a head that keeps `groups`."""
        position, image = self.position[rows], self.image[rows]
        is_image = image >= 0
        begin = np.zeros_like(position)
        if self._visibility.window is not None:
            begin = np.maximum(position + 1 - self._visibility.window, 0)
        end = position + 1
        if self._visibility.bidirectional_images and self._image_end.size:
            end = np.where(is_image, self._image_end[image], end)
        low, high = segment.first_at(begin), segment.first_at(end)
        own, other = bool(groups & segment.own), bool(groups & segment.other)
        if not (own and other) and self._image_first.size:
            # For text rows, the index -1 reads the last image; they keep their ranges.
            image_first = segment.first_at(self._image_first[image])
            if own:
                low = np.where(is_image, np.maximum(low, image_first), low)
            elif other:
                high = np.where(is_image, np.minimum(high, image_first), high)
            else:
                high = np.where(is_image, low, high)
        return RowRanges(low, np.maximum(low, high))

    def tile_starts(
        self, groups: KeyGroup, block_q: int, rows: range | None = None
    ) -> Int[np.ndarray, "tiles"]:
        """First rows of all tiles of a table.

        Tiles of a sparse table never hold rows of two images, with one exception: sinks that come
        before all other image tokens (`Rows.sinks_apart`). Each image has few of them, and they
        share most of their keys.

        With a window, rows far apart have no keys in common. In packed order, a tile of sinks could
        span the whole prompt and visit all of its keys, long after the other tiles are done. Tiles
        therefore also end after `TILE_WINDOWS` windows.

        Args:
          groups: the key groups of the table.
          block_q: query rows of a tile, at most.
          rows: the rows that the table has tiles for; None for all.
        """
        rows = range(self.tokens) if rows is None else rows
        if not rows:
            return np.zeros(0, np.int64)
        borders = [np.asarray([rows.start, *self._borders])]
        if groups != ALL_KEY_GROUPS:
            borders.append(self._runs[self._runs >= self._borders[-1]])
        if self._packed and self._visibility.window is not None:
            longest = stretch(self._visibility.window, block_q)
            stretches = self.position.astype(np.int64) // longest
            borders.append(np.flatnonzero(np.diff(stretches)) + 1)
        starts = np.unique(np.concatenate(borders))
        starts = starts[(starts >= rows.start) & (starts < rows.stop)]
        lengths = np.diff(starts, append=rows.stop)
        tiles = -(-lengths // block_q)
        index_in_run = np.arange(tiles.sum()) - np.repeat(np.cumsum(tiles) - tiles, tiles)
        return np.repeat(starts, tiles) + index_in_run * block_q

    def probes(
        self, starts: Int[np.ndarray, "tiles"], block_q: int, rows: range | None = None
    ) -> Int[np.ndarray, "probes"]:
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
          rows: the rows that the tiles cover; None for all.
        """
        rows = range(self.tokens) if rows is None else rows
        if not rows:
            return np.arange(0)
        first = np.concatenate([starts, self._runs])
        window = self._visibility.window
        if window is not None:
            if window < block_q:
                return np.arange(rows.start, rows.stop)
            far = self._run_positions() + window - 1 - self._span.start
            positions = self._span.end - self._span.start
            row_at = np.full(positions, -1)
            row_at[self.position - self._span.start] = np.arange(self.tokens)
            enters = row_at[far[(far >= 0) & (far < positions)]]
            # Without a row, it is in a gap of positions, whose ends are probes.
            enters = enters[enters >= 0]
            steps = np.flatnonzero(np.diff(self.position) != 1) + 1
            first = np.concatenate([first, steps, enters, enters + 1])
        probes = np.unique(np.concatenate([first, first - 1, [rows.stop - 1]]))
        return probes[(probes >= rows.start) & (probes < rows.stop)]

    def _run_positions(self) -> Int[np.ndarray, "runs"]:
        """Positions at which a run of text, of sinks or of an image's other tokens begins."""
        image, sink = self._template.image, self._template.sink
        changes = np.flatnonzero((image[1:] != image[:-1]) | (sink[1:] != sink[:-1])) + 1
        ends = [border for span in self._key_spans for border in (span.start, span.end)]
        return np.unique(np.concatenate([[0], changes, ends]))


def visible_pairs(
    template: Template,
    groups: KeyGroup,
    visibility: Visibility = CAUSAL,
    queries: Span | None = None,
) -> int:
    """The exact number of (query, key) pairs that a head sees if it keeps `groups`.

    Args:
      template: the prompt.
      groups: the key groups that the head keeps.
      visibility: what the model itself lets a query see.
      queries: the tokens that look; None for all.
    """
    whole = Span(0, template.tokens)
    packed = groups != ALL_KEY_GROUPS
    keys = Rows([template], [whole], packed=packed)
    rows = QueryRows(Rows([template], [queries or whole], packed=packed), 0, keys, visibility)
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
