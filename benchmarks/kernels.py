"""Whether the GPU kernels can run on this machine."""

import jax
import jax.numpy as jnp

from bsjax.attention import ragged_attention
from bsjax.errors import BackendError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import build_schedule, category_tables
from bsjax.masks.template import Template, Text


def problem_of(kernel: str) -> str | None:
    """Why attention by a kernel, "pallas" or "triton", cannot run here; None if it can.

    Traces a small call: all that a kernel needs, and the versions of it, are looked at then.
    Nothing is compiled.
    """
    schedule = build_schedule(
        Template.from_segments([Text(16)]),
        category_tables([HeadCategory.DENSE]),
        block_q=16,
        block_kv=16,
    )
    array = jax.ShapeDtypeStruct((16, 1, 64), jnp.float32)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        category = jnp.zeros(1, jnp.int32)
        return ragged_attention(q, k, v, schedule, category, scale=1.0, backend=kernel)

    try:
        jax.eval_shape(attend, array, array, array)
    except (BackendError, ImportError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    except Exception:  # Nothing is missing, but something is wrong: running the kernel shows what.
        return None
    return None
