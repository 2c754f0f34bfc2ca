"""Published models compiled for long prompts, once for all tests that look at them."""

from functools import cache

from tests.support.gpu_compiler import require_gpu_compiler
from tools.memory_table import Measurement, measure


@cache
def _measured(model: str, tokens: int) -> Measurement:
    return measure(model, tokens)


def measured(model: str, tokens: int) -> Measurement:
    """What `tools.memory_table` finds; skips the test where the compiler for GPUs is missing."""
    require_gpu_compiler()
    return _measured(model, tokens)
