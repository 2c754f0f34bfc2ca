"""GPU kernels, written in Pallas and lowered to Triton."""

import warnings

from bsjax.pallas.configurations import KernelConfiguration, configuration, default_blocks
from bsjax.pallas.decode import DecodeConfiguration, decode_attention, decode_configuration
from bsjax.pallas.prefill import prefill_attention

# JAX 0.12 warns whenever a kernel is lowered. Users of bsjax can do nothing about it.
warnings.filterwarnings(
    "ignore", message="The Pallas Triton backend is deprecated", category=DeprecationWarning
)

__all__ = [
    "DecodeConfiguration",
    "KernelConfiguration",
    "configuration",
    "decode_attention",
    "decode_configuration",
    "default_blocks",
    "prefill_attention",
]
