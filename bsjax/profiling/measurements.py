"""The pass over the samples, its measurements, and the categories that follow from them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int8, Int64

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.checks import naming
from bsjax.errors import ProfileError
from bsjax.masks.flops import dense_flops, total_flops
from bsjax.masks.template import Sinks
from bsjax.profiles.evidence import AttentionFlops, SinkDiscovery
from bsjax.profiling import computations, selection
from bsjax.profiling.groups import GROUPS, SPARSE_CATEGORIES, group_schedule
from bsjax.profiling.offsets import by_offset, discover, pairs_by_offset
from bsjax.profiling.ordered_samples import (
    Messages,
    OrderedSamples,
    check_images,
    no_several_images,
)
from bsjax.profiling.prompt_inputs import (
    PackedPrompt,
    PromptEmbedding,
    Shape,
    category_schedule,
)
from bsjax.profiling.settings import Reduction, Settings, Threshold
from bsjax.profiling.state import NO_STATE, State
from bsjax.progress import Progress, no_progress
from bsjax.runtime.memory import bytes_available, check_memory
from bsjax.runtime.programs import Stage, check_model, check_one_device, programs_of
from bsjax.samples import Samples


@dataclass(frozen=True, eq=False)
class Measurements:
    """Statistics of every head, for every sample, in the order of the samples' fingerprints.

    Quantiles and means are over the samples with at least two images: with a single image there are
    no other images to leave out, so INTRA_IMAGE would have no error in any head. FLOPs are those of
    all samples.

    Attributes:
      sinks: which tokens of an image were sinks.
      mass: attention mass of each key group (in `KeyGroup` order), averaged over a sample's image
        queries.
      error: ||o_c - o|| / ||o|| over a sample's image queries, for SINK, INTRA_IMAGE and
        INTRA_IMAGE_SINK.
      flops: attention FLOPs of one head of each layer, by `HeadCategory`, summed over samples.
      fingerprints: fingerprints of the samples.
      images: number of images of each sample.
      sink_discovery: how sinks were found; None if they were given.
    """

    sinks: Sinks
    mass: Float32[np.ndarray, "samples layers heads groups"]
    error: Float32[np.ndarray, "samples layers heads categories"]
    flops: Int64[np.ndarray, "layers all_categories"]
    fingerprints: tuple[str, ...]
    images: Int64[np.ndarray, "samples"]
    sink_discovery: SinkDiscovery | None = None

    @property
    def several_images(self) -> Bool[np.ndarray, "samples"]:
        """Which samples have at least two images, and therefore count for statistics.

        Raises:
          ProfileError: no sample has two images.
        """
        several = self.images >= 2
        if not several.any():
            raise no_several_images()
        return several

    def damage(
        self, criterion: str = Settings.criterion, quantile: float = Settings.quantile
    ) -> Float64[np.ndarray, "layers heads categories"]:
        """The quantity that a criterion bounds, as a quantile over the samples with several images.

        Args:
          criterion: `output_error`, or `mass`: the attention mass that a category drops.
          quantile: the share of the samples that have at most the returned damage.

        Raises:
          ProfileError: the criterion is unknown, the quantile is out of range, or no sample has two
            images.
        """
        settings = Settings(criterion=criterion, quantile=quantile)
        several = self.several_images
        if settings.criterion == "mass":
            return selection.in_quantile(selection.missing_mass(self.mass[several]), quantile)
        return selection.in_quantile(self.error[several].astype(np.float64), quantile)

    def threshold_for(
        self,
        target_reduction: float,
        *,
        criterion: str = Settings.criterion,
        quantile: float = Settings.quantile,
    ) -> float:
        """The smallest threshold at which the one-shot rule saves at least this share of FLOPs.

        Raises:
          ProfileError: no threshold does; the message says how much can be saved.
        """
        budget = Reduction(target_reduction)
        return selection.threshold_for(self.damage(criterion, quantile), self.flops, budget)

    def one_shot(
        self,
        threshold: float | None = None,
        *,
        target_reduction: float | None = None,
        criterion: str = Settings.criterion,
        quantile: float = Settings.quantile,
    ) -> Int8[np.ndarray, "layers heads"]:
        """Categories by the one-shot rule, at a threshold or at the one that reaches a reduction.

        Raises:
          ProfileError: not exactly one of the two is given, a value is out of range, or no
            threshold reaches the reduction.
        """
        if target_reduction is None and threshold is not None:
            budget = Threshold(threshold)
        elif target_reduction is not None and threshold is None:
            budget = Reduction(target_reduction)
        else:
            raise ProfileError("Give either a threshold or a target_reduction.")
        Settings(budget, criterion)
        damage = self.damage(criterion, quantile)
        return selection.one_shot(damage, self.flops, budget)[0]

    def reduction(self, categories: Int8[np.ndarray, "layers heads"]) -> float:
        """The share of dense attention FLOPs, over the samples, that the categories save."""
        return selection.reduction_of(categories, self.flops)

    def attention_flops(self, categories: Int8[np.ndarray, "layers heads"]) -> AttentionFlops:
        """Attention FLOPs over the samples, all layers and heads."""
        return AttentionFlops(
            dense=dense_flops(categories, self.flops),
            sparse=total_flops(categories, self.flops),
        )

    def statistics(self, quantile: float = Settings.quantile) -> dict[str, np.ndarray]:
        """Statistics of every head, by name: float64 [layers, heads] each, as in a profile."""
        mean = self.mass[self.several_images].astype(np.float64).mean(axis=0)
        error = self.damage("output_error", quantile)
        return {f"mass_{group.name}": mean[..., index] for index, group in enumerate(GROUPS)} | {
            f"error_{category.name}": error[..., index]
            for index, category in enumerate(SPARSE_CATEGORIES)
        }


def measure(
    model: LoadedModel,
    samples: Sequence[Messages] | Samples | OrderedSamples,
    *,
    sinks: Sinks | None = None,
    backend: str = "auto",
    progress: Progress = no_progress,
    state: State = NO_STATE,
) -> Measurements:
    """Runs the dense model over samples and measures every head of every layer.

    Args:
      model: from `bsjax.load`.
      samples: conversations, each with at least one image, and at least one with several.
      sinks: which tokens of an image are sinks; None finds them in an additional pass.
      backend: backend of the attention, see `sparse_attention`.
      progress: called after every sample, as `progress(stage, done, total)`.
      state: keeps and recalls what was measured.

    Raises:
      ProfileError: there are no samples, a sample has no image, or no sample has two.
      BsjaxError: as for `generate`, if a prompt is not valid or does not fit.
    """
    check_model(model, ProfileError)
    check_one_device(model, ProfileError)
    samples = samples if isinstance(samples, OrderedSamples) else OrderedSamples.of(samples)
    check_images(samples, several=True)
    backend = resolve_backend(backend)
    shape = Shape.of(model.family, model.config)
    discovery = None
    if sinks is None:
        sinks, discovery = _discover(model, samples, shape, backend, progress, state)

    def measured(messages: Messages) -> dict[str, np.ndarray]:
        pass_ = MeasuringPass(
            model, messages, shape, sinks, backend, computations.measure_heads, group_schedule
        )
        mass, error = pass_.run()
        return {
            "mass": np.asarray(mass),
            "error": np.asarray(error),
            "flops": shape.category_flops(pass_.template),
            "images": np.asarray(pass_.template.num_images, np.int64),
        }

    records = _of_all(samples, f"heads {sinks}", measured, "measuring heads", progress, state)
    return Measurements(
        sinks=sinks,
        mass=np.stack([record["mass"] for record in records]),
        error=np.stack([record["error"] for record in records]),
        flops=np.sum([record["flops"] for record in records], axis=0),
        fingerprints=samples.fingerprints,
        images=np.stack([record["images"] for record in records]),
        sink_discovery=discovery,
    )


def _discover(
    model: LoadedModel,
    samples: OrderedSamples,
    shape: Shape,
    backend: str,
    progress: Progress,
    state: State,
) -> tuple[Sinks, SinkDiscovery]:
    """Finds sinks in a separate pass, because the key groups of the main pass depend on them."""

    def measured(messages: Messages) -> dict[str, np.ndarray]:
        pass_ = MeasuringPass(
            model,
            messages,
            shape,
            Sinks(),
            backend,
            computations.measure_offsets,
            category_schedule,
        )
        template = pass_.template
        of_rows = np.asarray(pass_.run(), np.float64).sum(axis=0)
        of_tokens = np.zeros(template.tokens)
        of_tokens[template.packed_order] = of_rows[: template.tokens]
        pairs = sum(
            shape.heads * pairs_by_offset(template, shape.visibilities[kind]).astype(np.float64)
            for kind in shape.kinds
        )
        return {"mass": by_offset(template, of_tokens), "pairs": np.asarray(pairs)}

    records = _of_all(samples, "offsets", measured, "looking for sinks", progress, state)
    return discover([record["mass"] for record in records], [r["pairs"] for r in records])


class MeasuringPass:
    """One pass of a sample through the layers."""

    def __init__(
        self,
        model: LoadedModel,
        messages: Messages,
        shape: Shape,
        sinks: Sinks,
        backend: str,
        step: Callable[..., Any],
        build: Callable[..., Any],
    ) -> None:
        programs = programs_of(model)
        prompt = model.prompt(messages)
        packed = PackedPrompt.of(model.architecture, prompt, sinks, backend)
        self.template = packed.template
        self._embedding = PromptEmbedding(programs, packed, backend)
        self._arguments = (
            packed.position_ids,
            packed.schedules(shape, model.dtype, backend, build),
        )
        self._program = programs.get(
            step, (self._embedding.output, *self._arguments), static=(backend,)
        )
        stages = [*self._embedding.stages, Stage("measuring", self._program)]
        check_memory(packed.inputs, stages, bytes_available())

    def run(self) -> Any:
        """Runs the pass and returns what its program returns."""
        return self._program(self._embedding.run(), *self._arguments)


def _of_all(
    samples: OrderedSamples,
    what: str,
    measured: Callable[[Messages], dict[str, np.ndarray]],
    stage: str,
    progress: Progress,
    state: State,
) -> list[dict[str, np.ndarray]]:
    """One record per sample, recalled from the state or measured."""
    records = []
    progress(stage, 0, len(samples.messages))
    for messages, digest, place in zip(*samples, strict=True):
        measure_one = naming(place)(partial(measured, messages))
        records.append(state.recall(f"{what} {digest}", measure_one))
        progress(stage, len(records), len(samples.messages))
    return records
