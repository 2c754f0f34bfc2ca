"""Sink discovery: which tokens of an image other images attend to, by their offset in the image.

Sinks must be known from the template alone, so they are offsets from an image's first token. For
every offset, this module measures the attention that one query of another image pays to one key at
that offset, averaged over all layers, heads and samples.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from bsjax.masks.categories import ALL_KEY_GROUPS
from bsjax.masks.schedule import Schedule
from bsjax.masks.template import Sinks, Template
from bsjax.masks.visibility import PADDING_POSITION, TokenInfo, Visibility, visible
from bsjax.profiles.evidence import SinkDiscovery

SINK_FACTOR = 4.0
"""An offset is a sink if it gets this many times the average attention of offsets 1, 2, ..."""

MOST_OFFSETS = 4
"""The most offsets to choose: in many heads, each of them is visible to all later images."""

LEAST_SUPPORT = 0.5
"""The fewest (query, key) pairs that an offset needs, as a share of the pairs of offset 0. Few
images are long enough to have the last offsets."""

_CHUNK_ROWS = 64
_CURVE_DIGITS = 5


def other_image_mass(
    q: Float[Array, "rows q_heads head_dim"],
    k: Float[Array, "rows kv_heads head_dim"],
    lse: Float32[Array, "rows q_heads"],
    schedule: Schedule,
    *,
    scale: float,
) -> Float32[Array, "rows"]:
    """Dense attention that each key gets from image queries of other images, summed over heads.

    The columns of the attention matrix are summed a few query rows at a time, in prompt order, with
    matrix products only: one product of queries and keys per layer, half the FLOPs of attention
    without a mask. In a layer with a window, only keys that the window can reach are read. The
    gradient of attention with respect to v would give the same sums, but it visits the schedule
    tile by tile in plain JAX, which is slow on a GPU.

    Args:
      q: queries in the schedule's order.
      k: keys in the same order.
      lse: log-sum-exp of the scores that each query sees, from `ragged_attention`.
      schedule: gives positions, images and visibility.
      scale: factor applied to the scores.
    """
    tokens, q_heads, _ = q.shape
    kv_heads = k.shape[1]
    chunk = max(1, min(_CHUNK_ROWS, tokens // (2 * q_heads)))
    spare = -tokens % chunk
    span = tokens + spare
    if schedule.visibility.window is not None:
        span = min(span, schedule.visibility.window - 1 + chunk)

    # In prompt order a row's index is its position; padding has the greatest, so it stays last.
    order = jnp.argsort(jnp.asarray(schedule.keys.position))

    def in_prompt_order(array: Any, padding: int) -> Array:
        widths = ((0, spare),) + ((0, 0),) * (array.ndim - 1)
        return jnp.pad(jnp.asarray(array)[order], widths, constant_values=padding)

    q, k, lse = (in_prompt_order(array, 0) for array in (q, k, lse))
    info = TokenInfo(
        in_prompt_order(schedule.keys.position, PADDING_POSITION),
        in_prompt_order(schedule.keys.image, -1),
        in_prompt_order(schedule.keys.sink, False),
        in_prompt_order(schedule.keys.conversation, -1),
    )

    def add_chunk(index: Array, total: Array) -> Array:
        first_key = jnp.maximum((index + 1) * chunk - span, 0)

        def rows(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, index * chunk, chunk)

        def keys(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, first_key, span)

        query = TokenInfo(*(rows(part)[:, None] for part in info))
        key = TokenInfo(*(keys(part)[None, :] for part in info))
        seen = visible(query, key, int(ALL_KEY_GROUPS), schedule.visibility)
        counted = seen & (query.image >= 0) & (key.image >= 0) & (query.image != key.image)
        scores = jnp.einsum(
            "rhgd,khd->rhgk",
            rows(q).reshape(chunk, kv_heads, -1, q.shape[-1]),
            keys(k),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        ).reshape(chunk, q_heads, span)
        weights = jnp.exp(scores * scale - rows(lse)[..., None])
        mass = jnp.where(counted[:, None], weights, 0.0).sum(axis=(0, 1))
        return jax.lax.dynamic_update_slice_in_dim(total, keys(total) + mass, first_key, axis=0)

    chunks = (tokens + spare) // chunk
    total = jnp.zeros(tokens + spare, jnp.float32)
    total = jax.lax.fori_loop(0, chunks, add_chunk, total)
    return jnp.zeros(tokens, jnp.float32).at[order].set(total[:tokens])


def pairs_by_offset(template: Template, visibility: Visibility) -> Int[np.ndarray, "offsets"]:
    """The number of visible (query, key) pairs of different images, by the key's offset."""
    if not template.num_images:
        return np.zeros(0, np.int64)
    is_image = template.image >= 0
    before = np.append(0, np.cumsum(is_image))
    positions = np.flatnonzero(is_image)
    image = template.image[positions]
    first = np.asarray(template.image_first)[image]
    end = first + np.asarray(template.image_tokens)[image]
    reach = np.full(positions.size, template.tokens)
    if visibility.window is not None:
        reach = np.minimum(reach, positions + visibility.window)
    pairs = np.maximum(before[reach] - before[end], 0)
    return np.bincount(positions - first, weights=pairs).astype(np.int64)


