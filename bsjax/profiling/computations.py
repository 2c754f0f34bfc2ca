"""What profiling computes on the device: functions of a module and arrays, jitted by their callers.

Those over a prompt run the model's layers through `run_layers`, with one attention function per
kind of layer. None of them keeps an array per layer that has both a tokens axis and a heads or
channels axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from bsjax.attention import ragged_attention
from bsjax.masks.categories import HeadCategory
from bsjax.masks.schedule import Schedule
from bsjax.models.layers import LayerAttend
from bsjax.profiling.groups import HeadStatistics, dense_output, group_partials, head_statistics
from bsjax.profiling.offsets import other_image_mass


def measure_heads(
    module: Any,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: tuple[Schedule, ...],
    backend: str,
) -> HeadStatistics:
    """Statistics of every head of the dense model over one prompt, with a leading layer axis.

    Args:
      module: the model.
      embeddings: embeddings of all rows, in packed order.
      position_ids: position ids of each row.
      schedules: from `group_schedule`, one for each kind of layer.
      backend: backend of the attention.
    """

    def attend_with(schedule: Schedule) -> LayerAttend:
        def attend(q: Array, k: Array, v: Array, scanned: Any) -> tuple[Array, HeadStatistics]:
            partials = group_partials(
                q, k, v, schedule, scale=module.language_model.scale, backend=backend
            )
            dense, lse = dense_output(partials)
            is_image = jnp.asarray(schedule.queries.image) >= 0
            return dense.astype(q.dtype), head_statistics(partials, dense, lse, is_image)

        return attend

    return _run(module, embeddings, position_ids, schedules, attend_with, None)[1]


def measure_offsets(
    module: Any,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: tuple[Schedule, ...],
    backend: str,
) -> Float32[Array, "layers rows"]:
    """Attention that each row gets from image queries of other images, summed over heads.

    Args:
      module: the model.
      embeddings: embeddings of all rows, in packed order.
      position_ids: position ids of each row.
      schedules: from `category_schedule`, one for each kind of layer.
      backend: backend of the attention.
    """

    def attend_with(schedule: Schedule) -> LayerAttend:
        def attend(q: Array, k: Array, v: Array, scanned: Any) -> tuple[Array, Array]:
            scale = module.language_model.scale
            dense = jnp.full(q.shape[1], HeadCategory.DENSE, jnp.int32)
            out, lse = ragged_attention(
                q, k, v, schedule, dense, scale=scale, backend=backend, return_lse=True
            )
            return out, other_image_mass(q, k, lse, schedule, scale=scale)

        return attend

    return _run(module, embeddings, position_ids, schedules, attend_with, None)[1]


def states_at(
    module: Any,
    embeddings: Float[Array, "rows hidden"],
    position_ids: Int[Array, "axes rows"],
    schedules: tuple[Schedule, ...],
    head_category: Int[Array, "layers q_heads"],
    rows: Int[Array, "states"],
    backend: str,
) -> Float[Array, "states hidden"]:
    """Final hidden states of some rows. Categories are data, so all choices share one program.

    Args:
      module: the model.
      embeddings: embeddings of all rows, in packed order; not donated, so that they can be reused.
      position_ids: position ids of each row.
      schedules: from `category_schedule`, one for each kind of layer.
      head_category: category of every query head of every layer.
      rows: indices of the rows.
      backend: backend of the attention.
    """

    def attend_with(schedule: Schedule) -> LayerAttend:
        def attend(q: Array, k: Array, v: Array, categories: Array) -> tuple[Array, None]:
            scale = module.language_model.scale
            return ragged_attention(
                q, k, v, schedule, categories, scale=scale, backend=backend
            ), None

        return attend

    hidden, _ = _run(module, embeddings, position_ids, schedules, attend_with, head_category)
    return hidden[rows]


def divergence(
    module: Any,
    dense: Float[Array, "states hidden"],
    sparse: Float[Array, "states hidden"],
) -> tuple[Float32[Array, "states"], Bool[Array, "states"]]:
    """How far apart the next-token distributions of two models are.

    Args:
      module: the model.
      dense: final hidden states of the dense model.
      sparse: final hidden states of the sparse model.

    Returns:
      For each state, KL(dense || sparse) in nats and whether the likeliest tokens agree.
    """
    log_p = jax.nn.log_softmax(module.logits(dense))
    log_q = jax.nn.log_softmax(module.logits(sparse))
    # KL as the sum of p * (q/p - 1 - log(q/p)): no term is negative, so a small divergence is not
    # lost to cancellation.
    p, log_ratio = jnp.exp(log_p), log_q - log_p
    small = jnp.abs(log_ratio) < 0.5
    near = p * (jnp.expm1(jnp.where(small, log_ratio, 0.0)) - log_ratio)
    far = jnp.exp(log_q) - p - p * log_ratio
    kl = jnp.where(small, near, far).sum(axis=-1)
    return jnp.maximum(kl, 0), log_p.argmax(axis=-1) == log_q.argmax(axis=-1)


def _run(
    module: Any,
    embeddings: Array,
    position_ids: Array,
    schedules: tuple[Schedule, ...],
    attend_with: Callable[[Schedule], LayerAttend],
    scanned: Any,
) -> tuple[Array, Any]:
    attends = tuple(attend_with(schedule) for schedule in schedules)
    return module.language_model.run_layers(embeddings, position_ids, attends, scanned)
