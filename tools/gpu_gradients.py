"""The gradients of attention on a GPU, compared with those of the `xla` backend.

The kernels of the gradients are Triton's, whichever kernel computes what is differentiated. The
`xla` backend gets the same numbers in float32, and multiplies them in float32.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bsjax.attention import sparse_attention
from bsjax.masks.block_mask import BlockMask
from bsjax.masks.categories import HeadCategory
from tools.gpu_comparisons import CATEGORIES, Comparison
from tools.gpu_templates import TEMPLATES, VISIBILITIES

TOLERANCE_IN_EPSILONS = {"bfloat16": 6, "float16": 6, "float32": 256}
"""The largest allowed error (`greatest_gradient_error`), in units of the dtype's epsilon.

In half precision, weights, their gradients and the result are rounded once each, and so is the
output, which the gradients of the weights depend on: in the cases of `tools.gpu_cases` on a CPU,
the `xla` backend itself is wrong by up to 2.4 epsilons.
"""


@dataclass(frozen=True)
class GradientCase:
    """Gradients of q, k and v, of a weighted sum of outputs and log-sum-exps."""

    head_dim: int
    dtype: str
    group: int = 2
    """Query heads per key head."""
    visibility: str = "causal"
    template: str = "ragged"
    kv_heads: int = 2
    categories: tuple[HeadCategory, ...] = CATEGORIES
    """The categories that the heads take in turn."""
    seed: int = 0

    @property
    def name(self) -> str:
        """A description that distinguishes this case from others."""
        parts = [
            f"gradients {self.template}",
            f"head dim {self.head_dim}",
            self.dtype,
            f"{self.group} query heads a key head",
            self.visibility,
            *([] if self.categories == CATEGORIES else [self.categories[0].name]),
        ]
        return ", ".join(parts)

    def mask(self) -> BlockMask:
        """The mask, with the transposed schedule."""
        visibility = VISIBILITIES[self.visibility]
        return BlockMask(
            TEMPLATES[self.template],
            [
                self.categories[head % len(self.categories)]
                for head in range(self.group * self.kv_heads)
            ],
            bidirectional_images=visibility.bidirectional_images,
            window=visibility.window,
            gradients=True,
        )

    def run(self, kernel: str) -> list[Comparison]:
        """Compares all gradients of all rows and heads."""
        mask = self.mask()
        tokens, q_heads = mask.template.tokens, self.group * self.kv_heads
        generator = np.random.default_rng(self.seed)

        def random(heads: int, *channels: int) -> np.ndarray:
            return generator.standard_normal((tokens, heads, *channels), np.float32)

        heads = (q_heads, self.kv_heads, self.kv_heads, q_heads)
        q, k, v, out_gradient = (
            random(each, self.head_dim).astype(jnp.dtype(self.dtype)) for each in heads
        )
        lse_gradient = random(q_heads)
        exact = (array.astype(np.float32) for array in (q, k, v, out_gradient))
        found = gradients(q, k, v, out_gradient, lse_gradient, mask, backend=kernel)
        wanted = gradients(*exact, lse_gradient, mask, backend="xla")
        limit = TOLERANCE_IN_EPSILONS[self.dtype] * float(jnp.finfo(self.dtype).eps)
        return [
            Comparison(f"gradient of {name}", greatest_gradient_error(one, other), limit)
            for name, one, other in zip("qkv", found, wanted, strict=True)
        ]


def _gradients(
    q: Any, k: Any, v: Any, out_gradient: Any, lse_gradient: Any, mask: Any, *, backend: str
) -> Any:
    def outputs(q: Any, k: Any, v: Any) -> Any:
        return sparse_attention(q, k, v, mask, backend=backend, return_lse=True)

    _, pull_back = jax.vjp(outputs, q, k, v)
    return pull_back((out_gradient, lse_gradient))


gradients = jax.jit(_gradients, static_argnames="backend")


def greatest_gradient_error(found: Any, wanted: Any) -> float:
    """The greatest ||found - wanted|| of a row and head, relative to the norm of such rows.

    That is ||wanted|| of the row itself, or of the head's average row if that is larger: a gradient
    that cancels is not more exact than its terms. It is infinite if any value is not finite.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    norm = np.linalg.norm(wanted, axis=-1)
    norm = np.maximum(norm, np.sqrt(np.mean(norm**2, axis=0, keepdims=True)))
    difference = np.linalg.norm(found - wanted, axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(difference == 0, 0.0, difference / norm)
    return float(relative.max(initial=0.0))
