"""`bsjax profile`: measures a checkpoint's heads on samples, shows profiles and compares them."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.checks import naming
from bsjax.cli.arguments import (
    add_device_options,
    add_image_settings,
    check_writable,
    described_model,
)
from bsjax.cli.imports import import_libraries
from bsjax.errors import ProfileError
from bsjax.profiles.criteria import MEASURED_CRITERIA
from bsjax.profiling.settings import Settings, Threshold

if TYPE_CHECKING:
    from bsjax.masks.template import Sinks
    from bsjax.profiles.profile import Profile

_COMMANDS = ("run", "show", "diff")

_SETTINGS = (
    "threshold",
    "criterion",
    "quantile",
    "target_reduction",
    "refine",
    "max_kl",
    "max_evaluations",
    "held_out",
    "answer_tokens",
    "seed",
)

_EPILOG = """\
`run` can be omitted. Each command has its own --help. Examples:
  bsjax profile checkpoints/qwen2-vl-2b samples.jsonl --output profile.json
  bsjax profile checkpoints/qwen2-vl-2b benchmark:muirbench benchmark:blink --limit 64 \\
      --target-reduction 0.4 --refine --resume profile.state --output profile.json
  bsjax profile show profile.json --output profile.png
  bsjax profile diff before.json after.json
"""

_RUN_EPILOG = """\
A SOURCE of samples is one of
  FILE.jsonl             one sample per line: a list of chat messages, or {"messages": [...]}
  FOLDER                 of images: prompts with several of them, drawn by --seed, and a question
  benchmark:muirbench    MuirBench, MMIU or BLINK from the Hugging Face Hub (pip install datasets);
  benchmark:mmiu         benchmark:blink/Jigsaw is one task of BLINK, benchmark:mmiu@FOLDER reads a
  benchmark:blink        copy of the hub's repository
