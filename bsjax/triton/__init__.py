"""GPU kernels written in Triton, called through jax-triton, on the schedules of `bsjax.masks`.

launch                    how a kernel is called: by jax-triton, or in Triton's interpreter
heads                     how the channels of a head are divided into blocks
predicate                 which keys a query sees, inside a kernel
product                   matrix products, inside a kernel
tiles                     a program's tile, its rows and the next block, inside a kernel
prefill                   prefill attention
prefill_kernel            its kernel
backward                  the gradients of prefill attention
backward_kernels          their kernels
decode                    decode attention
decode_kernels            its kernels
configurations            block sizes, warps and pipeline stages of prefill
gradient_configurations   those of the kernels of the gradients
"""

# First of all, because it says what to install where something is missing.
from bsjax.triton import launch  # noqa: F401
