"""`bsjax.profile`: from samples to a profile, in stages that can be interrupted."""

import dataclasses
from collections.abc import Sequence
from os import PathLike
from typing import NamedTuple

import numpy as np
from jaxtyping import Int8

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import DescribedModel, LoadedModel
from bsjax.checks import argument, naming, shown
from bsjax.errors import ProfileError
from bsjax.masks.flops import flops_per_kind
from bsjax.masks.template import Sinks
from bsjax.profiles.evidence import Evidence
from bsjax.profiles.profile import Profile, installed_versions
from bsjax.profiling import selection
from bsjax.profiling.end_to_end import check_end_to_end
from bsjax.profiling.evaluation import Evaluator
from bsjax.profiling.groups import SPARSE_CATEGORIES
from bsjax.profiling.measurements import Measurements, measure
from bsjax.profiling.ordered_samples import Messages, OrderedSamples, check_images
from bsjax.profiling.refinement import Refinement, refine_with
from bsjax.profiling.settings import Divergence, Reduction, Settings, Threshold
from bsjax.profiling.state import State, conditions_of
from bsjax.progress import Progress, reporting
from bsjax.runtime.programs import check_model, check_one_device
from bsjax.samples import Samples


def profile(
    model: LoadedModel,
    samples: Sequence[Messages] | Samples,
    *,
    threshold: float = Threshold.value,
    criterion: str = Settings.criterion,
    quantile: float = Settings.quantile,
    target_reduction: float | None = None,
    refine: bool = Settings.refine,
    max_kl: float | None = None,
    max_evaluations: int = Settings.max_evaluations,
    sinks: Sinks | None = None,
    held_out: float = Settings.held_out,
    answer_tokens: int = Settings.answer_tokens,
    seed: int = Settings.seed,
    source: str = "",
    resume: str | PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    backend: str = "auto",
) -> Profile:
    """Chooses a category for every head of a model from data.

    As in BlindSight, the dense model runs once over each sample. The exact outputs of all
    categories give, for every head, the attention mass of each key group and the relative error of
    each category over image queries. A head gets the category with the fewest FLOPs whose error is
    within the threshold for the given share of the samples. Optionally, the choice is then refined
    end to end. It is checked on held-out samples. The order of the samples does not matter.

    Args:
      model: from `bsjax.load`.
      samples: conversations (Hugging Face chat messages), or what `bsjax.read_samples` returns.
        Use prompts like those that the model will see, with several images each. Samples with one
        image count for FLOPs and for the check, but not for the quantile. Duplicates are dropped.
      threshold: largest relative error of a head's output (from 0; errors above 1 exist), or
        largest attention mass dropped (0 to 1).
      criterion: what the threshold bounds: `output_error` (||o_c - o|| / ||o||) or `mass`.
      quantile: share of the samples with several images that must be within the threshold.
      target_reduction: in place of `threshold`, the smallest share of attention FLOPs to save, over
        all layers, heads and samples. The smallest threshold that saves it is found.
      refine: correct the choice by its measured effect on the model's answers: at
        `target_reduction`, within `max_kl`, or, if neither is given, at the reduction that
        `threshold` reaches. Takes many prefills per sample; see `bsjax.profiling.refine`.
      max_kl: with `refine`, save as much as possible while KL(dense || sparse) of next-token
        distributions is at most this, in nats.
      max_evaluations: with `refine`, the largest number of arrays of categories to compare. Each
        takes one prefill of every sample.
      sinks: which tokens of an image are sinks; None finds them in data, in one more pass.
      held_out: share of the samples that are held out for the check, in [0, 1). With 0 nothing is
        checked, and the evidence has no `end_to_end`.
      answer_tokens: largest number of tokens of the dense model's answer along which distributions
        are compared.
      seed: seed of the draw of held-out samples.
      source: where the samples come from, in words, for the file. If empty, the description given
        by `bsjax.read_samples` is used.
      resume: a state file that keeps everything measured. A run that was interrupted, or one with
        other thresholds, budgets or samples, reuses what it can. The file is kept when the run is
        complete.
      progress: None shows a progress bar if stderr is a terminal, False shows nothing; or a
        function called as `progress(stage, done, total)`.
      backend: backend of the attention, see `sparse_attention`.

    Returns:
      A profile with its evidence.

    Raises:
      ProfileError: an argument is out of range, a sample has no image, no sample has several, a
        reduction cannot be reached, or the state file was made with another model, dtype, backend
        or other versions.
      BsjaxError: as for `generate`, if a sample is not a valid prompt or does not fit.
    """
    settings = Settings.of(
        threshold=threshold,
        target_reduction=target_reduction,
        max_kl=max_kl,
        criterion=criterion,
        quantile=quantile,
        refine=refine,
        max_evaluations=max_evaluations,
        answer_tokens=answer_tokens,
        held_out=held_out,
        seed=seed,
    )
    return profile_with(
        settings,
        model,
        samples,
        sinks=sinks,
        source=source,
        resume=resume,
        progress=progress,
        backend=backend,
    )


