"""Rows of a chunk are written where the chunk's runs say, and all other rows keep their values."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax.models.cache import PADDING_ROW, Cache, runs_scattered
from bsjax.runtime.chunks import MOST_RUNS, runs_of

CACHE_ROWS, CHUNK_ROWS = 24, 16

written = jax.jit(Cache.chunk_written)


@st.composite
def rows_in_cache(draw) -> np.ndarray:
    """The row of the cache of each row of a chunk: runs in any order. Some rows are not kept."""
    rows = draw(st.lists(st.integers(0, CACHE_ROWS - 1), unique=True, max_size=CHUNK_ROWS))
    if draw(st.booleans()):  # Few runs.
        first = draw(st.integers(0, CACHE_ROWS - CHUNK_ROWS))
        rows = list(range(first, first + len(rows)))
    rows += [PADDING_ROW] * draw(st.integers(0, CHUNK_ROWS - len(rows)))
    return np.asarray(draw(st.permutations(rows)), np.int32)


@given(rows_in_cache(), st.integers(0, 1), st.sampled_from((1, 3, CHUNK_ROWS)))
@settings(max_examples=100, deadline=None)
def test_only_the_rows_of_the_chunk_change(cache_row, layer, length):
    generator = np.random.default_rng(0)
    cache = Cache(*generator.normal(size=(2, 2, CACHE_ROWS, 2, 4)).astype(np.float32))
    k, v = generator.normal(size=(2, CHUNK_ROWS, 2, 4)).astype(np.float32)
    runs = runs_of(cache_row, CHUNK_ROWS, length, CACHE_ROWS)
    result = written(cache, jnp.int32(layer), k, v, runs)
    scattered = [
        runs_scattered(*map(jnp.asarray, (each, new, layer, *runs)))
        for each, new in zip(cache, (k, v), strict=True)
    ]
    kept = np.flatnonzero(cache_row != PADDING_ROW)
    for before, chunk, after, of_gpu in zip(cache, (k, v), result, scattered, strict=True):
        expected = before.copy()
        expected[layer, cache_row[kept]] = chunk[kept]
        np.testing.assert_array_equal(after, expected)
        np.testing.assert_array_equal(of_gpu, expected)


def test_a_chunk_may_be_longer_than_the_cache():
    rows = np.asarray([2, 3, 4], np.int32)
    k = np.arange(8, dtype=np.float32).reshape(8, 1, 1)
    cache = Cache.empty(1, 5, 1, 1, np.float32)
    result = written(cache, jnp.int32(0), k, k, runs_of(rows, MOST_RUNS, 5, 5))
    np.testing.assert_array_equal(result.k.ravel(), [0, 0, 0, 1, 2])


def test_each_sequence_has_rows_of_its_own():
    rows = np.arange(12, dtype=np.float32).reshape(1, 12, 1, 1)
    cache = Cache(jnp.asarray(rows), jnp.asarray(-rows))
    new = jnp.asarray([100.0, 101, 102]).reshape(1, 3, 1, 1)
    result = cache.written(new, -new, jnp.asarray([3, -1, 0]))
    expected = np.arange(12)
    expected[[3, 8]] = 100, 102
    np.testing.assert_array_equal(result.k.ravel(), expected)
    result = cache.copied(jnp.int32(2), jnp.int32(0), sequences=3)
    np.testing.assert_array_equal(result.v.ravel()[:5], [-8, -9, -10, -11, -4])
