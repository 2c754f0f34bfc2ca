"""GPU kernels, written in Pallas and lowered to Triton.

configurations          GPUs; block sizes, warps and pipeline stages of prefill
decode_configurations   those of decode
pieces                  how the channels of a head are divided into blocks
parts                   the combination of split tiles
exponential             powers of two in two instructions
prefill                 prefill attention
decode                  decode attention

The first four need no Pallas, and `bsjax.triton` uses them, too: importing this package imports
neither kernel, so that it works with a JAX that has no Pallas for Triton any more.
"""

import warnings

# JAX 0.12 warns whenever a kernel is lowered. Users of bsjax can do nothing about it.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)
