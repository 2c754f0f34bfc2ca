"""What holds of every schedule: it covers what the predicate says, once."""

import numpy as np

from bsjax.masks.launch_order import LaunchItem
from bsjax.masks.schedule import KeyRange, Tile
from bsjax.masks.visibility import PADDING_POSITION, TokenInfo, visible


def walk(schedule, table):
    """Yields (rows of a tile, [(keys, is full)]) in the order in which the kernels visit them."""
    ranges = [KeyRange(*columns) for columns in schedule.range_columns[table].tolist()]
    for tile in map(Tile._make, schedule.tile_columns[table].tolist()):
        if not tile.rows:
            continue
        blocks, index = [], tile.first_range
        start = ranges[index].start
        for block in range(tile.blocks):
            end = ranges[index].end
            keys = range(start, min(start + schedule.block_kv, end))
            blocks.append((keys, block < tile.full_blocks))
            start += schedule.block_kv
            if start >= end:
                index += 1
                start = ranges[index].start
        yield range(tile.first_row, tile.first_row + tile.rows), blocks


def row_matrix(schedule, table):
    query = TokenInfo(*(part[:, None] for part in schedule.queries))
    key = TokenInfo(*(part[None, :] for part in schedule.keys))
    seen = visible(query, key, int(schedule.groups[table]), schedule.visibility)
    return seen & (query.position != PADDING_POSITION)


def check_invariants(schedule, tables, block_q, packed=True):
    """Compares the tiles and ranges of each table with the predicate."""
    is_text = schedule.queries.image < 0
    for table in range(tables):
        of_text = schedule.stacked_heads > 0 and table == tables - 1
        most_rows = max(1, block_q // schedule.stacked_heads) if of_text else block_q
        seen = row_matrix(schedule, table)
        covered = np.zeros(seen.shape, int)
        tiled = np.zeros(schedule.query_rows, int)
        work = []
        for rows, blocks in walk(schedule, table):
            assert len(rows) <= most_rows
            tiled[rows] += 1
            work.append(len(blocks))
            needed = seen[rows].any(axis=0)
            for keys, full in blocks:
                covered[np.ix_(rows, keys)] += 1
                assert not full or (
                    len(keys) == schedule.block_kv and seen[np.ix_(rows, keys)].all()
                )
            # A range is a maximal run of needed keys within one segment of the key rows: where two
            # segments meet, a run is visited as two ranges.
            runs = np.flatnonzero(np.diff(np.concatenate(([0], needed, [0]))))
            lengths = runs[1::2] - runs[::2]
            assert len(blocks) <= sum(-(-lengths // schedule.block_kv)) + schedule_borders(schedule)
        expected = np.ones(schedule.query_rows, int)
        if schedule.stacked_heads:
            real = schedule.queries.position != PADDING_POSITION
            expected = np.where(real & (is_text | (not packed)), of_text, not of_text)
        np.testing.assert_array_equal(tiled, expected, "every row is in exactly one tile")
        assert covered.max(initial=0) <= 1, "no pair is covered twice"
        assert (covered[seen & (expected > 0)[:, None]] == 1).all(), "every visible pair is covered"
        assert work == sorted(work, reverse=True), "longest tiles first"
    check_launch_list(schedule)


def check_launch_list(schedule):
    """A launch starts every tile once for each head that it is for, and the longest first."""
    if not schedule.stacked_heads:
        assert schedule.launch_columns is None
        return
    items = list(map(LaunchItem._make, schedule.launch_columns.tolist()))
    launched = [item for item in items if item.heads]
    assert items == launched + [(0, 0, 0)] * (len(items) - len(launched))
    group, rows = range(schedule.stacked_heads), schedule.tiles.rows
    of_text, *of_heads = (
        sorted(item.tile for item in launched if item.head == head) for head in (-1, *group)
    )
    assert of_text == np.flatnonzero(rows[-1]).tolist()
    # Each head has one of the tables for image rows.
    of_images = np.flatnonzero((rows[:-1] > 0).any(axis=0)).tolist()
    assert of_heads == [of_images for _ in group]
    blocks = schedule.tiles.blocks
    lengths = []
    for item in launched:
        assert item.heads == (1 if item.head >= 0 else len(group))
        own = blocks[:-1] if item.head >= 0 else blocks[-1:]
        lengths.append(int(own[:, item.tile].max()))
    assert lengths == sorted(lengths, reverse=True), "longest first"


def schedule_borders(schedule):
    """How many borders there are between segments of the key rows."""
    keys = schedule.keys
    kind = np.where(keys.image < 0, 0, np.where(keys.sink, 1, 2))
    grows = np.diff(keys.position) > 0
    return int((~grows | (np.diff(kind) != 0) | (np.diff(keys.conversation) != 0)).sum()) + 1