def profile_with(
    settings: Settings,
    model: LoadedModel,
    samples: Sequence[Messages] | Samples,
    *,
    sinks: Sinks | None = None,
    source: str = "",
    resume: str | PathLike[str] | None = None,
    progress: Progress | bool | None = None,
    backend: str = "auto",
) -> Profile:
    """Like `profile`, with all settings in one object, `rounds` and `margin` included."""
    check_model(model, ProfileError)
    run = checked_run(
        settings, model, samples, sinks=sinks, source=source, resume=resume, backend=backend
    )
    return profile_checked(model, run, progress)


class Run(NamedTuple):
    """A run that has been checked.

    Attributes:
      settings: how categories are chosen and checked.
      chosen_with: the samples to choose with.
      held_out: the samples to check the choice on.
      fingerprint: fingerprint of all samples together.
      sinks: which tokens of an image are sinks; None finds them in data.
      source: where the samples come from, in words.
      backend: attention backend, already resolved.
      state: keeps what is measured.
    """

    settings: Settings
    chosen_with: OrderedSamples
    held_out: OrderedSamples
    fingerprint: str
    sinks: Sinks | None
    source: str
    backend: str
    state: State


def checked_run(
    settings: Settings,
    model: DescribedModel,
    samples: Sequence[Messages] | Samples,
    *,
    sinks: Sinks | None = None,
    source: str = "",
    resume: str | PathLike[str] | None = None,
    backend: str = "auto",
) -> Run:
    """All of `profile_with` that needs no weights.

    Every sample is checked and its images decoded, rather than refused after hours of measuring.

    Raises:
      BsjaxError: as for `profile`.
    """
    check_one_device(model, ProfileError)
    if sinks is not None and not isinstance(sinks, Sinks):
        raise ProfileError(f"sinks must be bsjax.Sinks or None, got {shown(sinks)}.")
    if not isinstance(source, str):
        raise ProfileError(f"source must be text, got {shown(source)}.")
    if isinstance(samples, Samples):
        source = source or samples.description
    backend = resolve_backend(backend)
    ordered = OrderedSamples.of(samples)
    chosen_with, held_out = ordered.split(settings.held_out, settings.seed)
    check_images(chosen_with, several=True)
    check_images(held_out, several=False)
    options = model.options()
    for messages, place in zip(ordered.messages, ordered.places, strict=True):
        with naming(place):
            model.check(messages, options, decode=True)
    state = State(resume, conditions_of(model, backend))
    return Run(settings, chosen_with, held_out, ordered.fingerprint, sinks, source, backend, state)


