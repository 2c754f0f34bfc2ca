"""Rows of a chunk are written where the chunk's runs say, and all other rows keep their values."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax.models.cache import Cache
from bsjax.runtime.chunks import MOST_RUNS, runs_of

CACHE_ROWS, CHUNK_ROWS = 24, 16

written = jax.jit(Cache.chunk_written)


@st.composite
def rows_in_cache(draw) -> np.ndarray:
    """The row of the cache of each row of a chunk: up to three runs, in ascending order."""
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=MOST_RUNS))
    lengths = lengths if sum(lengths) <= CHUNK_ROWS else [min(length, 5) for length in lengths]
    gaps = draw(st.lists(st.integers(0, 4), min_size=len(lengths), max_size=len(lengths)))
    rows, end = [], 0
    for length, gap in zip(lengths, gaps, strict=True):
        first = min(end + gap, CACHE_ROWS - sum(lengths) + len(rows))
        rows += range(first, first + length)
        end = first + length
    return np.asarray(rows, np.int32)


@given(rows_in_cache(), st.integers(0, 1), st.integers(0, 10))
@settings(max_examples=100, deadline=None)
def test_only_the_rows_of_the_chunk_change(cache_row, layer, seed):
    generator = np.random.default_rng(0)
    cache = Cache(*generator.normal(size=(2, 2, CACHE_ROWS, 2, 4)).astype(np.float32))
    k, v = generator.normal(size=(2, CHUNK_ROWS, 2, 4)).astype(np.float32)
    cache_row = cache_row[np.random.default_rng(seed).permutation(cache_row.size)]
    result = written(cache, jnp.int32(layer), k, v, runs_of(cache_row, CHUNK_ROWS))
    for before, chunk, after in zip(cache, (k, v), result, strict=True):
        expected = before.copy()
        expected[layer, cache_row] = chunk[: cache_row.size]
        np.testing.assert_array_equal(after, expected)


def test_a_chunk_may_be_longer_than_the_cache():
    rows = np.asarray([2, 3, 4], np.int32)
    k = np.arange(8, dtype=np.float32).reshape(8, 1, 1)
    cache = Cache.empty(1, 5, 1, 1, np.float32)
    result = written(cache, jnp.int32(0), k, k, runs_of(rows, 8))
    np.testing.assert_array_equal(result.k.ravel(), [0, 0, 0, 1, 2])
