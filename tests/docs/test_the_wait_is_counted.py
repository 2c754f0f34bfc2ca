"""docs/ttft.md is what the tool counts, and the tool counts what it should."""

import jax
import jax.numpy as jnp
import pytest

from tools import ttft_model
from tools.ttft_model import PAGE, VARIANTS, count, products


def test_products_are_counted_in_loops_and_branches():
    def step(carry, kernel):
        return carry @ kernel, None

    def function(x, kernels, choice):
        x, _ = jax.lax.scan(step, x, kernels)
        return jax.lax.cond(choice, lambda x: x @ x.T, lambda x: (x @ kernels[0]) @ x.T, x)

    x, kernels = jnp.zeros((3, 8)), jnp.zeros((5, 8, 8))
    traced = jax.make_jaxpr(function)(x, kernels, True)
    assert products(traced.jaxpr) == 2 * (5 * 3 * 8 * 8) + 2 * (3 * 8 * 8 + 3 * 3 * 8)


@pytest.mark.slow
def test_the_page_says_what_the_tool_counts():
    rows = {
        ("Qwen2.5-VL-7B", 36_000, variant): count("Qwen2.5-VL-7B", 36_000, sparse)
        for variant, sparse in VARIANTS.items()
    }
    page = PAGE.read_text()
    for line in ttft_model.markdown(rows).splitlines():
        assert line in page, f"run python -m {ttft_model.__name__}"
    dense = rows["Qwen2.5-VL-7B", 36_000, "dense"]
    # 6.5 billion parameters in layers; half of all pairs, in 27 layers and one row of the last.
    assert dense.linear == pytest.approx(2 * 6.5e9 * 36_000, rel=0.04)
    assert dense.attention == pytest.approx(36_000**2 / 2 * 4 * 128 * 28 * 27, rel=0.04)
    assert dense.weights == pytest.approx(8.29e9 * 2, rel=0.01)
