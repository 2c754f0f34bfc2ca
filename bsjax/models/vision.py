"""What vision towers share: attention within segments, two-layer MLPs."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from bsjax.attention import ragged_attention
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import Schedule
from bsjax.models.layers import Attend, activation


class VisionMLP(nnx.Module):
    """Two linear layers with an activation between them (transformers: VisionMlp, SiglipMLP)."""

    def __init__(self, width: int, inner: int, act: str, dtype: Any, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(width, inner, param_dtype=dtype, rngs=rngs)
        self.fc2 = nnx.Linear(inner, width, param_dtype=dtype, rngs=rngs)
        self.act = activation(act)

    def __call__(self, hidden: Float[Array, "patches width"]) -> Float[Array, "patches width"]:
        """The projection of each patch."""
        return self.fc2(self.act(self.fc1(hidden)))


def segment_attention(schedule: Schedule, heads: int, backend: str) -> Attend:
    """Attention in which each row sees exactly its own segment."""
    categories = jnp.full(heads, HeadCategory.INTRA_IMAGE, jnp.int32)

    def attend(q: Array, k: Array, v: Array) -> Array:
        return ragged_attention(
            q, k, v, schedule, categories, scale=q.shape[-1] ** -0.5, backend=backend
        )

    return attend
