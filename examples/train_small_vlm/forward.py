"""A batch of prompts through bsjax's own modules.

Prompts are short, and a whole batch runs at once. Which keys a row of the shared part sees follows
from bsjax's own predicate, so sparse layers and heads see what their key groups allow: on a GPU,
bsjax's kernels compute that part, and their gradients; elsewhere the predicate is expanded to a
matrix, and attention is dense. Rows of questions are text and see everything before them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32
from transformers import PretrainedConfig

from bsjax import BlockMask, Template
from bsjax.attention import block_sizes, ragged_attention
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory
from bsjax.masks.schedule import Schedule
from bsjax.masks.visibility import CAUSAL, TokenInfo, visible
from bsjax.models.qwen2_vl.vision_plan import VisionPlan

from .batches import QUESTION_ROWS, Batch


class SharedRows(NamedTuple):
    """For bsjax's attention: the rows that the questions of each prompt share, of all prompts."""

    schedule: Schedule
    """The prompts are conversations of one schedule, which has a table for every category."""
    rows: Int32[np.ndarray | Array, "packed"]
    """The row of the batch, prompt by prompt, in each row of the schedule; out of range for
    padding."""

    @classmethod
    def of(cls, batch: Batch, config: PretrainedConfig) -> "SharedRows":
        """Those of a batch, on the host."""
        prompts, rows = batch.token_ids.shape
        shared = rows - batch.tasks.shape[1] * QUESTION_ROWS
        lengths = (batch.order[:, :shared] >= 0).sum(axis=1).tolist()
        templates = [
            Template(image[:length], sink[:length])
            for image, sink, length in zip(batch.image, batch.sink, lengths, strict=True)
        ]
        text = config.get_text_config()
        head_dim = text.hidden_size // text.num_attention_heads
        blocks = block_sizes("auto", head_dim, np.float32, sparse=True)
        mask = BlockMask(templates, list(HeadCategory), *blocks, gradients=True)
        mask = mask.padded(prompts * shared, prompts * shared)
        of_prompts = [prompt * rows + np.arange(length) for prompt, length in enumerate(lengths)]
        placed = np.full(prompts * shared, prompts * rows, np.int32)
        placed[: sum(lengths)] = np.concatenate(of_prompts)
        return cls(mask.schedule, placed[mask.order])

    def attend(self, q: Array, k: Array, v: Array, groups: Array, scale: float) -> Array:
        """The attention of these rows in arrays [rows of the batch, heads, head_dim]; 0 elsewhere.

        `groups` are the key groups that each head, or every head, keeps.
        """
        table = jnp.argmax(jnp.asarray(self.schedule.groups) == groups[:, None], axis=1)
        table = jnp.broadcast_to(table.astype(jnp.int32), q.shape[1:2])
        packed = (array.at[self.rows].get(mode="clip") for array in (q, k, v))
        out = ragged_attention(*packed, self.schedule, table, scale=scale)
        return jnp.zeros_like(q).at[self.rows].set(out, mode="drop")


def image_features(
    module: Any, batch: Batch, plans: VisionPlan
) -> Float[Array, "prompts images tokens hidden"]:
    """The features of all image tokens, padded to the number of tokens of the largest size.

    `plans` are the vision tower's plans for all sizes, stacked (`Encoder.plans`).
    """
    plan_of_image = jax.tree.map(lambda part: jnp.asarray(part)[batch.size_class], plans)
    run = partial(run_tower, module.visual)
    return jax.vmap(jax.vmap(run))(batch.pixel_values, plan_of_image)


def hidden_states(
    module: Any,
    batch: Batch,
    features: Float[Array, "prompts images tokens hidden"],
    groups: Int[Array | np.ndarray, "layers heads_or_1"],
    shared_rows: SharedRows | None = None,
) -> tuple[Float[Array, "prompts rows hidden"], tuple[Array, Array, Array]]:
    """Hidden states of all rows, and queries, keys and values of all layers.

    `groups` are the key groups that each head, or every head of a layer, keeps. With `shared_rows`,
    bsjax's attention computes the part that questions share. Queries, keys and values have the
    shape [layers, prompts, rows, heads, head_dim].
    """
    prompts, rows = batch.token_ids.shape
    shared = rows - batch.tasks.shape[1] * QUESTION_ROWS
    token_ids = jnp.asarray(batch.token_ids).reshape(-1)
    embeddings = module.language_model.embed(token_ids).reshape(prompts, rows, -1)
    image_rows = jnp.asarray(batch.image_rows).reshape(prompts, -1)
    embeddings = embeddings.at[jnp.arange(prompts)[:, None], image_rows].set(
        features.reshape(*image_rows.shape, -1), mode="drop"
    )
    one_conversation = jnp.zeros_like(batch.image)
    info = TokenInfo(*map(jnp.asarray, (batch.order, batch.image, batch.sink, one_conversation)))

    def attend(q: Array, k: Array, v: Array, groups: Array) -> tuple[Array, None]:
        scale = module.language_model.scale

        def before_questions(q: Array, k: Array, v: Array, info: TokenInfo) -> Array:
            seen = _seen(TokenInfo(*(part[:shared] for part in info)), groups)
            return _masked_attention(q[:shared], k[:shared], v[:shared], seen, scale)

        by_prompt = [array.reshape(prompts, rows, *array.shape[1:]) for array in (q, k, v)]
        if shared_rows is None:
            before = jax.vmap(before_questions)(*by_prompt, info)
        else:
            out = shared_rows.attend(q, k, v, groups, scale)
            before = out.reshape(by_prompt[0].shape)[:, :shared]
        asked = jax.vmap(partial(_question_attention, scale=scale, shared=shared))(
            *by_prompt, info.position
        )
        return jnp.concatenate([before, asked], axis=1).reshape(q.shape), (q, k, v)

    # All prompts run as one sequence of rows, so that the gradient of each matrix is one product.
    position_ids = jnp.moveaxis(jnp.asarray(batch.position_ids), 0, 1).reshape(3, -1)
    embeddings = embeddings.reshape(prompts * rows, -1)
    hidden, kept = module.language_model.run_layers(embeddings, position_ids, (attend,), groups)
    q, k, v = (array.reshape(-1, prompts, rows, *array.shape[2:]) for array in kept)
    return hidden.reshape(prompts, rows, -1), (q, k, v)


