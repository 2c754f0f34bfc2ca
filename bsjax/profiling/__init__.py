"""Categories from data: BlindSight's measurements, and refinement end to end.

    from bsjax.profiling import Evaluator, measure, refine

    measurements = measure(model, samples)
    categories = measurements.one_shot(target_reduction=0.4)
    evaluator = Evaluator(model, samples, sinks=measurements.sinks)
    refinement = refine(model, measurements, evaluator, target_reduction=0.4)
    evaluator.compare(categories).kl, evaluator.compare(refinement.categories).kl

`bsjax.profile` does all of this, checks the result on held-out samples, and makes a `Profile`.

settings         how categories are chosen and checked
ordered_samples  samples in the order of their fingerprints, and the held-out share
prompt_inputs    prompts in packed order, and schedules
groups           attention by key group: exact outputs of all categories from one dense pass
computations     what is computed on the device
offsets          sink discovery
measurements     the pass over the samples, and its measurements
selection        the one-shot rule, and its budget mode
evaluation       next-token distributions, sparse against dense
knapsack         heads in the order of damage per FLOP saved
refinement       the second stage
end_to_end       the check on held-out samples
state            a file that keeps what a run has measured
driver           `profile`

A name is imported when it is first used; `__init__.pyi` says which module provides each.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
