"""Block sizes, warps and pipeline stages of the Triton kernel of prefill."""

from bsjax.gpu.configurations import ConfigurationTable

_TABLE = ConfigurationTable("bsjax.triton")
default_blocks = _TABLE.default_blocks
configuration = _TABLE.configuration
checked_configuration = _TABLE.checked_configuration
