"""Checks of Hugging Face configurations, made before anything is built from them."""

from typing import Any

from transformers import PretrainedConfig

from bsjax.checks import as_number, positive_number
from bsjax.errors import CheckpointError

# The largest value accepted for each size: far above those of published models. transformers makes
# lists as long as some of these sizes, before they can be compared with the checkpoint's tensors.
_LARGEST_SIZES = {
    **dict.fromkeys(("num_hidden_layers", "depth"), 1024),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads"), 4096),
    **dict.fromkeys(("hidden_size", "intermediate_size", "embed_dim", "out_hidden_size"), 2**20),
    "head_dim": 2**14,
    "vocab_size": 2**24,
    "num_labels": 2**16,
    **dict.fromkeys(("in_channels", "num_channels"), 64),
    **dict.fromkeys(("patch_size", "temporal_patch_size", "spatial_merge_size"), 512),
    "merge_size": 512,
    "image_size": 2**13,
    "min_pixels": 2**24,
    "max_pixels": 2**40,
    "window_size": 2**20,
    "mm_tokens_per_image": 2**16,
    "sliding_window": 2**31,
    "sliding_window_pattern": 1024,
    "max_position_embeddings": 2**31,
}

# Numbers that a computation in float32 divides by, or takes a root or power of.
_POSITIVE = (
    "rms_norm_eps",
    "layer_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "factor",
    "mlp_ratio",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
    "rescale_factor",
    "image_std",
)
_LEAST, _MOST = 1e-30, 1e30

_LONGEST_LIST = 4096


def check_settings(settings: Any, file: Any) -> None:
    """Rejects settings of a checkpoint with values that no real model has.

    Called with the contents of a JSON file, before anything is made from them: sizes must be whole
    numbers from 1 to a limit, scales and epsilons finite numbers above 0, and lists short. Fields
    are recognised by their names. Those that are null or absent have defaults, and all others are
    ignored.

    Args:
      settings: the contents, nested objects and lists included.
      file: named in the message.

    Raises:
      CheckpointError: names the field and its value.
    """
    if isinstance(settings, list):
        if len(settings) > _LONGEST_LIST:
            raise CheckpointError(
                f"{file} holds a list of {len(settings):,} entries, more than {_LONGEST_LIST:,}."
            )
        for item in settings:
            check_settings(item, file)
    if not isinstance(settings, dict):
        return
    for name, value in settings.items():
        check_settings(value, file)
        largest = _LARGEST_SIZES.get(name)
        if largest is not None and value is not None:
            # Image settings have the sides of the patches in lists or objects in some files.
            for size in _items(value):
                if type(size) is not int or not 1 <= size <= largest:
                    raise CheckpointError(
                        f"{file} has the {name} {size!r}: it must be a whole number from 1 to "
                        f"{largest:,}."
                    )
        if name in _POSITIVE and value is not None:
            for number in _items(value):
                if not _LEAST <= as_number(number) <= _MOST:
                    raise CheckpointError(
                        f"{file} has the {name} {number!r}: it must be a number above 0, from "
                        f"{_LEAST:g} to {_MOST:g}."
                    )
        if name == "mrope_section" and value is not None:
            sections = _items(value)
            if not sections or any(type(part) is not int or part < 0 for part in sections):
                raise CheckpointError(
                    f"{file} has the mrope_section {value!r}: it must be a list of whole numbers."
                )
        if name == "image_mean" and value is not None:
            if not all(abs(as_number(mean)) <= _MOST for mean in _items(value)):
                raise CheckpointError(f"{file} has the image_mean {value!r}, which is not finite.")
        if name == "size" and isinstance(value, dict):
            _check_image_size(value, file)


def _check_image_size(size: dict[str, Any], file: Any) -> None:
    """Checks what images are scaled to: sides in pixels, or for Qwen the area between bounds."""
    for name, pixels in size.items():
        largest = 2**40 if name == "longest_edge" else 2**24
        if pixels is not None and (type(pixels) is not int or not 1 <= pixels <= largest):
            raise CheckpointError(
                f"{file} has the image size {name} {pixels!r}: it must be a whole number from 1 "
                f"to {largest:,}."
            )


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


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
