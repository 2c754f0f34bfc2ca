"""GPU kernels, written in Pallas and lowered to Triton."""

from bsjax.pallas.configurations import KernelConfiguration, configuration, default_blocks
from bsjax.pallas.prefill import prefill_attention

__all__ = ["KernelConfiguration", "configuration", "default_blocks", "prefill_attention"]