"""


def with_run(arguments: list[str]) -> list[str]:
    """Inserts the `run` that `bsjax profile CHECKPOINT ...` leaves out."""
    match arguments:
        case ["profile", following, *_] if following not in (*_COMMANDS, "-h", "--help"):
            return ["profile", "run", *arguments[1:]]
    return arguments


def add_to(commands: Any) -> None:
    """Adds the subcommand and its own subcommands."""
    parser = commands.add_parser(
        "profile",
        help="find each head's category on samples; show and compare profiles",
        description="Finds a category for every head of a checkpoint, from samples; shows profiles "
        "and compares them.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    below = parser.add_subparsers(dest="profile_command", metavar="COMMAND", required=True)
    _add_run(below)
    _add_show(below)
    _add_diff(below)


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="measure a checkpoint on samples and write its profile",
        description="Runs a checkpoint over samples, measures what the attention of each head "
        "needs to see, gives each head a category and writes the profile.",
        epilog=_RUN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="see below")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, required=True, help="the profile to write"
    )
    samples = parser.add_argument_group("samples")
    samples.add_argument(
        "--limit", type=int, metavar="N", help="at most N samples of each source, drawn by --seed"
    )
    samples.add_argument(
        "--seed",
        type=int,
        default=Settings.seed,
        help="seed of all draws and of the held-out split; default: %(default)s",
    )
    samples.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="question about a folder's images; if given several times, one is drawn per prompt",
    )
    samples.add_argument(
        "--images-per-prompt",
        type=_range,
        default=(2, 12),
        metavar="LEAST-MOST",
        help="images of a prompt, for a folder of images; default: 2-12",
    )
    add_image_settings(samples)
    samples.add_argument(
        "--held-out",
        type=float,
        default=Settings.held_out,
        metavar="SHARE",
        help="share of the samples held out for the end-to-end check; default: %(default)s",
    )
    choice = parser.add_argument_group("choice of categories")
    choice.add_argument(
        "--criterion",
        choices=MEASURED_CRITERIA,
        default=Settings.criterion,
        help="what to bound: the relative error of a head's output, or the attention mass that it "
        "drops; default: %(default)s",
    )
    choice.add_argument(
        "--threshold",
        type=float,
        default=Threshold.value,
        help="the bound for each head; default: %(default)s",
    )
    choice.add_argument(
        "--quantile",
        type=float,
        default=Settings.quantile,
        metavar="SHARE",
        help="share of the samples that must be within the threshold; default: %(default)s",
    )
    choice.add_argument(
        "--target-reduction",
        type=float,
        metavar="SHARE",
        help="share of attention FLOPs to save; finds the threshold (0.4: save 40%%)",
    )
    choice.add_argument(
        "--refine",
        action="store_true",
        help="then change heads by their measured end-to-end effect, until the budget is met",
    )
    choice.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help="with --refine: save as much as possible within this KL divergence",
    )
    choice.add_argument(
        "--max-evaluations",
        type=int,
        default=Settings.max_evaluations,
        metavar="N",
        help="with --refine: evaluate at most N assignments of categories, each of which takes one "
        "prefill of every sample; default: %(default)s",
    )
    choice.add_argument(
        "--sinks-first",
        type=int,
        metavar="N",
        help="the first N tokens of each image are sinks; without this and --sink-offset, sinks "
        "are found in the samples",
    )
    choice.add_argument(
        "--sink-offset",
        type=int,
        action="append",
        metavar="K",
        help="the token at offset K from the first of each image is also a sink; can be repeated",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--answer-tokens",
        type=int,
        default=Settings.answer_tokens,
        metavar="N",
        help="compare dense and sparse along at most N tokens of each answer; default: %(default)s",
    )
    running.add_argument(
        "--resume",
        metavar="FILE",
        type=Path,
        help="keep measurements in FILE, from which the same command continues",
    )
    add_device_options(running)
    running.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(run=_run)


def _add_show(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="print a profile or draw it",
        description="Prints a profile: each head's category (one letter per head, one line per "
        "layer), the attention FLOPs saved, and how close sparse answers are to dense ones.",
        allow_abbrev=False,
    )
    parser.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    parser.add_argument(
        "--output",
        metavar="PICTURE",
        type=Path,
        help="draw categories, attention per key group and errors (PNG, PDF or SVG)",
    )
    parser.add_argument(
        "--details",
        action="store_true",
        help="also print statistics over all heads, the figures of refinement and how sinks were "
        "found",
    )
    parser.set_defaults(run=_show)


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="compare two profiles of one model",
        description="Lists the heads whose categories differ between A and B, and how FLOPs and "
        "measurements differ. Exit status: 0 if categories and sinks are the same, 1 if they "
        "differ, 2 if the profiles cannot be compared.",
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help="a profile's file, or a shipped profile's name")
    parser.add_argument("second", metavar="B")
    parser.set_defaults(run=_diff)


def _run(options: argparse.Namespace) -> None:
    import_libraries(options)
    import bsjax
    from bsjax.checkpoint.loading import with_weights
    from bsjax.profiling.driver import checked_run, profile_checked
    from bsjax.samples import QUESTIONS

    # What can be refused is refused before the weights are read.
    sinks = _sinks(options)
    settings = Settings.of(**{name: getattr(options, name) for name in _SETTINGS})
    check_writable(options.output, error=ProfileError)
    samples = bsjax.read_samples(
        options.sources,
        limit=options.limit,
        seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        max_pixels=options.max_pixels,
        pan_and_scan=options.pan_and_scan,
        question=options.question or QUESTIONS,
    )
    described = described_model(options)
    run = checked_run(
        settings,
        described,
        samples,
        sinks=sinks,
        source=samples.description,
        resume=options.resume,
        backend=options.backend,
    )
    progress = False if options.quiet else None
    model = with_weights(described, progress)
    try:
        profile = profile_checked(model, run, progress)
    except KeyboardInterrupt:
        if options.resume is not None:
            print(f"What was measured is in {options.resume}.", file=sys.stderr)
        raise
    profile.save(options.output)
    if not options.quiet:
        from bsjax.profiles.report import print_summary

        print_summary(profile)
    print(options.output)


def _show(options: argparse.Namespace) -> None:
    from bsjax.profiles.report import print_profile

    profile = _read(options.profile)
    if options.output is not None:
        from bsjax.profiles.picture import plot_profile

        plot_profile(profile, options.output)
    print_profile(profile, options.profile, details=options.details)
    if options.output is not None:
        print(options.output)


def _diff(options: argparse.Namespace) -> int:
    from bsjax.profiles.difference import compare
    from bsjax.profiles.report import print_difference

    difference = compare(_read(options.first), _read(options.second))
    print_difference(difference, options.first, options.second)
    return 0 if difference.same else 1


def _read(name: str) -> "Profile":
    from bsjax.profiles.profile import Profile, shipped, shipped_names

    if not os.path.exists(name) and name in shipped_names():
        return shipped(name)
    return Profile.load(name)


def _sinks(options: argparse.Namespace) -> "Sinks | None":
    if options.sinks_first is None and not options.sink_offset:
        return None
    from bsjax.masks.template import Sinks

    first = 1 if options.sinks_first is None else options.sinks_first
    with naming("--sinks-first or --sink-offset"):
        return Sinks(first, tuple(options.sink_offset or ()))


def _range(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    try:
        return int(least), int(most if dash else least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a range such as 2-12") from None
