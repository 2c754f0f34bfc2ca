"""bsjax: block-sparse prefill for vision-language models in JAX (BlindSight, arXiv 2507.09071).

Names are imported when they are first used: a program that only calls `sparse_attention`, or only
asks the console script for help, does not wait for transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsjax.attention import sparse_attention
    from bsjax.checkpoint.loading import LoadedModel, load
    from bsjax.errors import (
        BackendError,
        BsjaxError,
        CapacityError,
        CheckpointError,
        GenerationError,
        MaskError,
        MessageError,
        ProfileError,
        SampleError,
        TemplateError,
    )
    from bsjax.masks.block_mask import BlockMask
    from bsjax.masks.categories import HeadCategory, KeyGroup
    from bsjax.masks.template import Image, Sinks, Template, Text
    from bsjax.profiles.profile import Profile
    from bsjax.profiling import profile
    from bsjax.runtime.generation import forward, generate, stream
    from bsjax.runtime.results import Result, Stats
    from bsjax.samples import Samples, read_samples

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "BlockMask",
    "BsjaxError",
    "CapacityError",
    "CheckpointError",
    "GenerationError",
    "HeadCategory",
    "Image",
    "KeyGroup",
    "LoadedModel",
    "MaskError",
    "MessageError",
    "Profile",
    "ProfileError",
    "Result",
    "SampleError",
    "Samples",
    "Sinks",
    "Stats",
    "Template",
    "TemplateError",
    "Text",
    "forward",
    "generate",
    "load",
    "profile",
    "read_samples",
    "sparse_attention",
    "stream",
]

_HOMES = {
    "bsjax.attention": ("sparse_attention",),
    "bsjax.masks.block_mask": ("BlockMask",),
    "bsjax.masks.categories": ("HeadCategory", "KeyGroup"),
    "bsjax.checkpoint.loading": ("LoadedModel", "load"),
    "bsjax.errors": (
        "BackendError",
        "BsjaxError",
        "CapacityError",
        "CheckpointError",
        "GenerationError",
        "MaskError",
        "MessageError",
        "ProfileError",
        "SampleError",
        "TemplateError",
    ),
    "bsjax.runtime.generation": ("forward", "generate", "stream"),
    "bsjax.profiles.profile": ("Profile",),
    "bsjax.profiling": ("profile",),
    "bsjax.runtime.results": ("Result", "Stats"),
    "bsjax.samples": ("Samples", "read_samples"),
    "bsjax.masks.template": ("Image", "Sinks", "Template", "Text"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
