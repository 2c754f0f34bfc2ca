"""The launches of one layer for a prompt in chunks, as `bsjax.generate` runs it."""

from collections.abc import Iterator

import numpy as np

from benchmarks.published_models import PUBLISHED_MODELS
from benchmarks.workloads import HeadMask, Workload
from bsjax.gpu.configurations import compiling_for
from bsjax.masks.schedule import Schedule
from bsjax.models import FAMILIES, Architecture
from bsjax.runtime import sizes
from bsjax.runtime.chunks import CacheLayout, Chunks, PlacedPrompt
from bsjax.runtime.inputs import ModelInputs
from tools.compiled_kernels import target_name
from tools.speed.kernels import compiled_for, kernel
from tools.speed.launches import launch_of
from tools.speed.prediction import NOTHING, Prediction, predict


def predict_chunks(workload: Workload, mask: HeadMask, package: str, gpu: str) -> Prediction:
    """Predicts the launches of all chunks of a prompt.

    Left out are the sums that combine the parts of split tiles.

    Args:
      workload: heads and prompt.
      mask: a category for every query head.
      package: "pallas" or "triton".
      gpu: one that `rates.rates_of` knows.

    Raises:
      KeyError: kernels.json has no kernel for the head dimension or the GPU.
    """
    shape = workload.shape
    group = shape.q_heads // shape.kv_heads
    chosen = kernel(package, gpu, shape.head_dim, sparse=not mask.is_dense)
    schedules = list(schedules_of(workload, mask, package, gpu))
    # Only their sum counts.
    pairs = workload.visible_pairs(mask) / len(schedules)
    total = NOTHING
    for schedule in schedules:
        launch = launch_of(schedule, mask.categories, shape.kv_heads)
        total += predict(launch, pairs, chosen, gpu, group)
    return total


def schedules_of(workload: Workload, mask: HeadMask, package: str, gpu: str) -> Iterator[Schedule]:
    """The schedule of each chunk; arguments as in `predict_chunks`."""
    shape, template = workload.shape, workload.template
    chosen = kernel(package, gpu, shape.head_dim, sparse=not mask.is_dense).chosen
    # Nothing of the model matters here but its visibility.
    config = PUBLISHED_MODELS["Qwen2.5-VL-7B"]()
    dtype = np.dtype(shape.dtype)
    zeros = np.zeros((3, template.tokens), np.int32)
    inputs = ModelInputs(
        architecture=Architecture(FAMILIES[config.model_type], config, dtype),
        template=template,
        next_position=template.tokens,
        token_ids=zeros[0],
        position_ids=zeros,
        head_category=np.asarray([mask.categories], np.int32),
        visibilities=(shape.visibility,),
        last_kind=0,
        blocks=(chosen.block_q, chosen.block_kv),
        images=(),
        start=0,
        how_to_shorten="",
    )
    rows = sizes.cache_rows(inputs.tokens)
    with compiling_for(target_name(compiled_for(gpu))):
        chunks = Chunks(
            [PlacedPrompt(inputs)],
            CacheLayout(rows),
            sizes.sizes_in_use().chunks_for(rows),
            shape.q_heads // shape.kv_heads,
            feature_rows=template.tokens,
            most_parts=sizes.most_parts(package, dtype),
            all_outputs=True,
        )
        for chunk in chunks:
            yield chunk.arguments.cached_rows[0].schedule
