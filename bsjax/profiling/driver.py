"""`bsjax.profile`: from samples to a profile, in stages that can be interrupted."""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import whole_number
from bsjax.errors import ProfileError
from bsjax.masks.flops import flops_per_kind
from bsjax.masks.template import Sinks
from bsjax.profiles.profile import Profile, installed_versions
from bsjax.profiling import refinement as second_stage
from bsjax.profiling import selection
from bsjax.profiling.end_to_end import check_end_to_end
from bsjax.profiling.evaluation import Evaluator
from bsjax.profiling.groups import SPARSE_CATEGORIES
from bsjax.profiling.measurements import Measurements, measure
from bsjax.profiling.ordered_samples import Messages, OrderedSamples, check_images
from bsjax.profiling.progress import Progress, reporting
from bsjax.profiling.refinement import Refinement
from bsjax.profiling.state import State, settings_of
from bsjax.samples import Samples


def profile(
    model: LoadedModel,
    samples: Sequence[Messages] | Samples,
    *,
    threshold: float = 0.05,
    criterion: str = "output_error",
    quantile: float = 0.9,
    target_reduction: float | None = None,
    refine: bool = False,
    max_kl: float | None = None,
    max_evaluations: int = second_stage.MAX_EVALUATIONS,
    sinks: Sinks | None = None,
    held_out: float = 0.25,
    answer_tokens: int = 8,
    seed: int = 0,
    source: str = "",
    resume: str | PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    backend: str = "auto",
) -> Profile:
    """Chooses a category for every head of a model from data (BlindSight, and beyond it `refine`).

    The dense model runs once over each sample; from exact outputs of all categories follow the
    attention mass of each key group and the relative error of each category, per head, over image
    queries. A head takes the category with the fewest FLOPs whose error stays within the threshold
    in the given quantile of the samples. The choice is checked on samples held out. The same
    samples in another order give the same profile.

    Args:
      model: from `bsjax.load`.
      samples: conversations (Hugging Face chat messages), or what `bsjax.read_samples` returns:
        prompts like those to come, with several images each. One image is the least; such samples
        count in FLOPs and in the check, not in the quantile. Of equal samples one is kept.
      threshold: most relative error of a head's output (from 0; errors above 1 exist), or most
        attention mass dropped (0 to 1).
      criterion: `output_error` (||o_c - o|| / ||o||) or `mass`: which of the two.
      quantile: share of the samples with several images that must stay within the threshold.
      target_reduction: instead of `threshold`: the share of attention FLOPs, over all layers, heads
        and samples, to save at least. The least threshold that does is found.
      refine: correct the choice by its measured effect on the model's answers, at
        `target_reduction`, within `max_kl`, or, with neither, at the reduction that `threshold`
        reaches. Takes many prefills per sample, see `bsjax.profiling.refine`.
      max_kl: with `refine`: save as much as possible with KL(dense || sparse) of next-token
        distributions at most this, in nats.
      max_evaluations: with `refine`: how many arrays of categories to compare at most, one prefill
        of every sample each.
      sinks: which tokens of an image are sinks; None finds them in data, in one more pass.
      held_out: share of the samples that is kept for the check, in [0, 1). With 0 nothing is
        checked, and the profile has no `end_to_end`.
      answer_tokens: tokens of the dense model's answer along which distributions are compared.
      seed: draws the held-out samples.
      source: where the samples come from, in words, for the file; without it, what
        `bsjax.read_samples` says.
      resume: a state file. Everything measured is kept in it at once; a run that was interrupted,
        or one with other thresholds, budgets or samples, takes from it what it can use. It stays
        when the run is complete.
      progress: None shows a bar where stderr is a terminal, False nothing; or a function called as
        `progress(stage, done, total)`.
      backend: of the attention, see `sparse_attention`.

    Raises:
      ProfileError: an argument out of range, a sample without an image, no sample with several,
        a reduction that cannot be reached, or a state file of another model, dtype, backend or of
        other versions.
      BsjaxError: as `generate`, for samples that are no prompts or do not fit.
    """
    backend = resolve_backend(backend)
    _check_arguments(threshold, criterion, quantile, target_reduction, refine, max_kl)
    whole_number("answer_tokens", answer_tokens, least=1, error=ProfileError)
    whole_number(
        "max_evaluations", max_evaluations, least=second_stage.LEAST_EVALUATIONS, error=ProfileError
    )
    whole_number("seed", seed, least=0, error=ProfileError)
    if sinks is not None and not isinstance(sinks, Sinks):
        raise ProfileError(f"sinks must be bsjax.Sinks or None, got {sinks!r}.")
    if not isinstance(source, str):
        raise ProfileError(f"source must be text, got {source!r}.")
    if isinstance(samples, Samples):
        source = source or samples.description
    ordered = OrderedSamples.of(samples)
    chosen_with, kept_back = ordered.split(held_out, seed)
    check_images(chosen_with, several=True)
    check_images(kept_back, several=False)
    state = State(resume, settings_of(model, backend))
    with reporting(progress) as report:
        measurements = measure(
            model, chosen_with, sinks=sinks, backend=backend, progress=report, state=state
        )
        thresholds: dict[str, float] = {"quantile": quantile}
        refinement = None
        if refine:
            if target_reduction is None and max_kl is None:
                categories = measurements.one_shot(
                    threshold, criterion=criterion, quantile=quantile
                )
                thresholds["threshold"] = threshold
                target_reduction = measurements.reduction(categories)
                if target_reduction == 0:
                    raise ProfileError(
                        f"At threshold={threshold:g} no head saves anything, so there is nothing "
                        "to refine. Raise it, or give a target_reduction or a max_kl."
                    )
            refinement = _refined(
                model,
                measurements,
                chosen_with,
                report,
                state,
                backend=backend,
                answer_tokens=answer_tokens,
                target_reduction=target_reduction,
                max_kl=max_kl,
                max_evaluations=max_evaluations,
                criterion=criterion,
                quantile=quantile,
            )
            categories = refinement.categories
        else:
            if target_reduction is not None:
                thresholds["target_reduction"] = target_reduction
                threshold = measurements.threshold_for(
                    target_reduction, criterion=criterion, quantile=quantile
                )
            thresholds["threshold"] = threshold
            categories = measurements.one_shot(threshold, criterion=criterion, quantile=quantile)
        found = measurements.sink_discovery
        unchecked = Profile(
            family=model.family.name,
            categories=categories,
            sinks=measurements.sinks,
            fingerprint=model.fingerprint,
            criterion=criterion,
            thresholds=thresholds,
            sample_count=len(chosen_with.messages),
            sample_source=source,
            sample_fingerprint=ordered.fingerprint,
            statistics=measurements.statistics(quantile) | _damage_statistics(refinement),
            attention_flops=measurements.attention_flops(categories),
            attention_flops_per_kind=flops_per_kind(
                categories,
                measurements.flops,
                model.family.visibilities(model.config),
                model.family.layer_kinds(model.config),
            ),
            sink_discovery=None
            if found is None
            else {"rule": found.rule, "mass_by_offset": list(found.mass_by_offset)},
            refinement=None if refinement is None else refinement.numbers,
            versions=installed_versions() | {"dtype": str(model.dtype), "backend": backend},
        )
        if not kept_back:
            return unchecked
        end_to_end = check_end_to_end(
            model,
            unchecked,
            kept_back,
            answer_tokens=answer_tokens,
            backend=backend,
            progress=report,
            state=state,
        )
        return dataclasses.replace(
            unchecked,
            end_to_end=end_to_end | {"answer_tokens": answer_tokens, "split_seed": seed},
            held_out_count=len(kept_back.messages),
        )


