"""Block sizes, warps and pipeline stages of the Triton kernel of prefill.

configurations.json is of the same format as that of `bsjax.pallas`, and chosen in the same way.
"""

from bsjax.pallas.configurations import ConfigurationTable

_TABLE = ConfigurationTable("bsjax.triton")
default_blocks = _TABLE.default_blocks
configuration = _TABLE.configuration
checked_configuration = _TABLE.checked_configuration
