"""What the pass measured, sample by sample, and the categories that follow from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int8, Int64

from bsjax.attention import resolve_backend
from bsjax.checkpoint.loading import LoadedModel
from bsjax.errors import ProfileError
from bsjax.masks.flops import total_flops
from bsjax.masks.template import Sinks
from bsjax.profiling import computations, selection
from bsjax.profiling.groups import GROUPS, SPARSE_CATEGORIES, group_schedule
from bsjax.profiling.offsets import SinkDiscovery, by_offset, discover, pairs_by_offset
from bsjax.profiling.ordered_samples import (
    Messages,
    OrderedSamples,
    check_images,
    no_several_images,
)
from bsjax.profiling.progress import Progress, no_progress
from bsjax.profiling.prompt_inputs import (
    Shape,
    category_schedule,
    kind_schedules,
    packed_inputs,
)
from bsjax.profiling.state import NO_STATE, State
from bsjax.runtime.embedding import Embedding
from bsjax.runtime.memory import Stage, bytes_available, check_memory
from bsjax.runtime.programs import programs_of
from bsjax.samples import Samples


@dataclass(frozen=True, eq=False)
class Measurements:
    """Statistics of every head, for every sample, in the order of the samples' fingerprints.

    Quantiles and means are over the samples with at least two images: with one there are no other
    images to look at, and what a category leaves out of them is 0 whatever the head does. FLOPs are
    those of all samples.

    Attributes:
      sinks: what was taken for sinks.
      mass: attention mass of each key group (in `KeyGroup` order), mean over a sample's image
        queries.
      error: ||o_c - o|| / ||o|| over a sample's image queries, for SINK, INTRA_IMAGE and
        INTRA_IMAGE_SINK.
      flops: attention FLOPs of one head of each layer, by `HeadCategory`, summed over samples.
      fingerprints: of the samples.
      images: how many images each sample has.
      sink_discovery: how sinks were found; None where they were given.
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
        """Which samples have at least two images, and count in statistics.

        Raises:
          ProfileError: none has.
        """
        several = self.images >= 2
        if not several.any():
            raise no_several_images()
        return several

    def damage(self, criterion: str = "output_error", quantile: float = 0.9) -> np.ndarray:
        """What a criterion looks at: float64 [layers, heads, 3], in the quantile over samples.

        Raises:
          ProfileError: an unknown criterion, a quantile out of range, or no sample of two images.
        """
        if selection.checked_criterion(criterion) == "mass":
            dropped = selection.missing_mass(self.mass[self.several_images])
            return selection.in_quantile(dropped, quantile)
        return selection.in_quantile(self.error[self.several_images].astype(np.float64), quantile)

    def threshold_for(
        self, target_reduction: float, *, criterion: str = "output_error", quantile: float = 0.9
    ) -> float:
        """The least threshold at which the one-shot rule saves at least this share of FLOPs.

        Raises:
          ProfileError: no threshold does; the message says what can be reached.
        """
        damage = self.damage(criterion, quantile)
        return selection.threshold_for(damage, self.flops, target_reduction)

    def one_shot(
        self,
        threshold: float | None = None,
        *,
        target_reduction: float | None = None,
        criterion: str = "output_error",
        quantile: float = 0.9,
    ) -> Int8[np.ndarray, "layers heads"]:
        """Categories by the one-shot rule, at a threshold or at the one that reaches a reduction.

        Raises:
          ProfileError: not exactly one of the two, a value out of range, or a reduction that no
            threshold reaches.
        """
        if (threshold is None) == (target_reduction is None):
            raise ProfileError("Give a threshold or a target_reduction, one of them.")
        damage = self.damage(criterion, quantile)
        if target_reduction is not None:
            least = selection.threshold_for(damage, self.flops, target_reduction)
        else:
            least = selection.checked_threshold(threshold, criterion)
        return selection.within_threshold(damage, self.flops, least)

    def reduction(self, categories: Int8[np.ndarray, "layers heads"]) -> float:
        """The share of dense attention FLOPs, over the samples, that the categories save."""
        return selection.reduction_of(categories, self.flops)

    def attention_flops(
        self, categories: Int8[np.ndarray, "layers heads"]
    ) -> dict[str, int | float]:
        """Attention FLOPs over the samples, all layers and heads: dense, sparse, reduction."""
        return {
            "dense": total_flops(np.zeros_like(categories), self.flops),
            "sparse": total_flops(categories, self.flops),
            "reduction": self.reduction(categories),
        }

    def statistics(self, quantile: float = 0.9) -> dict[str, np.ndarray]:
        """Per-head statistics as a profile's file has them, float64 [layers, heads] each."""
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
      samples: conversations, each with at least one image, and one at least with several.
      sinks: which tokens are sinks; None finds them in a pass before.
      backend: of the attention, see `sparse_attention`.
      progress: told of every sample.
      state: keeps what was measured, and recalls it.

    Raises:
      ProfileError: no samples, one without an image, or none with two images.
      BsjaxError: as `generate`, for prompts that are none or do not fit.
    """
    samples = samples if isinstance(samples, OrderedSamples) else OrderedSamples.of(samples)
    check_images(samples, several=True)
    backend = resolve_backend(backend)
    shape = Shape.of(model.family, model.config)
    found = None
    if sinks is None:
        found = _discover(model, samples, shape, backend, progress, state)
        sinks = found.sinks

    def measured(messages: Messages) -> dict[str, np.ndarray]:
        pass_ = _Pass(
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
        sink_discovery=found,
    )


def _discover(
    model: LoadedModel,
    samples: OrderedSamples,
    shape: Shape,
    backend: str,
    progress: Progress,
    state: State,
) -> SinkDiscovery:
    """Finds sinks in a pass of its own: the groups of the other pass depend on them."""

    def measured(messages: Messages) -> dict[str, np.ndarray]:
        pass_ = _Pass(
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


class _Pass:
    """One sample through the layers, once."""

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
        inputs = packed_inputs(model, prompt, sinks, backend)
        self.template = inputs.template
        self._embedding = Embedding(programs, inputs, backend)
        schedules = kind_schedules(shape, inputs, model.dtype, backend, build)
        self._arguments = (inputs.position_ids, schedules)
        self._program = programs.get(
            step, (self._embedding.output, *self._arguments), static=(backend,)
        )
        stages = [*self._embedding.stages, Stage("measuring", self._program)]
        check_memory(inputs, stages, bytes_available())

    def run(self) -> Any:
        embeddings, _ = self._embedding.run()
        return self._program(embeddings, *self._arguments)


def _of_all(
    samples: OrderedSamples,
    what: str,
    measured: Callable[[Messages], dict[str, np.ndarray]],
    stage: str,
    progress: Progress,
    state: State,
) -> list[dict[str, np.ndarray]]:
    """One record per sample, from the state where it has it."""
    records = []
    progress(stage, 0, len(samples.messages))
    for messages, digest in zip(samples.messages, samples.fingerprints, strict=True):
        records.append(state.recall(f"{what} {digest}", partial(measured, messages)))
        progress(stage, len(records), len(samples.messages))
    return records
