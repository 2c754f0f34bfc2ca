"""Pictures of masks: what one head sees, in prompt order and in packed order, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from bsjax.errors import MaskError
from bsjax.masks.categories import HeadCategory
from bsjax.masks.query_rows import density
from bsjax.masks.template import Template
from bsjax.masks.visibility import TokenInfo, Visibility, visible
from bsjax.unfinished import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_PIXELS = 720
_DPI = 130
_COLORS = {
    "not visible": "#f4f4f2",
    "text": "#4c6a92",
    "sink": "#d1495b",
    "own image": "#edae49",
    "other image": "#66a182",
}


def plot_mask(
    template: Template, category: HeadCategory, visibility: Visibility, path: str | Path | None
) -> "Figure":
    """Draws what the queries of a prompt see in a head. Long prompts are sampled evenly.

    Args:
      template: the prompt.
      category: the head's category.
      visibility: what the model itself lets a query see.
      path: where to write the picture; the suffix decides the format (PNG, PDF, SVG). None writes
        nothing.

    Raises:
      MaskError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MaskError(
            "Drawing a mask needs matplotlib: pip install matplotlib (or bsjax[demo])."
        ) from error
    figure = Figure(figsize=(12.5, 7.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    orders = (np.arange(template.tokens, dtype=np.int32), template.packed_order)
    names = ("prompt order", "packed order")
    for axes, order, name in zip((left, right), orders, names, strict=True):
        _draw(axes, template, category, visibility, order)
        _mark_images(axes, template, order)
        axes.set_title(name)
        axes.set_xlabel("key")
        axes.set_ylabel("query")
    figure.suptitle(
        f"{category.name}: {template.tokens} tokens, {template.num_images} images, "
        f"{density(template, category, visibility):.1%} of the pairs a dense head sees"
    )
    handles = [_patch(color) for color in _COLORS.values()]
    figure.legend(
        handles, list(_COLORS), loc="outside lower center", ncols=len(_COLORS), frameon=False
    )
    if path is not None:
        try:
            write_figure(figure, Path(path), _DPI)
        except (OSError, ValueError) as error:
            raise MaskError(
                f"The picture of the mask cannot be written to {path}: {error}"
            ) from error
    return figure


def _draw(
    axes: "Axes",
    template: Template,
    category: HeadCategory,
    visibility: Visibility,
    order: Int[np.ndarray, "tokens"],
) -> None:
    """Colours every sampled (query, key) pair by the group of the key."""
    from matplotlib.colors import ListedColormap

    tokens = order.size
    rows = (
        order[np.linspace(0, tokens - 1, min(tokens, _PIXELS)).round().astype(int)]
        if tokens
        else order
    )
    query = TokenInfo(*(part[rows, None] for part in template.info))
    key = TokenInfo(*(part[None, rows] for part in template.info))
    seen = visible(query, key, category.groups, visibility)
    kind = np.where(
        key.image < 0, 1, np.where(key.sink, 2, np.where(key.image == query.image, 3, 4))
    )
    axes.imshow(
        np.where(seen, kind, 0),
        cmap=ListedColormap(list(_COLORS.values())),
        vmin=0,
        vmax=len(_COLORS) - 1,
        extent=(0, max(tokens, 1), max(tokens, 1), 0),
        interpolation="nearest",
    )


def _mark_images(axes: "Axes", template: Template, order: Int[np.ndarray, "tokens"]) -> None:
    """Draws lines around the rows of each image, and its number where there is room."""
    image = template.image[order]
    sink = template.sink[order]
    starts = np.flatnonzero(np.diff(image, prepend=-2) != 0)
    ends = np.append(starts, image.size)[1:]
    few = template.num_images <= 40
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if image[start] < 0 or (sink[start:end].all() and end - start < 3):
            continue
        if few:
            for border in (start, end):
                axes.axhline(border, color="#333333", linewidth=0.3)
                axes.axvline(border, color="#333333", linewidth=0.3)
        if end - start > image.size / 45:
            middle = (start + end) / 2
            axes.text(image.size * 1.005, middle, str(image[start]), va="center", fontsize=7)


def _patch(color: str) -> "Patch":
    from matplotlib.patches import Patch

    return Patch(facecolor=color, edgecolor="#333333", linewidth=0.4)
