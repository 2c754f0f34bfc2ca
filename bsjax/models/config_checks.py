"""Checks of Hugging Face configurations, made before anything is built from them."""

from transformers import PretrainedConfig

from bsjax.checks import positive_number
from bsjax.errors import CheckpointError


def check_positive(config: PretrainedConfig, *names: str) -> None:
    """Rejects fields that are not finite numbers above 0.

    Raises:
      CheckpointError: names the field and its value.
    """
    for name in names:
        positive_number(f"The config's {name}", getattr(config, name, None), error=CheckpointError)


def check_attention_heads(config: PretrainedConfig) -> None:
    """Rejects layers without heads, or whose key-value heads do not divide the query heads.

    Raises:
      CheckpointError: gives the numbers of heads.
    """
    check_positive(config, "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"The config's {config.num_attention_heads} attention heads are not a multiple of its "
            f"{config.num_key_value_heads} key-value heads."
        )
