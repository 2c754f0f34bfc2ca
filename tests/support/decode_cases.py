"""What tests of decode attention share: inputs, and the result that they must have."""

import jax.numpy as jnp
import numpy as np

LAYERS = 3

# With blocks of 32 keys: no key, one key, around one block, two blocks, all rows but one, all rows.
EDGES = (0, 1, 31, 32, 33, 64, 99, 100)


def random_arrays(lengths, rows, q_heads, kv_heads, head_dim, dtype, *, own, layer, seed=0):
    """Queries, caches, layer, lengths, own keys and values; NaN where nothing may be read."""
    generator = np.random.default_rng(seed)
    batch = len(lengths)

    def normal(*shape):
        return generator.normal(size=shape).astype(np.float32)

    caches = []
    for _ in range(2):
        cache = np.full((LAYERS, batch, rows, kv_heads, head_dim), np.nan, np.float32)
        for sequence, length in enumerate(lengths):
            cache[layer, sequence, :length] = normal(length, kv_heads, head_dim)
        caches.append(jnp.asarray(cache, dtype))
    own_shape = (batch, kv_heads, head_dim)
    return (
        jnp.asarray(normal(batch, q_heads, head_dim), dtype),
        *caches,
        jnp.int32(layer),
        jnp.asarray(lengths, jnp.int32),
        *([jnp.asarray(normal(*own_shape), dtype) for _ in range(2)] if own else [None, None]),
    )


def dense_softmax(q, k_cache, v_cache, layer, lengths, own_k, own_v, scale):
    """The result in float64 NumPy, one query head at a time."""
    q, k_cache, v_cache = (np.asarray(array, np.float64) for array in (q, k_cache, v_cache))
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    group = q.shape[1] // k_cache.shape[3]
    for sequence, head in np.ndindex(*q.shape[:2]):
        place = int(layer), sequence, slice(int(lengths[sequence])), head // group
        keys, values = k_cache[place], v_cache[place]
        if own_k is not None:
            keys, values = (
                np.vstack([cached, np.asarray(own, np.float64)[sequence, head // group]])
                for cached, own in ((keys, own_k), (values, own_v))
            )
        if len(keys):
            scores = scale * keys @ q[sequence, head]
            lse[sequence, head] = np.logaddexp.reduce(scores)
            out[sequence, head] = np.exp(scores - lse[sequence, head]) @ values
    return out, lse


def check_decode(
    function,
    lengths,
    rows,
    *,
    group=2,
    kv_heads=2,
    head_dim=64,
    dtype="float32",
    own=False,
    layer=1,
    seed=0,
    **options,
):
    """Compares `function` with the dense softmax over the valid rows of the cache."""
    arrays = random_arrays(
        lengths, rows, group * kv_heads, kv_heads, head_dim, dtype, own=own, layer=layer, seed=seed
    )
    scale = head_dim**-0.5
    out, lse = function(*arrays, scale=scale, **options)
    wanted_out, wanted_lse = dense_softmax(*arrays, scale)
    assert out.dtype == arrays[0].dtype and lse.dtype == jnp.float32
    # In every dtype, scores are exact products summed in float32, and so is their log-sum-exp.
    np.testing.assert_allclose(lse, wanted_lse, atol=3e-6, rtol=3e-6)
    tolerance = 3e-6 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted_out, atol=tolerance, rtol=tolerance
    )
