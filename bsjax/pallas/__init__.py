"""GPU kernels, written in Pallas and lowered to Triton.

configurations   block sizes, warps and pipeline stages of prefill
exponential      powers of two in two instructions
prefill          prefill attention
decode           decode attention

Importing this package imports neither kernel, so that it works with a JAX that has no Pallas for
Triton any more.
"""

import warnings

# JAX 0.12 warns whenever a kernel is lowered. Users of bsjax can do nothing about it.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)