def _check_arguments(
    threshold: Any,
    criterion: Any,
    quantile: Any,
    target_reduction: Any,
    refine: Any,
    max_kl: Any,
) -> None:
    """Refuses before anything runs what would be refused hours later."""
    selection.checked_threshold(threshold, criterion)
    selection.share("quantile", quantile, zero=True)
    if target_reduction is not None:
        selection.share("target_reduction", target_reduction)
    if max_kl is not None:
        selection.checked_divergence("max_kl", max_kl)
    if max_kl is not None and not refine:
        raise ProfileError("max_kl is a budget of refining: pass refine=True with it.")
    if max_kl is not None and target_reduction is not None:
        raise ProfileError("Give target_reduction or max_kl, not both.")


def _refined(
    model: LoadedModel,
    measurements: Measurements,
    samples: OrderedSamples,
    report: Progress,
    state: State,
    *,
    backend: str,
    answer_tokens: int,
    **options: Any,
) -> Refinement:
    evaluator = Evaluator(
        model,
        samples,
        answer_tokens=answer_tokens,
        sinks=measurements.sinks,
        backend=backend,
        state=state,
        progress=report,
    )
    return second_stage.refine(model, measurements, evaluator, progress=report, **options)


def _damage_statistics(refinement: Refinement | None) -> dict[str, np.ndarray]:
    if refinement is None:
        return {}
    return {
        f"damage_{category.name}": refinement.damage.kl[..., index]
        for index, category in enumerate(SPARSE_CATEGORIES)
    }
