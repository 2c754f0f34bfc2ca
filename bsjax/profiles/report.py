"""Profiles in words and tables, for a terminal."""

from collections.abc import Iterable

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bsjax.masks.categories import HeadCategory
from bsjax.profiles.difference import Difference
from bsjax.profiles.format import LETTERS
from bsjax.profiles.profile import Profile

_STRONGEST_OFFSETS = 6

LETTER_OF = {category: letter for letter, category in LETTERS.items()}
_STYLES = {
    HeadCategory.DENSE: "bold blue",
    HeadCategory.SINK: "bold red",
    HeadCategory.INTRA_IMAGE: "bold yellow",
    HeadCategory.INTRA_IMAGE_SINK: "bold magenta",
}


def print_summary(profile: Profile) -> None:
    """Prints what a profile comes to: heads per category, FLOPs, the check from end to end."""
    console = _console()
    console.print(_counts(profile))
    console.print(_figures_table(profile))


def print_profile(profile: Profile, name: str) -> None:
    """Prints everything that a profile says, one line of letters per layer.

    Args:
      profile: the profile.
      name: what it is called in the heading.
    """
    console = _console()
    console.print(Text(str(name), "bold"), soft_wrap=True)
    for label, text in _settings(profile).items():
        console.print(Text(f"{label}: {text}"), soft_wrap=True)
    console.print()
    for line in _map_lines(profile):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_counts(profile))
    if profile.statistics:
        console.print(_statistics(profile))
    if _figures(profile):
        console.print(_figures_table(profile))
    for line in _sink_lines(profile):
        console.print(line, soft_wrap=True)


def print_difference(difference: Difference, first: str, second: str) -> None:
    """Prints how two profiles differ.

    Args:
      difference: of the two.
      first: what the first one is called.
      second: what the second one is called.
    """
    console = _console()
    console.print(Text(f"A  {first}\nB  {second}"), soft_wrap=True)
    ours, theirs = _settings(difference.first), _settings(difference.second)
    for label in ours:
        if ours[label] != theirs[label]:
            console.print(Text(f"{label}: {ours[label]}  ->  {theirs[label]}"), soft_wrap=True)
    total, changed = difference.changed.size, int(difference.changed.sum())
    if not changed:
        sinks = "" if difference.same else "; sinks differ"
        console.print(f"All {total} heads have the same category{sinks}.")
    else:
        console.print(f"{changed} of {total} heads differ ({changed / total:.1%}).\n")
        console.print(_confusion(difference))
        for line in _changed_heads(difference):
            console.print(line, soft_wrap=True)
        console.print()
    if difference.statistics:
        console.print(_statistic_changes(difference))
    for side, names in (("A", difference.only_first), ("B", difference.only_second)):
        if names:
            console.print(f"Only {side} has {', '.join(names)}.", soft_wrap=True)
    if _figures(difference.first) or _figures(difference.second):
        console.print(_figures_change(difference))


def _console() -> Console:
    return Console(highlight=False)


def _settings(profile: Profile) -> dict[str, str]:
    """What the profile is for and how it was made, by name."""
    thresholds = ", ".join(f"{name} {value:g}" for name, value in profile.thresholds.items())
    offsets = ", ".join(map(str, profile.sinks.offsets))
    first = profile.sinks.first
    return {
        "model": f"{profile.family}, {profile.layers} layers of {profile.heads} heads",
        "checkpoint": profile.fingerprint or "any of that shape",
        "criterion": "refined end to end, from " * (profile.refinement is not None)
        + profile.criterion
        + (f" ({thresholds})" if thresholds else ""),
        "samples": (
            f"{profile.sample_count}, and {profile.held_out_count} held out: "
            f"{profile.sample_source or 'source not told'}"
            if profile.from_data
            else profile.sample_source or "none"
        ),
        "sinks": f"the first {first} tokens of each image" * (first > 1)
        + "the first token of each image" * (first == 1)
        + (f", and offsets {offsets}" if offsets else ""),
        "made with": ", ".join(f"{name} {value}" for name, value in profile.versions.items())
        or "unknown",
    }


def _map_lines(profile: Profile) -> Iterable[Text]:
    """One line of letters per layer, in groups of eight heads, with each category's count."""
    width = len(str(profile.layers - 1))
    ruler = "".join(
        f"{head:<9}" if profile.heads - head > 2 or head == 0 else ""
        for head in range(0, profile.heads, 8)
    ).rstrip()
    letters_width = profile.heads + (profile.heads - 1) // 8
    counts = "  ".join(f"{letter:>2}" for letter in LETTERS)
    yield Text(f"{'layer':<{width + 6}}  {'head ' + ruler:<{letters_width + 5}}  {counts}", "dim")
    for layer, row in enumerate(profile.categories):
        line = Text(f"{'layer':<6}{layer:>{width}}       ")
        for head, value in enumerate(row):
            category = HeadCategory(int(value))
            gap = " " if head and head % 8 == 0 else ""
            line.append(gap + LETTER_OF[category], _STYLES[category])
        numbers = [int((row == category).sum()) for category in LETTERS.values()]
        line.append("  " + "  ".join(f"{number:>2}" if number else " ." for number in numbers))
        yield line


