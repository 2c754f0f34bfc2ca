"""What the configs of all families must say, checked before anything is built from them."""

import math
from typing import Any

from transformers import PretrainedConfig

from bsjax.errors import CheckpointError


def check_positive(config: PretrainedConfig, *names: str) -> None:
    """Refuses fields that are no finite numbers above 0.

    Raises:
      CheckpointError: says which field has what.
    """
    for name in names:
        positive_number(f"The config's {name}", getattr(config, name, None))


def positive_number(name: str, value: Any) -> float:
    """The value, a finite number above 0.

    Raises:
      CheckpointError: it is none.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise CheckpointError(f"{name} must be a number above 0, got {value!r}.")
    return float(value)


def check_attention_heads(config: PretrainedConfig) -> None:
    """Refuses layers without heads, or with key-value heads that do not divide the query heads.

    Raises:
      CheckpointError: says what there is.
    """
    check_positive(config, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"The config's {config.num_attention_heads} attention heads are not a multiple of its "
            f"{config.num_key_value_heads} key-value heads."
        )
