"""Matrix products inside a kernel."""

from typing import no_type_check

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction


def precision_of(dtype: object) -> str:
    """The `PRECISION` of products of this dtype: float32 is multiplied in float32, not in TF32."""
    # Triton's interpreter multiplies bfloat16 numbers as if they were integers. Their values are
    # converted to float32 first, exactly.
    if isinstance(product, InterpretedFunction):
        return "interpreted"
    return "ieee" if dtype == "float32" else "tf32"


@triton.jit
@no_type_check
def product(left, right, addend, PRECISION: tl.constexpr):
    """`left @ right + addend`, summed in float32; `addend` may be None."""
    if PRECISION == "interpreted":
        left = left.to(tl.float32)
        right = right.to(tl.float32)
        return tl.dot(left, right, addend, input_precision="ieee")
    else:
        return tl.dot(left, right, addend, input_precision=PRECISION)


@triton.jit
@no_type_check
def product_of_heads(
    left, second_left, right, second_right, SECOND: tl.constexpr, PRECISION: tl.constexpr
):
    """`left @ right.T`, over both blocks of channels of heads."""
    result = product(left, right.T, None, PRECISION)
    if SECOND > 0:
        result = product(second_left, second_right.T, result, PRECISION)
    return result
