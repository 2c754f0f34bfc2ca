"""Pictures of profiles: each head's category, where its attention goes, and its errors.

The upper half is in the model's order: the map of categories, one row per layer and one column per
head, and to its right where the attention of each layer's image queries goes. The lower half shows
all heads, sorted by how much they attend to other images, with their categories below; the share of
heads within an error, for each category; and, if sinks were found in data, attention by offset.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from bsjax.errors import ProfileError
from bsjax.masks.categories import HeadCategory, KeyGroup
from bsjax.profiles.evidence import Evidence
from bsjax.profiles.format import LETTERS
from bsjax.profiles.profile import Profile
from bsjax.unfinished import write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure, SubFigure

CATEGORY_COLORS = {
    HeadCategory.DENSE: "#2f4b6e",
    HeadCategory.SINK: "#c8374a",
    HeadCategory.INTRA_IMAGE: "#f3cf6b",
    HeadCategory.INTRA_IMAGE_SINK: "#ec8f3c",
}
_ON_DARK = (HeadCategory.DENSE, HeadCategory.SINK)

# From the keys that every category sees to those that only dense attention sees.
_GROUPS = {
    KeyGroup.TEXT: ("text", "#4c6a92"),
    KeyGroup.OWN: ("own image", "#edae49"),
    KeyGroup.OWN_SINK: ("own image's sinks", "#e0793f"),
    KeyGroup.OTHER_SINK: ("other images' sinks", "#d1495b"),
    KeyGroup.OTHER: ("other images", "#66a182"),
}
# Some colours of the map are too light for lines on white.
_LINE_COLORS = CATEGORY_COLORS | {HeadCategory.INTRA_IMAGE: "#c79a1e"}

_MOST_MAP_INCHES = (11.0, 12.0)
_LEAST_MAP_INCHES = (4.4, 3.2)
_CELL_INCHES = 0.26
_LETTER_CELL_INCHES = 0.11
_DPI = 140
_MOST_BARS = 150
# A curve whose peak is more than this many times its median is drawn on a logarithmic scale.
_FLAT = 20


def plot_profile(profile: Profile, path: str | Path | None = None) -> "Figure":
    """Draws a profile.

    Args:
      profile: the profile. Without evidence, only the map of categories is drawn.
      path: file to write; the suffix decides the format (PNG, PDF, SVG). None writes nothing.

    Returns:
      The matplotlib figure.

    Raises:
      ProfileError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ProfileError(
            "Drawing a profile needs matplotlib: pip install matplotlib (or bsjax[demo])."
        ) from error
    mass = None if profile.evidence is None else _mass(profile.evidence)
    lower: list[Callable[[Axes], None]] = []
    if profile.evidence is not None:
        evidence = profile.evidence
        lower.append(lambda axes: _draw_ranked(axes, _mass(evidence), profile))
        lower.append(lambda axes: _draw_errors(axes, evidence))
        if evidence.sink_discovery is not None and evidence.sink_discovery.mass_by_offset:
            curve = np.asarray(evidence.sink_discovery.mass_by_offset, np.float64)
            lower.append(lambda axes: _draw_sinks(axes, curve, profile))

    map_width, map_height = (
        min(max(count * _CELL_INCHES, least), most)
        for count, least, most in zip(
            (profile.heads, profile.layers), _LEAST_MAP_INCHES, _MOST_MAP_INCHES, strict=True
        )
    )
    mass_width = 0.0 if mass is None else 4.6
    lower_height = 3.4 if lower else 0.0
    figure = Figure(
        figsize=(
            max(map_width + mass_width + 1.2, 6.6, 5.0 * len(lower)),
            map_height + lower_height + 1.7,
        ),
        layout="constrained",
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)  # pyright: ignore
    upper: Figure | SubFigure = figure
    if lower:
        halves = figure.subfigures(
            2, 1, squeeze=False, height_ratios=(map_height + 1.1, lower_height)
        )
        upper, below = halves[:, 0]
        cells = below.subplots(1, len(lower), width_ratios=[1.6, 1, 1][: len(lower)])
        for axes, draw in zip(np.atleast_1d(cells), lower, strict=True):
            draw(axes)
    if mass is None:
        _draw_map(upper.subplots(), profile, map_width / profile.heads)
    else:
        left, right = upper.subplots(1, 2, sharey=True, width_ratios=(map_width, mass_width))
        _draw_map(left, profile, min(map_width / profile.heads, map_height / profile.layers))
        _draw_layers(right, mass)
    figure.suptitle(_title(profile), fontsize=11)
    if path is not None:
        _write(figure, Path(path))
    return figure