def by_offset(
    template: Template, mass_of_token: Float64[np.ndarray, "tokens"]
) -> Float64[np.ndarray, "offsets"]:
    """Sums the mass of image tokens by their offset; `mass_of_token` is in prompt order."""
    positions = np.flatnonzero(template.image >= 0)
    offset = positions - np.asarray(template.image_first)[template.image[positions]]
    return np.bincount(offset, weights=mass_of_token[positions])


def discover(
    mass: list[Float64[np.ndarray, "_offsets"]], pairs: list[Float64[np.ndarray, "_offsets"]]
) -> tuple[Sinks, SinkDiscovery]:
    """Chooses sinks from measurements over samples.

    The rule: consider the offsets beyond the first token that have at least `LEAST_SUPPORT` of its
    pairs. Those that get at least `SINK_FACTOR` times the average attention of offsets beyond the
    first token are sinks, at most the `MOST_OFFSETS` strongest.

    Args:
      mass: for each sample, attention by offset, summed over pairs, layers and heads.
      pairs: for each sample, the number of pairs summed, by offset.

    Returns:
      The sinks (the first token of every image and the offsets found), and how they were found.
    """
    longest = max(map(len, mass))

    def total(parts: list[np.ndarray]) -> np.ndarray:
        return np.sum([np.pad(part, (0, longest - len(part))) for part in parts], axis=0)

    all_mass, all_pairs = total(mass), total(pairs)
    curve = all_mass / np.maximum(all_pairs, 1)
    beyond = slice(1, None)
    average = all_mass[beyond].sum() / max(all_pairs[beyond].sum(), 1)
    strong = (curve >= SINK_FACTOR * average) & (curve > 0)
    strong &= all_pairs >= LEAST_SUPPORT * all_pairs[:1].max(initial=0)
    strong[:1] = False
    found = np.flatnonzero(strong)
    strongest = found[np.argsort(-curve[found], kind="stable")][:MOST_OFFSETS]
    discovery = SinkDiscovery(
        rule=f"the first token, and at most {MOST_OFFSETS} offsets that draw at least "
        f"{SINK_FACTOR:g} times the average of offsets beyond it, {average:.{_CURVE_DIGITS}g}, of "
        f"those that at least {LEAST_SUPPORT:.0%} of the (query, key) pairs have",
        mass_by_offset=tuple(float(f"{value:.{_CURVE_DIGITS}g}") for value in curve),
    )
    return Sinks(1, tuple(sorted(strongest.tolist()))), discovery
