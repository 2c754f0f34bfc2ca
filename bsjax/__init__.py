"""bsjax: block-sparse prefill for vision-language models in JAX (BlindSight, arXiv 2507.09071)."""

from bsjax.attention import sparse_attention
from bsjax.block_mask import BlockMask
from bsjax.categories import HeadCategory, KeyGroup
from bsjax.checkpoint import LoadedModel, load
from bsjax.errors import (
    BackendError,
    BsjaxError,
    CapacityError,
    CheckpointError,
    GenerationError,
    MaskError,
    MessageError,
    ProfileError,
    TemplateError,
)
from bsjax.generation import forward, generate, stream
from bsjax.profile_file import Profile
from bsjax.results import Result, Stats
from bsjax.template import Image, Sinks, Template, Text

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
    "Sinks",
    "Stats",
    "Template",
    "TemplateError",
    "Text",
    "forward",
    "generate",
    "load",
    "sparse_attention",
    "stream",
]
