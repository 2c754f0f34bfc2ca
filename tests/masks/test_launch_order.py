"""The longest tiles of all tables start first, as far as there are entries for that."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from bsjax.masks.launch_order import LaunchItem, launch_entries, launch_list

tables_of_blocks = st.lists(
    st.lists(st.integers(0, 10_000), max_size=30).map(
        lambda blocks: np.sort(np.asarray(blocks, np.int64))[::-1]
    ),
    min_size=1,
    max_size=5,
)


@given(tables=tables_of_blocks, spare=st.integers(0, 20))
def test_every_tile_has_an_entry_of_its_own(tables, spare):
    room = max(each.size for each in tables) + spare
    entries = launch_entries(tables, room)
    for blocks, own in zip(tables, entries, strict=True):
        assert own.size == blocks.size
        assert (np.diff(own) > 0).all(), "tiles of a table stay in order"
        assert not own.size or (own[0] >= 0 and own[-1] < room)


@given(tables=tables_of_blocks)
def test_with_room_for_all_no_tile_starts_before_a_longer_one(tables):
    entries = launch_entries(tables, sum(each.size for each in tables))
    blocks, entry = np.concatenate(tables), np.concatenate(entries)
    in_order = blocks[np.argsort(entry, kind="stable")]
    shortest_so_far = np.minimum.accumulate(in_order)
    assert (in_order <= 1.05 * shortest_so_far).all()


def test_the_drawing_of_the_module():
    tables = [np.array(each) for each in ([90, 89, 88], [9, 9, 8])]
    entries = launch_entries(tables, room=6)
    assert [each.tolist() for each in entries] == [[0, 1, 2], [3, 4, 5]]
    columns = launch_list(tables, entries, np.array([40, 40, 9]), heads=2, room=17)
    items = LaunchItem(*columns.T.tolist())
    assert items.tile == [0, 0, 1, 1, 2, 2, 0, 1, 2, 3, 3, 4, 4, 5, 5, 0, 0]
    assert items.head == [0, 1, 0, 1, 0, 1, -1, -1, -1, 0, 1, 0, 1, 0, 1, 0, 0]
    assert items.heads == [1, 1, 1, 1, 1, 1, 2, 2, 2, 1, 1, 1, 1, 1, 1, 0, 0]


def test_without_room_tables_begin_with_their_longest_tile():
    entries = launch_entries([np.array([500, 400]), np.array([3, 1])], room=2)
    assert [each.tolist() for each in entries] == [[0, 1], [0, 1]]


def test_long_tiles_have_entries_of_their_own_before_short_ones_do():
    tables = [np.array(each) for each in ([500, 400], [50, 49], [30, 20])]
    entries = launch_entries(tables, room=5)
    assert [each.tolist() for each in entries] == [[0, 1], [2, 3], [2, 3]]
