"""Times the `xla` backend on a CPU, sparse and dense, and the dense attention of JAX and PyTorch.

    python -m benchmarks.attention_cpu

8K tokens in 20 images, float32. Variants run interleaved in one process; each ratio is the median
of the ratios within a round. First, the backend is compared with the reference on a shorter prompt.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import bsjax
from benchmarks.measure import RESULTS, interleaved, median_ratio, write_result
from bsjax import BlockMask, HeadCategory, Image, Template, Text
from bsjax.attention import block_sizes

DENSE = "bsjax DENSE"
JAX_DENSE = "jax.nn.dot_product_attention"
TORCH_DENSE = "torch scaled_dot_product_attention"


def template(images: int, image_tokens: int, text_tokens: int) -> Template:
    return Template.from_segments([Text(text_tokens), Image(image_tokens)] * images + [Text(8)])


def build_mask(prompt: Template, category: HeadCategory, heads: int, head_dim: int) -> BlockMask:
    sparse = category is not HeadCategory.DENSE
    blocks = block_sizes("xla", head_dim, jnp.float32, sparse=sparse)
    return BlockMask(prompt, [category] * heads, *blocks)


def arrays(tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    generator = np.random.default_rng(0)
    shapes = [(tokens, heads, head_dim) for heads in (q_heads, kv_heads, kv_heads)]
    return tuple(jnp.asarray(generator.normal(size=shape), jnp.float32) for shape in shapes)


def check(heads: int, kv_heads: int, head_dim: int) -> float:
    """The greatest difference between `xla` and the reference, over all categories."""
    prompt = template(5, 90, 6)
    q, k, v = arrays(prompt.tokens, heads, kv_heads, head_dim)
    worst = 0.0
    for category in HeadCategory:
        mask = build_mask(prompt, category, heads, head_dim)
        ours = bsjax.sparse_attention(q, k, v, mask, backend="xla")
        reference = bsjax.sparse_attention(q, k, v, mask, backend="reference")
        worst = max(worst, float(jnp.abs(ours - reference).max()))
    return worst


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    prompt = template(arguments.images, arguments.image_tokens, arguments.text_tokens)
    q, k, v = arrays(prompt.tokens, arguments.heads, arguments.kv_heads, arguments.head_dim)
    masks = {
        category: build_mask(prompt, category, arguments.heads, arguments.head_dim)
        for category in HeadCategory
    }
    attend = jax.jit(lambda q, k, v, mask: bsjax.sparse_attention(q, k, v, mask, backend="xla"))
    calls = {
        f"bsjax {category.name}": lambda mask=mask: attend(q, k, v, mask)
        for category, mask in masks.items()
    }
    causal = jax.jit(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True))
    calls[JAX_DENSE] = lambda: causal(q, k, v)
    torch_call = _torch_call(q, k, v)
    if torch_call:
        calls[TORCH_DENSE] = torch_call

    samples = interleaved(calls, arguments.rounds)
    rows = []
    for name, seconds in samples.items():
        category = next((c for c in HeadCategory if name == f"bsjax {c.name}"), None)
        rows.append(
            {
                "variant": name,
                "median_seconds": statistics.median(seconds),
                "time_over_bsjax_dense": median_ratio(samples, name, DENSE),
                "visible_pairs_over_dense": None if category is None else masks[category].density,
                "seconds": seconds,
            }
        )
    return {
        "tokens": prompt.tokens,
        "images": arguments.images,
        "image_tokens": arguments.image_tokens,
        "q_heads": arguments.heads,
        "kv_heads": arguments.kv_heads,
        "head_dim": arguments.head_dim,
        "dtype": "float32",
        "greatest_difference_to_reference": check(
            arguments.heads, arguments.kv_heads, arguments.head_dim
        ),
        "rows": rows,
    }


def _torch_call(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    try:
        import torch
    except ImportError:
        return None
    groups = q.shape[1] // k.shape[1]
    # PyTorch's CPU kernel is fastest on [heads, tokens, head_dim] with keys repeated beforehand.
    torch_q, torch_k, torch_v = (
        torch.tensor(np.repeat(np.asarray(array), repeats, axis=1))
        .transpose(0, 1)[None]
        .contiguous()
        for array, repeats in ((q, 1), (k, groups), (v, groups))
    )

    def call() -> None:
        torch.nn.functional.scaled_dot_product_attention(torch_q, torch_k, torch_v, is_causal=True)

    return call


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['tokens']} tokens, {result['images']} images, float32")
    for column in ("variant", "median s", "time / bsjax DENSE", "visible pairs / dense"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in result["rows"]:
        pairs = row["visible_pairs_over_dense"]
        table.add_row(
            row["variant"],
            f"{row['median_seconds']:.3f}",
            f"{row['time_over_bsjax_dense']:.3f}",
            "" if pairs is None else f"{pairs:.3f}",
        )
    Console(width=100).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--image-tokens", type=int, default=400)
    parser.add_argument("--text-tokens", type=int, default=9)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    print(f"written to {write_result('attention_cpu', result, arguments.output)}")


if __name__ == "__main__":
    main()
