"""Exponentials as powers of two: exp2 of scaled scores in two instructions an element."""

import math
import struct

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float32

LOG2_E = 1 / math.log(2)
"""Scores times this make exp2 of exp."""


def scaled_exp2(
    scores: Float32[Array, "rows columns"],
    scale: float,
    offset: Float32[Array, "..."],
    *,
    interpret: bool,
) -> Float32[Array, "rows columns"]:
    """`2 ** (scores * scale + offset)`, inside a kernel.

    Left to the compiler, that is seven instructions: it multiplies and adds apart, and scales
    results below 2**-126, which a softmax has no use for, around the hardware's exp2. Loops over
    blocks of keys spend a quarter of their instructions on the difference.

    Args:
      scores: -inf yields 0.
      scale: known when the kernel is compiled.
      offset: broadcasts against `scores`.
      interpret: compute it in plain JAX, for kernels that run interpreted.
    """
    if interpret:
        return jnp.exp2(scores * scale + offset)
    immediate = struct.unpack("<I", struct.pack("<f", scale))[0]
    (result,) = pltriton.elementwise_inline_asm(
        "{ .reg .f32 scaled; "
        f"fma.rn.f32 scaled, $1, 0f{immediate:08X}, $2; "
        "ex2.approx.ftz.f32 $0, scaled; }",
        args=[scores, jnp.broadcast_to(offset, scores.shape)],
        constraints="=f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, jnp.float32)],
    )
    return result