def _counts(profile: Profile) -> Table:
    table = Table(title="heads", title_justify="left")
    for column in ("", "category", "heads", "share"):
        table.add_column(column, justify="right" if column in ("heads", "share") else "left")
    for letter, category in LETTERS.items():
        heads = int((profile.categories == category).sum())
        share = f"{heads / profile.categories.size:.1%}"
        table.add_row(Text(letter, _STYLES[category]), category.name, str(heads), share)
    return table


def _statistics(profile: Profile) -> Table:
    """Each statistic over all heads, and its mean over the heads of each category."""
    table = _plain_table("statistics")
    present = [category for category in LETTERS.values() if (profile.categories == category).any()]
    for column in ("median", "mean", "most"):
        table.add_column(column, justify="right")
    for category in present:
        table.add_column(f"mean {LETTER_OF[category]}", justify="right", no_wrap=True)
    for name, values in profile.statistics.items():
        values = np.asarray(values, np.float64)
        overall = (np.median(values), values.mean(), values.max())
        by_category = (values[profile.categories == category].mean() for category in present)
        table.add_row(name, *(_fixed(value) for value in (*overall, *by_category)))
    return table


def _sink_lines(profile: Profile) -> Iterable[Text]:
    """How sinks were found, and the places of an image that draw most."""
    discovery = profile.sink_discovery
    if discovery is None:
        return
    curve = np.asarray(discovery["mass_by_offset"], np.float64)
    strongest = np.argsort(-curve, kind="stable")[:_STRONGEST_OFFSETS].tolist()
    listed = ", ".join(f"{offset} ({_short(float(curve[offset]))})" for offset in strongest)
    yield Text(f"sinks were looked for: {discovery['rule']}")
    yield Text(f"tokens of an image that draw most from other images' queries: {listed}")


def _figures(profile: Profile) -> dict[str, int | float]:
    """Single numbers, by name: FLOPs, refinement, the check from end to end."""
    figures = {}
    for title, numbers in (
        ("attention FLOPs", profile.attention_flops),
        ("refinement", profile.refinement),
        ("held out", profile.end_to_end),
    ):
        for name, value in (numbers or {}).items():
            figures[f"{title}: {name.replace('_', ' ')}"] = value
    if len(profile.attention_flops_per_kind) > 1:
        for kind in profile.attention_flops_per_kind:
            figures[f"attention FLOPs: reduction in {kind.name}"] = 1 - kind.sparse / kind.dense
    return figures


def _figures_table(profile: Profile) -> Table:
    table = _plain_table("")
    table.show_header = False
    table.add_column("", justify="right")
    for name, value in _figures(profile).items():
        table.add_row(name, _short(value))
    return table


def _figures_change(difference: Difference) -> Table:
    table = _plain_table("")
    for column in ("A", "B", "change"):
        table.add_column(column, justify="right")
    first, second = _figures(difference.first), _figures(difference.second)
    for name in [*first, *(name for name in second if name not in first)]:
        ours, theirs = first.get(name), second.get(name)
        change = f"{theirs - ours:+.3g}" if ours is not None and theirs is not None else ""
        shown = ("" if value is None else _short(value) for value in (ours, theirs))
        table.add_row(name, *shown, change)
    return table


def _confusion(difference: Difference) -> Table:
    table = Table(title="heads by their category in A and in B", title_justify="left")
    table.add_column("")
    for letter in LETTERS:
        table.add_column(f"B: {letter}", justify="right")
    for letter, category in LETTERS.items():
        counts = [int(difference.confusion[category, other]) for other in LETTERS.values()]
        table.add_row(
            Text(f"A: {letter} {category.name}"),
            *(
                Text(str(count) if count else ".", "dim" if other == category or not count else "")
                for count, other in zip(counts, LETTERS.values(), strict=True)
            ),
        )
    return table


def _changed_heads(difference: Difference) -> Iterable[Text]:
    """One line per layer with changes: which heads, from what to what."""
    width = len(str(difference.first.layers - 1))
    for layer, row in enumerate(difference.changed):
        heads = np.flatnonzero(row).tolist()
        if not heads:
            continue
        entries = [
            f"{head} {LETTER_OF[HeadCategory(int(difference.first.categories[layer, head]))]}"
            f"->{LETTER_OF[HeadCategory(int(difference.second.categories[layer, head]))]}"
            for head in heads
        ]
        yield Text(f"layer {layer:>{width}}: head {', '.join(entries)}")


def _statistic_changes(difference: Difference) -> Table:
    table = _plain_table("statistics")
    for column in ("mean A", "mean B", "largest change", "at"):
        table.add_column(column, justify="right")
    for change in difference.statistics:
        table.add_row(
            change.name,
            _fixed(change.first_mean),
            _fixed(change.second_mean),
            f"{change.largest:+.3g}" if change.largest else "none",
            f"layer {change.layer}, head {change.head}" if change.largest else "",
        )
    return table


def _plain_table(title: str) -> Table:
    """A table without lines between columns: narrow, its first column whole."""
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    return table


def _short(value: int | float) -> str:
    """A number in few digits, whole ones whole."""
    whole = float(value).is_integer() and 1 <= abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def _fixed(value: int | float) -> str:
    """A number in a column of its like: three decimals, or its size where those would be zeros."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.0e}"
