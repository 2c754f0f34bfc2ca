"""GPU kernels written in Triton, called through jax-triton, on the schedules of `bsjax.masks`.

launch           how a kernel is called: through jax-triton, or in Triton's interpreter
heads            how the channels of a head are divided into blocks
predicate        which keys a query sees, inside a kernel
product          matrix products, inside a kernel
prefill          prefill attention
prefill_kernel   its kernel
decode           decode attention
decode_kernels   its kernels
configurations   block sizes, warps and pipeline stages
"""

# First of all, because it says what to install where something is missing.
from bsjax.triton import launch  # noqa: F401
