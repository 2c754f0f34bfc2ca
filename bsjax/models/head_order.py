"""Which heads of a layer are on the same device.

A device waits in every layer for the one whose heads take longest. Devices have equally many heads,
but which ones is free, as far as query heads stay with the key head that they share. The heads of a
profile's layers are therefore dealt: the most expensive first, each to the device that has the
least so far.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from bsjax.masks.categories import HeadCategory

COSTS = {
    HeadCategory.DENSE: 1.0,
    HeadCategory.SINK: 0.05,
    HeadCategory.INTRA_IMAGE: 0.1,
    HeadCategory.INTRA_IMAGE_SINK: 0.12,
}
"""About the share of a dense head's attention, for a long prompt of many images. It only decides
which heads are together."""


class HeadOrder(NamedTuple):
    """The order in which the heads of each layer are on the devices, first device first.

    Attributes:
      q_heads: int32 [layers, q_heads], the checkpoint's head that is at each place.
      kv_heads: int32 [layers, kv_heads], the same for key heads, before they are repeated.
    """

    q_heads: Int[np.ndarray, "layers q_heads"]
    kv_heads: Int[np.ndarray, "layers kv_heads"]


def dealt_heads(
    categories: Int[np.ndarray, "layers q_heads"], kv_heads: int, devices: int
) -> HeadOrder:
    """Deals the heads of every layer.

    Args:
      categories: the `HeadCategory` of each head.
      kv_heads: how many key heads a layer has; a multiple or a divisor of `devices`.
      devices: how many devices the heads are divided among.
    """
    layers, q_heads = categories.shape
    costs = costs_of(categories).reshape(layers, kv_heads, -1)
    group = q_heads // kv_heads
    q_order = np.empty((layers, kv_heads, group), np.int64)
    kv_order = np.tile(np.arange(kv_heads), (layers, 1))
    for layer in range(layers):
        if devices <= kv_heads:
            kv_order[layer] = _dealt(costs[layer].sum(axis=1), devices)
            q_order[layer] = kv_order[layer][:, None] * group + np.arange(group)
        else:  # Each device has some of the query heads of one key head.
            for head in range(kv_heads):
                of_group = _dealt(costs[layer, head], devices // kv_heads)
                q_order[layer, head] = head * group + of_group
    return HeadOrder(q_order.reshape(layers, q_heads).astype(np.int32), kv_order.astype(np.int32))


def costs_of(categories: Int[np.ndarray, "layers q_heads"]) -> Float[np.ndarray, "layers q_heads"]:
    """About how long attention of each head takes."""
    return np.asarray([COSTS[category] for category in HeadCategory])[categories]


def imbalance(costs: Shaped[np.ndarray, "layers q_heads"], devices: int) -> float:
    """Greatest over mean of the devices' costs, over all layers; 1 if all have the same.

    Args:
      costs: those of each head, in the order in which they are on the devices.
      devices: how many devices the heads are divided among.
    """
    of_devices = costs.reshape(costs.shape[0], devices, -1).sum(axis=2)
    mean = of_devices.mean(axis=1).sum()
    return float(of_devices.max(axis=1).sum() / mean) if mean else 1.0


def _dealt(costs: Float[np.ndarray, "items"], devices: int) -> Int[np.ndarray, "items"]:
    """The items of the first device, then those of the second, and so on."""
    room = costs.size // devices
    items: list[list[int]] = [[] for _ in range(devices)]
    totals = np.zeros(devices)
    for item in np.argsort(-costs, kind="stable").tolist():
        free = np.asarray([len(each) < room for each in items])
        device = int(np.argmin(np.where(free, totals, np.inf)))
        items[device].append(item)
        totals[device] += costs[item]
    return np.concatenate([sorted(each) for each in items])
