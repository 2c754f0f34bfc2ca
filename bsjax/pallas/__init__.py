"""GPU kernels, written in Pallas and lowered to Triton."""

from bsjax.pallas.configurations import KernelConfiguration, configuration, default_blocks
from bsjax.pallas.decode import DecodeConfiguration, decode_attention, decode_configuration
from bsjax.pallas.prefill import prefill_attention

__all__ = [
    "DecodeConfiguration",
    "KernelConfiguration",
    "configuration",
    "decode_attention",
    "decode_configuration",
    "default_blocks",
    "prefill_attention",
]
