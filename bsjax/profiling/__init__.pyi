# The public names, and the module that provides each. `__init__.py` imports a name when it is first
# used.

from .driver import Evidence as Evidence
from .driver import profile as profile
from .evaluation import Comparison as Comparison
from .evaluation import Evaluator as Evaluator
from .groups import GROUPS as GROUPS
from .groups import SPARSE_CATEGORIES as SPARSE_CATEGORIES
from .knapsack import Move as Move
from .measurements import AttentionFlops as AttentionFlops
from .measurements import Measurements as Measurements
from .measurements import measure as measure
from .offsets import SinkDiscovery as SinkDiscovery
from .ordered_samples import OrderedSamples as OrderedSamples
from .refinement import Damage as Damage
from .refinement import Refinement as Refinement
from .refinement import refine as refine

__all__: list[str]
