"""Profiles as text and tables, for a terminal."""

from collections.abc import Iterable, Mapping

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bsjax.masks.categories import HeadCategory
from bsjax.profiles.difference import Difference
from bsjax.profiles.evidence import Evidence
from bsjax.profiles.format import LETTER_OF, LETTERS
from bsjax.profiles.profile import Profile

_STRONGEST_OFFSETS = 6

# Settings of the held-out comparison, not results.
_HELD_OUT_SETTINGS = ("answer tokens", "split seed")

_STYLES = {
    HeadCategory.DENSE: "bold blue",
    HeadCategory.SINK: "bold red",
    HeadCategory.INTRA_IMAGE: "bold yellow",
    HeadCategory.INTRA_IMAGE_SINK: "bold magenta",
}


def print_summary(profile: Profile) -> None:
    """Prints the number of heads per category, the FLOPs saved and the held-out comparison."""
    console = _console()
    console.print(_counts(profile))
    if profile.evidence is not None:
        console.print(_figures_table(_headline(profile.evidence)))


def print_profile(profile: Profile, name: str, *, details: bool = False) -> None:
    """Prints a profile: what it is for, each head's category, what it saves and how close it is.

    Args:
      profile: the profile.
      name: what the heading calls it.
      details: also print per-head statistics, all figures of refinement and how sinks were found.
    """
    console = _console()
    console.print(Text(str(name), "bold"), soft_wrap=True)
    for label, text in _description(profile).items():
        console.print(Text(f"{label}: {text}"), soft_wrap=True)
    console.print()
    for line in _map_lines(profile):
        console.print(line, soft_wrap=True)
    console.print()
    console.print(_counts(profile))
    if profile.evidence is None:
        return
    if not details:
        console.print(_figures_table(_headline(profile.evidence)))
        return
    console.print(_figures_table(_figures(profile.evidence)))
    console.print(_statistics(profile, profile.evidence))
    for line in _sink_lines(profile.evidence):
        console.print(line, soft_wrap=True)


def print_difference(difference: Difference, first: str, second: str) -> None:
    """Prints how two profiles differ.

    Args:
      difference: from `compare`.
      first: what to call the first profile.
      second: what to call the second profile.
    """
    console = _console()
    console.print(Text(f"A  {first}\nB  {second}"), soft_wrap=True)
    ours, theirs = _description(difference.first), _description(difference.second)
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
    figures = [
        {} if profile.evidence is None else _figures(profile.evidence)
        for profile in (difference.first, difference.second)
    ]
    if any(figures):
        console.print(_figures_change(*figures))


def _console() -> Console:
    return Console(highlight=False)


def _description(profile: Profile) -> dict[str, str]:
    """What the profile is for and how it was made: lines of text by label."""
    criterion, samples = profile.criterion, profile.source or "none"
    if profile.evidence is not None:
        evidence = profile.evidence
        thresholds = ", ".join(f"{name} {value:g}" for name, value in evidence.thresholds.items())
        refined = "" if evidence.refinement is None else "refined end to end, from "
        criterion = f"{refined}{criterion}" + (f" ({thresholds})" if thresholds else "")
        samples = (
            f"{evidence.sample_count}, and {evidence.held_out_count} held out: "
            f"{profile.source or 'unknown source'}"
        )
    first, offsets = profile.sinks.first, ", ".join(map(str, profile.sinks.offsets))
    return {
        "model": f"{profile.family}, {profile.layers} layers of {profile.heads} heads",
        "checkpoint": profile.fingerprint or "any of that shape",
        "criterion": criterion,
        "samples": samples,
        "sinks": ("the first token" if first == 1 else f"the first {first} tokens")
        + " of each image"
        + (f", and offsets {offsets}" if offsets else ""),
        "made with": ", ".join(f"{name} {value}" for name, value in profile.versions.items())
        or "unknown",
    }


def _map_lines(profile: Profile) -> Iterable[Text]:
    """Yields a line per layer: its letters, in groups of eight heads, and counts by category."""
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


def _statistics(profile: Profile, evidence: Evidence) -> Table:
    """Each statistic over all heads, and its mean over the heads of each category."""
    table = _plain_table("statistics")
    present = [category for category in LETTERS.values() if (profile.categories == category).any()]
    for column in ("median", "mean", "most"):
        table.add_column(column, justify="right")
    for category in present:
        table.add_column(f"mean {LETTER_OF[category]}", justify="right", no_wrap=True)
    for name, values in evidence.statistics.items():
        overall = (np.median(values), values.mean(), values.max())
        by_category = (values[profile.categories == category].mean() for category in present)
        table.add_row(name, *(_fixed(value) for value in (*overall, *by_category)))
    return table


def _sink_lines(evidence: Evidence) -> Iterable[Text]:
    """How sinks were found, and the offsets that get the most attention."""
    discovery = evidence.sink_discovery
    if discovery is None:
        return
    curve = np.asarray(discovery.mass_by_offset, np.float64)
    strongest = np.argsort(-curve, kind="stable")[:_STRONGEST_OFFSETS].tolist()
    listed = ", ".join(f"{offset} ({_short(float(curve[offset]))})" for offset in strongest)
    yield Text(f"how sinks were found: {discovery.rule}")
    yield Text(f"offsets of an image that other images attend to most: {listed}")


def _headline(evidence: Evidence) -> dict[str, int | float]:
    """The figures to read first: what is saved, and how close the sparse model is."""
    return {
        name: value
        for name, value in _figures(evidence).items()
        if name.startswith(("attention FLOPs: reduction", "held out"))
        and not name.endswith(_HELD_OUT_SETTINGS)
    }


def _figures(evidence: Evidence) -> dict[str, int | float]:
    """Single numbers, by name: FLOPs, refinement, comparison on held-out samples."""
    flops = evidence.attention_flops
    figures = {
        "attention FLOPs: dense": flops.dense,
        "attention FLOPs: sparse": flops.sparse,
        "attention FLOPs: reduction": flops.reduction,
    }
    if len(evidence.attention_flops_per_kind) > 1:
        for kind in evidence.attention_flops_per_kind:
            figures[f"attention FLOPs: reduction in {kind.name}"] = 1 - kind.sparse / kind.dense
    for title, numbers in (
        ("refinement", evidence.refinement),
        ("held out", evidence.end_to_end),
    ):
        for name, value in (numbers or {}).items():
            figures[f"{title}: {name.replace('_', ' ')}"] = value
    return figures


def _figures_table(figures: Mapping[str, int | float]) -> Table:
    table = _plain_table("")
    table.show_header = False
    table.add_column("", justify="right")
    for name, value in figures.items():
        table.add_row(name, _short(value))
    return table


def _figures_change(first: Mapping[str, int | float], second: Mapping[str, int | float]) -> Table:
    table = _plain_table("")
    for column in ("A", "B", "change"):
        table.add_column(column, justify="right")
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
    """One line per layer that has changes: heads with their old and new category."""
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
    """A narrow table: no lines between columns, and a first column that does not wrap."""
    table = Table(
        title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("", no_wrap=True)
    return table


def _short(value: int | float) -> str:
    """A number with four significant digits; a whole number in full."""
    whole = float(value).is_integer() and 1 <= abs(value) < 1e6
    return f"{value:,.0f}" if whole else f"{value:.4g}"


def _fixed(value: int | float) -> str:
    """A number with three decimals, or its order of magnitude if those would be zeros."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 5e-4 else f"{value:.0e}"
