"""Decode attention, on every backend, is the dense softmax over the valid rows of the cache."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsjax import BackendError, MaskError
from bsjax.attention import decode_attention
from bsjax.gpu.decode_configurations import decode_configuration, default_splits
from bsjax.models.layers import one_row_product
from tests.support.decode_cases import (
    EDGES,
    LAYERS,
    check_decode,
    dense_softmax,
    random_arrays,
)
from tests.support.pallas import needs_pallas


def pallas_decode_attention(*arrays, **options):
    # Here, because a JAX may have no Pallas for Triton.
    from bsjax.pallas.decode import decode_attention

    return decode_attention(*arrays, interpret=True, **options)


# Most of an interpreted kernel's time is its compilation, which takes half as long with less
# optimization.
kernel = jax.jit(
    pallas_decode_attention,
    static_argnames=("scale", "splits"),
    compiler_options={"xla_backend_optimization_level": 0},
)
xla = jax.jit(partial(decode_attention, backend="xla", return_lse=True), static_argnames=("scale",))
for_functions = pytest.mark.parametrize(
    "function", [pytest.param(kernel, marks=needs_pallas), xla], ids=["pallas", "xla"]
)


@pytest.mark.slow
@for_functions
@pytest.mark.parametrize(
    ("head_dim", "dtype", "group"),
    [
        (64, "float32", 2),
        (64, "bfloat16", 20),
        (72, "float16", 3),
        (80, "bfloat16", 4),
        (128, "bfloat16", 7),
        (128, "float32", 6),
        (256, "bfloat16", 8),
        (256, "float32", 5),
    ],
)
def test_head_dims_dtypes_and_group_sizes_agree_with_softmax(function, head_dim, dtype, group):
    rows = 2 * decode_configuration(head_dim, dtype).block_kv + 5
    lengths = [rows, rows - 6]
    check_decode(function, lengths, rows, head_dim=head_dim, dtype=dtype, group=group, own=True)


@for_functions
@pytest.mark.parametrize("own", [False, True])
def test_lengths_at_every_edge_of_a_block_share_one_batch(function, own):
    assert decode_configuration(64, jnp.float32).block_kv == 32
    check_decode(function, EDGES, 100, own=own, kv_heads=1, group=3)
    check_decode(function, EDGES[::-1], 100, own=own, kv_heads=1, group=3, layer=2, seed=1)


@pytest.mark.slow
@for_functions
@pytest.mark.parametrize(("rows", "splits", "group"), [(1, 1, 1), (7, 3, 2), (200, 3, 1)])
@given(data=st.data())
@settings(max_examples=25)
def test_sequences_of_any_lengths_agree_with_softmax(function, rows, splits, group, data):
    lengths = data.draw(st.lists(st.integers(0, rows), min_size=3, max_size=3))
    layer = data.draw(st.integers(0, LAYERS - 1))
    seed = data.draw(st.integers(0, 9))
    options = {"splits": splits} if function is kernel else {}
    check_decode(function, lengths, rows, group=group, layer=layer, seed=seed, **options)


@needs_pallas
def test_more_splits_than_fit_into_one_block_are_combined():
    check_decode(kernel, [400], 400, kv_heads=1, group=1, splits=90)


@for_functions
def test_scores_far_apart_do_not_overflow(function):
    # The largest score is in the first, a middle or the last split, or is the token's own.
    for place in (0, 50, 99, None):
        q, k, v, layer, lengths, own_k, own_v = random_arrays(
            [100], 100, 2, 1, 64, "float32", own=True, layer=0
        )
        if place is None:
            own_k = own_k.at[0, 0].set(1e3 * q[0, 0])
        else:
            k = k.at[0, 0, place, 0].set(1e3 * q[0, 0])
        out, lse = function(q, k, v, layer, lengths, own_k, own_v, scale=1.0)
        wanted_out, wanted_lse = dense_softmax(q, k, v, layer, lengths, own_k, own_v, 1.0)
        np.testing.assert_allclose(lse, wanted_lse, rtol=3e-6)
        np.testing.assert_allclose(out, wanted_out, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "pallas", "xla", "reference"])
def test_every_backend_can_be_chosen_by_name(backend):
    arrays = random_arrays([40, 9], 50, 4, 2, 64, "float32", own=True, layer=1)
    wanted_out, _ = dense_softmax(*arrays, 0.125)
    out = decode_attention(*arrays, scale=0.125, backend=backend)
    np.testing.assert_allclose(out, wanted_out, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_product_of_one_row_is_rounded_only_once(dtype):
    generator = np.random.default_rng(0)
    row, matrix = (
        jnp.asarray(generator.normal(size=shape), dtype) for shape in ((1, 1536), (1536, 37))
    )
    out = one_row_product(row, matrix)
    wanted = np.asarray(row, np.float64) @ np.asarray(matrix, np.float64)
    assert out.dtype == row.dtype and out.shape == (1, 37)
    # The result is rounded once; products or sums in bfloat16 would be several times as far off.
    tolerance = {"float32": 1e-6, "bfloat16": 0.51 * float(jnp.finfo("bfloat16").eps)}[dtype]
    np.testing.assert_allclose(
        np.asarray(out, np.float64), wanted, rtol=tolerance, atol=1e-5 * np.abs(wanted).max()
    )


def test_arguments_that_do_not_fit_are_refused():
    q, k, v, layer, lengths, own_k, own_v = random_arrays(
        [40, 9], 50, 4, 2, 64, "float32", own=True, layer=1
    )
    for arguments, words in (
        ((q[:, :3], k, v, layer, lengths), "multiple of the key heads"),
        ((q, k, v, layer, lengths, own_k), "together"),
        ((q.astype(jnp.bfloat16), k, v, layer, lengths), "one dtype"),
    ):
        with pytest.raises(MaskError, match=words):
            decode_attention(*arguments, scale=1.0, backend="xla")
    with pytest.raises(MaskError, match="above 0"):
        decode_attention(q, k, v, layer, lengths, scale=0.0)
    with pytest.raises(BackendError, match="Unknown attention backend"):
        decode_attention(q, k, v, layer, lengths, scale=1.0, backend="cuda")
    with pytest.raises(BackendError, match="up to 256"):
        decode_configuration(257, jnp.bfloat16)
    with pytest.raises(BackendError, match="not in int8"):
        decode_configuration(64, jnp.int8)


def test_many_sequences_have_a_program_each():
    assert default_splits(1, 4, 36_000, 64) == 64
    assert default_splits(300, 4, 36_000, 64) == default_splits(1, 4, 1, 64) == 1
