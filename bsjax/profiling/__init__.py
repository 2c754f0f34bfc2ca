"""Categories found from data: what BlindSight measures once, and a second stage end to end.

    from bsjax.profiling import Evaluator, measure, refine

    measurements = measure(model, samples)
    categories = measurements.one_shot(target_reduction=0.4)
    evaluator = Evaluator(model, samples, sinks=measurements.sinks)
    refinement = refine(model, measurements, evaluator, target_reduction=0.4)
    evaluator.compare(categories).kl, evaluator.compare(refinement.categories).kl

`bsjax.profile` does all of it, with a check on held-out samples, and makes a `Profile`.

groups        attention by key group: exact outputs of all categories from one dense pass
computations  the jitted programs
offsets       sink discovery
measurements  the pass over the samples, and what it measured
selection     the one-shot rule, and its budget mode
evaluation    next-token distributions, sparse against dense
knapsack      heads in the order of damage per FLOP saved
refinement    the second stage
end_to_end    the check on held-out samples
driver        `profile`
"""

from bsjax.profiling.driver import profile
from bsjax.profiling.evaluation import Comparison, Evaluator
from bsjax.profiling.groups import GROUPS, SPARSE_CATEGORIES
from bsjax.profiling.knapsack import Move
from bsjax.profiling.measurements import Measurements, measure
from bsjax.profiling.offsets import SinkDiscovery
from bsjax.profiling.ordered_samples import OrderedSamples
from bsjax.profiling.refinement import Damage, Refinement, refine

__all__ = [
    "GROUPS",
    "SPARSE_CATEGORIES",
    "Comparison",
    "Damage",
    "Evaluator",
    "Measurements",
    "Move",
    "Refinement",
    "OrderedSamples",
    "SinkDiscovery",
    "measure",
    "profile",
    "refine",
]
