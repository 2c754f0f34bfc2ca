# The public names, and the module that provides each. `__init__.py` imports a name when it is first
# used.

from .attention import sparse_attention as sparse_attention
from .checkpoint.loading import (
    LoadedModel as LoadedModel,
)
from .checkpoint.loading import (
    load as load,
)
from .errors import (
    BackendError as BackendError,
)
from .errors import (
    BsjaxError as BsjaxError,
)
from .errors import (
    CapacityError as CapacityError,
)
from .errors import (
    CheckpointError as CheckpointError,
)
from .errors import (
    GenerationError as GenerationError,
)
from .errors import (
    MaskError as MaskError,
)
from .errors import (
    MessageError as MessageError,
)
from .errors import (
    ProfileError as ProfileError,
)
from .errors import (
    SampleError as SampleError,
)
from .errors import (
    SessionError as SessionError,
)
from .errors import (
    TemplateError as TemplateError,
)
from .masks.block_mask import BlockMask as BlockMask
from .masks.categories import (
    HeadCategory as HeadCategory,
)
from .masks.categories import (
    KeyGroup as KeyGroup,
)
from .masks.stacked_masks import (
    StackedMasks as StackedMasks,
)
from .masks.stacked_masks import (
    stack_masks as stack_masks,
)
from .masks.template import (
    Image as Image,
)
from .masks.template import (
    Sinks as Sinks,
)
from .masks.template import (
    Template as Template,
)
from .masks.template import (
    Text as Text,
)
from .models.sharding import mesh as mesh
from .profiles.profile import Profile as Profile
from .profiling.driver import profile as profile
from .prompts.sources import ImageSources as ImageSources
from .runtime.generation import (
    forward as forward,
)
from .runtime.generation import (
    generate as generate,
)
from .runtime.generation import (
    generate_iter as generate_iter,
)
from .runtime.generation import (
    stream as stream,
)
from .runtime.likelihood import score as score
from .runtime.results import (
    Result as Result,
)
from .runtime.results import (
    Score as Score,
)
from .runtime.results import (
    Stats as Stats,
)
from .runtime.results import (
    TokenScores as TokenScores,
)
from .runtime.session import Session as Session
from .runtime.warmup import (
    Warmup as Warmup,
)
from .runtime.warmup import (
    warmup as warmup,
)
from .samples import (
    Samples as Samples,
)
from .samples import (
    read_samples as read_samples,
)

__version__: str
__all__: list[str]
