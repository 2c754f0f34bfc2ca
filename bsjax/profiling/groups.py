"""Attention by key group: the exact output of every head category from one dense pass.

The five key groups are disjoint, so the output of any union of groups follows from attention over
each group alone: it is the average of the groups' outputs, weighted by the exponentials of their
log-sum-exps. This takes five attention calls, with the FLOPs of one dense call.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32

from bsjax.attention import ragged_attention
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory, KeyGroup
from bsjax.masks.schedule import Schedule, build_schedule, without_text_queries
from bsjax.masks.template import Template
from bsjax.masks.visibility import Visibility

GROUPS = tuple(KeyGroup)
"""The key groups, in the order of all array axes named `groups`."""

SPARSE_CATEGORIES = (
    HeadCategory.SINK,
    HeadCategory.INTRA_IMAGE,
    HeadCategory.INTRA_IMAGE_SINK,
)
"""The categories other than DENSE, in the order of all array axes named `categories`."""


def group_schedule(
    template: Template,
    visibility: Visibility,
    *,
    block_q: int,
    block_kv: int,
    tokens: int | None = None,
) -> Schedule:
    """A packed schedule with one table per key group; only the first table has text rows.

    Args:
      template: the prompt.
      visibility: the visibility of this kind of layer.
      block_q: query rows of a tile, at most.
      block_kv: keys of a block.
      tokens: rows to pad to; None does not pad.

    Raises:
      MaskError: as for `build_schedule`.
    """
    schedule = build_schedule(
        template,
        GROUPS,
        block_q=block_q,
        block_kv=block_kv,
        visibility=visibility,
        tokens=tokens,
    )
    return without_text_queries(schedule, range(1, len(GROUPS)))


class GroupPartials(NamedTuple):
    """Attention over each key group alone. Text rows are dense in the first group, empty in others.

    Attributes:
      out: output of each group, in the order of `GROUPS`; zeros if a row sees no key of the group.
      lse: float32 log-sum-exps of the scaled scores; -inf if a row sees no key of the group.
    """

    out: Float[Array, "groups tokens q_heads head_dim"]
    lse: Float32[Array, "groups tokens q_heads"]

    def combined(
        self, groups: KeyGroup
    ) -> tuple[Float32[Array, "tokens q_heads head_dim"], Float32[Array, "tokens q_heads"]]:
        """Output and log-sum-exp of attention over `groups`, both float32.

        `groups` must contain TEXT, as every category does; otherwise text rows would be empty.
        """
        kept = [index for index, group in enumerate(GROUPS) if group & groups]
        lse = self.lse[jnp.asarray(kept)]
        greatest = lse.max(axis=0)
        seen = ~jnp.isneginf(greatest)
        # The maximum of a row that sees nothing is -inf; subtracting it would give NaN.
        shift = jnp.where(seen, greatest, 0.0)
        weights = jnp.exp(lse - shift)
        total = jnp.where(seen, weights.sum(axis=0), 1.0)
        out = sum(
            (weight / total)[..., None] * self.out[index].astype(jnp.float32)
            for weight, index in zip(weights, kept, strict=True)
        )
        return jnp.asarray(out), jnp.where(seen, shift + jnp.log(total), -jnp.inf)


def group_partials(
    q: Float[Array, "tokens q_heads head_dim"],
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads head_dim"],
    schedule: Schedule,
    *,
    scale: float,
    backend: str,
) -> GroupPartials:
    """Attention over each key group alone.

    Args:
      q: queries, with rows in the schedule's order.
      k: keys.
      v: values.
      schedule: from `group_schedule`.
      scale: factor applied to the scores.
      backend: backend of the attention.

    Raises:
      BsjaxError: as for `ragged_attention`.
    """

    def over_table(table: Array) -> Any:
        categories = jnp.full(q.shape[1], table, jnp.int32)
        return ragged_attention(
            q, k, v, schedule, categories, scale=scale, backend=backend, return_lse=True
        )

    # A loop over the tables compiles attention once instead of five times.
    out, lse = jax.lax.map(over_table, jnp.arange(len(GROUPS)))
    # The reference backend ignores tiles and computes text rows in every table.
    repeated = (jnp.arange(len(GROUPS)) > 0)[:, None] & (schedule.queries.image < 0)
    return GroupPartials(out, jnp.where(repeated[..., None], -jnp.inf, lse))


class HeadStatistics(NamedTuple):
    """Statistics of a layer's heads over the image queries of one prompt.

    Attributes:
      mass: attention mass of each key group, averaged over image queries; sums to 1.
      error: ||o_c - o|| / ||o|| of each of `SPARSE_CATEGORIES`, Frobenius norms over image queries.
    """

    mass: Float32[Array, "q_heads groups"]
    error: Float32[Array, "q_heads categories"]


def head_statistics(
    partials: GroupPartials,
    dense: Float32[Array, "tokens q_heads head_dim"],
    dense_lse: Float32[Array, "tokens q_heads"],
    is_image: Bool[Array, "tokens"],
) -> HeadStatistics:
    """Attention mass and relative errors of every head.

    Args:
      partials: attention over each key group, of one layer.
      dense: the combined output over all groups, from `dense_output`.
      dense_lse: the log-sum-exp of the combined output.
      is_image: whether a row is an image query, neither text nor padding.
    """
    rows = is_image[:, None]
    share = jnp.exp(partials.lse - jnp.where(rows, dense_lse, 0.0))
    mass = jnp.where(rows, share, 0.0).sum(axis=1) / jnp.maximum(is_image.sum(), 1)

    def norm(values: Array) -> Array:
        return jnp.sqrt(jnp.where(rows, (values**2).sum(axis=-1), 0.0).sum(axis=0))

    size = norm(dense)
    errors = []
    for category in SPARSE_CATEGORIES:
        difference = norm(partials.combined(category.groups)[0] - dense)
        errors.append(jnp.where(difference > 0, difference / jnp.where(size > 0, size, 1.0), 0.0))
    return HeadStatistics(mass.T, jnp.stack(errors, axis=1))


def dense_output(
    partials: GroupPartials,
) -> tuple[Float32[Array, "tokens q_heads head_dim"], Float32[Array, "tokens q_heads"]]:
    """Output and log-sum-exp of dense attention."""
    return partials.combined(ALL_KEY_GROUPS)