def profile_checked(
    model: LoadedModel, run: Run, progress: Progress | bool | None = None
) -> Profile:
    """The profile of a run. The errors are those of `profile`."""
    settings, chosen_with, held_out, fingerprint, sinks, source, backend, state = run
    with reporting(progress) as report:
        measurements = measure(
            model, chosen_with, sinks=sinks, backend=backend, progress=report, state=state
        )
        choice = _choose(settings, model, chosen_with, measurements, backend, report, state)
        chosen = Profile(
            family=model.family.name,
            categories=choice.categories,
            sinks=measurements.sinks,
            fingerprint=model.fingerprint,
            source=source,
            versions=installed_versions() | {"dtype": str(model.dtype), "backend": backend},
        )
        end_to_end = None
        if held_out:
            end_to_end = check_end_to_end(
                model,
                chosen,
                held_out,
                answer_tokens=settings.answer_tokens,
                backend=backend,
                progress=report,
                state=state,
            ) | {"answer_tokens": settings.answer_tokens, "split_seed": settings.seed}
    evidence = Evidence(
        criterion=settings.criterion,
        thresholds=choice.thresholds,
        sample_count=len(chosen_with.messages),
        held_out_count=len(held_out.messages),
        sample_fingerprint=fingerprint,
        statistics=measurements.statistics(settings.quantile) | _damage_of(choice.refinement),
        attention_flops=measurements.attention_flops(choice.categories),
        attention_flops_per_kind=flops_per_kind(
            choice.categories,
            measurements.flops,
            model.family.visibilities(model.config),
            model.family.layer_kinds(model.config),
        ),
        sink_discovery=measurements.sink_discovery,
        refinement=None if choice.refinement is None else choice.refinement.numbers,
        end_to_end=end_to_end,
    )
    return dataclasses.replace(chosen, evidence=evidence)


class _Choice(NamedTuple):
    categories: Int8[np.ndarray, "layers heads"]
    thresholds: dict[str, float]
    """The numbers that the one-shot rule was applied with, by name."""
    refinement: Refinement | None


def _choose(
    settings: Settings,
    model: LoadedModel,
    samples: OrderedSamples,
    measurements: Measurements,
    backend: str,
    report: Progress,
    state: State,
) -> _Choice:
    """Categories by the one-shot rule, refined if the settings ask for it."""
    thresholds = {"quantile": settings.quantile}
    if not settings.refine:
        assert not isinstance(settings.budget, Divergence)
        damage = measurements.damage(settings.criterion, settings.quantile)
        categories, threshold = selection.one_shot(damage, measurements.flops, settings.budget)
        if isinstance(settings.budget, Reduction):
            thresholds["target_reduction"] = settings.budget.share
        return _Choice(categories, thresholds | {"threshold": threshold}, None)
    if isinstance(settings.budget, Threshold):
        thresholds["threshold"] = settings.budget.value
        settings = dataclasses.replace(settings, budget=_reduction_at(settings, measurements))
    evaluator = Evaluator(
        model,
        samples,
        answer_tokens=settings.answer_tokens,
        sinks=measurements.sinks,
        backend=backend,
        state=state,
        progress=report,
    )
    refinement = refine_with(settings, measurements, evaluator, report)
    return _Choice(refinement.categories, thresholds, refinement)


def _reduction_at(settings: Settings, measurements: Measurements) -> Reduction:
    """The reduction that the one-shot rule reaches at the threshold of the settings.

    Raises:
      ProfileError: it is 0.
    """
    assert isinstance(settings.budget, Threshold)
    damage = measurements.damage(settings.criterion, settings.quantile)
    categories, threshold = selection.one_shot(damage, measurements.flops, settings.budget)
    reduction = measurements.reduction(categories)
    if reduction == 0:
        raise ProfileError(
            f"At a threshold of {threshold:g} no head saves anything, so there is nothing to "
            f"refine. Raise {argument('threshold')}, or give {argument('target_reduction')} or "
            f"{argument('max_kl')}."
        )
    return Reduction(reduction)


def _damage_of(refinement: Refinement | None) -> dict[str, np.ndarray]:
    """The statistics that refinement adds, by name."""
    if refinement is None:
        return {}
    return {
        f"damage_{category.name}": refinement.damage.kl[..., index]
        for index, category in enumerate(SPARSE_CATEGORIES)
    }