def run_tower(
    tower: Any, pixel_values: Float[Array, "patches values"], plan: VisionPlan
) -> Float[Array, "tokens hidden"]:
    """The features of the tokens of one padded image."""

    def attend_within(segment: Array) -> Any:
        same = (segment[:, None] == segment[None, :])[None]
        return lambda q, k, v: _masked_attention(q, k, v, same, q.shape[-1] ** -0.5)

    assert plan.window_schedule is not None
    attends = tuple(
        attend_within(schedule.queries.image) for schedule in (plan.schedule, plan.window_schedule)
    )
    return tower.run_blocks(pixel_values, plan, attends)


def _seen(info: TokenInfo, groups: Int[Array, "heads_or_1"]) -> Bool[Array, "heads_or_1 rows rows"]:
    """For the rows that all questions share: which of these rows each of them sees."""
    allowed = visible(
        TokenInfo(*(part[None, :, None] for part in info)),
        TokenInfo(*(part[None, None, :] for part in info)),
        groups[:, None, None],
        CAUSAL,
    )
    # Padding rows see themselves, so that every row sees something. This must not be extended to
    # other rows: in SINK heads, image tokens do not see themselves.
    padding = info.position < 0
    return (allowed & ~padding) | (jnp.eye(info.position.size, dtype=bool) & padding)


def _question_attention(
    q: Array, k: Array, v: Array, order: Array, *, scale: float, shared: int
) -> Array:
    """Attention of a prompt's questions: each sees the shared rows and itself, but no other one."""
    _, heads, channels = q.shape

    def of_questions(array: Array) -> Array:
        return array[shared:].reshape(-1, QUESTION_ROWS, *array.shape[1:])

    order_asked = of_questions(order)
    asked_q = of_questions(q).reshape(-1, QUESTION_ROWS, k.shape[1], heads // k.shape[1], channels)
    # Rows after the end of an answer are not keys.
    own_seen = (order_asked[:, None, :] <= order_asked[:, :, None]) & (order_asked >= 0)[:, None]
    scores = jnp.concatenate(
        [
            jnp.where(
                order[:shared] >= 0, jnp.einsum("ntkgd,ckd->nkgtc", asked_q, k[:shared]), -1e30
            ),
            jnp.where(
                own_seen[:, None, None],
                jnp.einsum("ntkgd,nckd->nkgtc", asked_q, of_questions(k)),
                -1e30,
            ),
        ],
        axis=-1,
    )
    weights = jax.nn.softmax(scores * scale, axis=-1)
    asked = jnp.einsum("nkgtc,ckd->ntkgd", weights[..., :shared], v[:shared])
    asked += jnp.einsum("nkgtc,nckd->ntkgd", weights[..., shared:], of_questions(v))
    return asked.reshape(-1, heads, channels)


def _masked_attention(
    q: Array, k: Array, v: Array, seen: Bool[Array, "heads_or_1 rows rows"], scale: float
) -> Array:
    """Softmax attention with the whole score matrix."""
    rows, heads, channels = q.shape
    grouped = q.reshape(rows, k.shape[1], -1, channels)
    scores = jnp.einsum("qkgd,ckd->kgqc", grouped, k) * scale
    if len(seen) > 1:
        seen = seen.reshape(scores.shape)
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    return jnp.einsum("kgqc,ckd->qkgd", weights, v).reshape(rows, heads, channels)


def logits_at(
    module: Any, hidden: Float[Array, "prompts rows hidden"], rows: Int[Array, "prompts *chosen"]
) -> Float[Array, "prompts *chosen vocabulary"]:
    """Logits at the given rows of each prompt."""
    flat = rows.reshape(rows.shape[0], -1, 1)
    return module.logits(jnp.take_along_axis(hidden, flat, axis=1).reshape(*rows.shape, -1))


def groups_of_layers(
    config: PretrainedConfig, sparse_layers: Sequence[int]
) -> Int[np.ndarray, "layers 1"]:
    """Key groups of all layers: INTRA_IMAGE_SINK for `sparse_layers`, DENSE for the others.

    Raises:
      ValueError: the model does not have one of the sparse layers.
    """
    layers = config.get_text_config().num_hidden_layers
    for layer in sparse_layers:
        if not 0 <= layer < layers:
            raise ValueError(
                f"Layer {layer} does not exist: the model has layers 0 to {layers - 1}."
            )
    sparse = np.isin(np.arange(layers), sparse_layers)[:, None]
    kept = HeadCategory.INTRA_IMAGE_SINK.groups
    return np.where(sparse, kept.value, ALL_KEY_GROUPS.value).astype(np.int32)