def _write(figure: "Figure", path: Path) -> None:
    """Writes the picture. An interrupted write leaves any earlier file as it was."""
    try:
        write_figure(figure, path, _DPI)
    except (OSError, ValueError) as error:
        raise ProfileError(f"The profile's picture cannot be written to {path}: {error}") from error


def _draw_map(axes: "Axes", profile: Profile, cell_inches: float) -> None:
    """Draws the category of every head, with its letter if cells are large enough."""
    axes.imshow(
        profile.categories,
        cmap=_category_colormap(),
        vmin=-0.5,
        vmax=len(HeadCategory) - 0.5,
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xticks(np.arange(-0.5, profile.heads), minor=True)
    axes.set_yticks(np.arange(-0.5, profile.layers), minor=True)
    axes.grid(which="minor", color="white", linewidth=min(1.0, 4 * cell_inches))
    axes.tick_params(which="minor", length=0)
    axes.set_xticks(_ticks(profile.heads))
    axes.set_yticks(_ticks(profile.layers))
    axes.tick_params(labelleft=True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    if cell_inches >= _LETTER_CELL_INCHES:
        # Drawn as markers, because thousands of texts take half a minute.
        size = min(6.0, 30 * cell_inches)
        for letter, category in LETTERS.items():
            layer, head = np.nonzero(profile.categories == category)
            axes.scatter(
                head,
                layer,
                s=size**2,
                marker=rf"$\mathrm{{{letter}}}$",
                color="white" if category in _ON_DARK else "#333333",
                linewidths=0,
            )
    handles = [
        _patch(CATEGORY_COLORS[category], f"{letter}  {category.name} {share:.0%}")
        for letter, category in LETTERS.items()
        for share in [float((profile.categories == category).mean())]
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=2,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _draw_layers(axes: "Axes", mass: Float[np.ndarray, "layers heads groups"]) -> None:
    """Draws where each layer's attention goes, averaged over its heads; rows align with the map."""
    of_layers = mass.mean(axis=1)
    rows = np.arange(of_layers.shape[0])
    left = np.zeros(rows.size)
    for index, (label, color) in enumerate(_GROUPS.values()):
        axes.barh(rows, of_layers[:, index], 0.86, left, color=color, label=label)
        left = left + of_layers[:, index]
    axes.set_xlim(0, max(1.0, float(left.max())))
    axes.set_xlabel("attention of image queries, mean over heads")
    axes.tick_params(labelleft=False, left=False, which="both")
    _without_frame(axes)
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=8,
        handlelength=1.2,
        columnspacing=1.2,
    )


def _draw_ranked(
    axes: "Axes", mass: Float[np.ndarray, "layers heads groups"], profile: Profile
) -> None:
    """Draws all heads, sorted by their attention to other images, with their categories below."""
    flat = mass.reshape(-1, mass.shape[-1])
    order = np.lexsort((flat[:, 0], flat[:, -1], flat[:, -2:].sum(axis=1)))
    # If there are more heads than distinguishable bars, neighbours are averaged.
    edges = np.unique(np.linspace(0, order.size, min(order.size, _MOST_BARS) + 1).astype(int))
    means = np.add.reduceat(flat[order], edges[:-1]) / np.diff(edges)[:, None]
    bottom = np.zeros(edges.size - 1)
    for index, (_, color) in reversed(list(enumerate(_GROUPS.values()))):
        top = bottom + means[:, index]
        axes.stairs(top, edges, baseline=bottom, fill=True, color=color, linewidth=0)
        bottom = top
    highest = max(1.0, float(bottom.max()))
    strip = profile.categories.reshape(1, -1)[:, order]
    axes.imshow(
        strip,
        cmap=_category_colormap(),
        vmin=-0.5,
        vmax=len(HeadCategory) - 0.5,
        extent=(0, order.size, -0.13, -0.03),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlim(0, order.size)
    axes.set_ylim(-0.13, highest)
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.set_xlabel("heads of all layers, by attention to other images; below: their category")
    axes.set_ylabel("attention of image queries")
    _without_frame(axes)


def _draw_errors(axes: "Axes", evidence: Evidence) -> None:
    """Draws the share of heads within an error, for each sparse category."""
    from matplotlib.ticker import NullFormatter

    errors = {
        category: evidence.statistics[f"error_{category.name}"]
        for category in (
            HeadCategory.SINK,
            HeadCategory.INTRA_IMAGE,
            HeadCategory.INTRA_IMAGE_SINK,
        )
    }
    smallest = min(float(values[values > 0].min(initial=1.0)) for values in errors.values())
    start = max(smallest, 1e-5)
    largest = max(float(values.max(initial=start)) for values in errors.values())
    heads = errors[HeadCategory.SINK].size
    share = np.arange(1, heads + 1) / heads
    for category, values in errors.items():
        axes.step(
            np.append(np.sort(np.maximum(values, start), axis=None), max(largest, 2 * start)),
            np.append(share, 1.0),
            where="post",
            color=_LINE_COLORS[category],
            linewidth=1.8,
            label=category.name,
        )
    threshold = evidence.thresholds.get("threshold")
    if evidence.criterion == "output_error" and threshold is not None and threshold >= start:
        axes.axvline(threshold, color="#333333", linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"threshold {threshold:.3g}",
            (threshold, 1.01),
            xycoords=("data", "axes fraction"),
            va="bottom",
            ha="center",
            fontsize=8,
        )
    axes.set_xscale("log")
    axes.set_xlim(10 ** np.floor(np.log10(start)), 10 ** np.ceil(np.log10(max(largest, 2 * start))))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("relative error of a head's output")
    axes.set_ylabel("share of heads within it")
    axes.grid(color="#dddddd", linewidth=0.6)
    _without_frame(axes)
    axes.legend(loc="best", fontsize=8, framealpha=0.9, edgecolor="none")


def _draw_sinks(axes: "Axes", curve: Float[np.ndarray, "offsets"], profile: Profile) -> None:
    """Draws the attention that each offset gets from other images, and marks the chosen sinks."""
    from matplotlib.ticker import NullFormatter, NullLocator

    offsets = np.arange(curve.size)
    axes.plot(offsets, curve, color="#8a8f98", linewidth=1.0)
    first = profile.sinks.first
    chosen = sorted({*range(min(first, curve.size)), *profile.sinks.offsets})
    chosen = [offset for offset in chosen if offset < curve.size]
    axes.plot(chosen, curve[chosen], "o", color=_GROUPS[KeyGroup.OTHER_SINK][1], label="sinks")
    if curve.max() > _FLAT * np.median(curve) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, max(1.1 * float(curve.max()), 1e-6))
    axes.set_xscale("symlog", linthresh=8)
    axes.set_xlim(-0.5, curve.size)
    axes.set_xticks([tick for tick in (0, 4, 10, 100, 1000, 10000) if tick < curve.size])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("token of an image, counted from its first")
    axes.set_ylabel("attention per query of another image")
    axes.grid(color="#dddddd", linewidth=0.6)
    _without_frame(axes)
    axes.legend(loc="upper right", fontsize=8, framealpha=0.9, edgecolor="none")


def _title(profile: Profile) -> str:
    model = f"{profile.family}, {profile.layers} layers of {profile.heads} heads"
    evidence = profile.evidence
    if evidence is None:
        return f"{model}; not from data"
    refined = "" if evidence.refinement is None else ", refined end to end"
    return (
        f"{model}; {evidence.criterion}{refined} on {evidence.sample_count} samples; "
        f"{evidence.attention_flops.reduction:.1%} fewer attention FLOPs"
    )


def _mass(evidence: Evidence) -> Float[np.ndarray, "layers heads groups"]:
    """Attention mass per key group in the order of `_GROUPS`."""
    return np.stack([evidence.statistics[f"mass_{group.name}"] for group in _GROUPS], axis=-1)


def _category_colormap() -> "ListedColormap":
    from matplotlib.colors import ListedColormap

    return ListedColormap([CATEGORY_COLORS[category] for category in HeadCategory])


def _ticks(count: int) -> range:
    return range(0, count, 1 if count <= 16 else 2 if count <= 32 else 4)


def _without_frame(axes: "Axes") -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _patch(color: str, label: str) -> object:
    from matplotlib.patches import Patch

    return Patch(facecolor=color, label=label)
