"""`bsjax profile`: measures a checkpoint's heads on samples; shows and compares profiles."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bsjax.cli.arguments import add_image_settings
from bsjax.errors import ProfileError

if TYPE_CHECKING:
    from bsjax.masks.template import Sinks
    from bsjax.profiles.profile import Profile

_COMMANDS = ("run", "show", "diff")

_EPILOG = """\
`run` may be left out. Each has its own --help. Examples:
  bsjax profile checkpoints/qwen2-vl-2b samples.jsonl --output profile.json
  bsjax profile checkpoints/qwen2-vl-2b benchmark:muirbench benchmark:blink --limit 64 \\
      --target-reduction 0.4 --refine --resume profile.state --output profile.json
  bsjax profile show profile.json --output profile.png
  bsjax profile diff before.json after.json
"""

_RUN_EPILOG = """\
A SOURCE of samples is one of
  FILE.jsonl             one sample a line: a list of chat messages, or {"messages": [...]}
  FOLDER                 of images: prompts of several of them, drawn by --seed, and a question
  benchmark:muirbench    MuirBench, MMIU or BLINK from the Hugging Face Hub (pip install datasets);
  benchmark:mmiu         benchmark:blink/Jigsaw is one task of BLINK, benchmark:mmiu@FOLDER reads a
  benchmark:blink        copy of the hub's repository
"""


def with_run(arguments: list[str]) -> list[str]:
    """The arguments, with the `run` that `bsjax profile CHECKPOINT ...` leaves out."""
    following = arguments[1:2]
    if (
        arguments[:1] == ["profile"]
        and following
        and following[0]
        not in (
            *_COMMANDS,
            "-h",
            "--help",
        )
    ):
        return ["profile", "run", *arguments[1:]]
    return arguments


def add_to(commands: Any) -> None:
    """Adds the subcommand and those below it."""
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
        "--seed", type=int, default=0, help="of every draw, and of the held-out split; default: 0"
    )
    samples.add_argument(
        "--question",
        action="append",
        metavar="TEXT",
        help="what to ask about a folder's images; of several, one is drawn for each prompt",
    )
    samples.add_argument(
        "--images-per-prompt",
        type=_range,
        default=(2, 12),
        metavar="LEAST-MOST",
        help="of a folder of images; default: 2-12",
    )
    add_image_settings(samples)
    samples.add_argument(
        "--held-out",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the samples, kept for the check from end to end; default: 0.25",
    )
    choice = parser.add_argument_group("choice of categories")
    choice.add_argument(
        "--criterion",
        choices=("output_error", "mass"),
        default="output_error",
        help="bound the relative error of a head's output (default), or the attention it drops",
    )
    choice.add_argument(
        "--threshold", type=float, default=0.05, help="the most of it per head; default: 0.05"
    )
    choice.add_argument(
        "--quantile",
        type=float,
        default=0.9,
        metavar="SHARE",
        help="of the samples that must stay below the threshold; default: 0.9",
    )
    choice.add_argument(
        "--target-reduction",
        type=float,
        metavar="SHARE",
        help="of attention FLOPs to save; finds the threshold (0.4: save 40%%)",
    )
    choice.add_argument(
        "--refine",
        action="store_true",
        help="then move heads by their measured effect from end to end, until the budget is met",
    )
    choice.add_argument(
        "--max-kl", type=float, metavar="NATS", help="with --refine: the budget is this divergence"
    )
    choice.add_argument(
        "--max-evaluations",
        type=int,
        default=1024,
        metavar="N",
        help="with --refine: compare at most N assignments of categories, each a prefill of every "
        "sample; default: 1024",
    )
    choice.add_argument(
        "--sinks-first",
        type=int,
        metavar="N",
        help="the first N tokens of each image are sinks; without it and --sink-offset, sinks are "
        "looked for",
    )
    choice.add_argument(
        "--sink-offset",
        type=int,
        action="append",
        metavar="K",
        help="the token K after the first of each image is a sink as well; can be repeated",
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--answer-tokens",
        type=int,
        default=8,
        metavar="N",
        help="tokens of the answers that are compared, dense against sparse; default: 8",
    )
    running.add_argument(
        "--resume",
        metavar="FILE",
        type=Path,
        help="keep what was measured in FILE; the same command goes on from there",
    )
    running.add_argument("--dtype", help="float32, bfloat16 or float16; default: by device")
    running.add_argument(
        "--backend", default="auto", help="of the attention: auto, pallas, xla, reference"
    )
    running.add_argument("--quiet", action="store_true", help="no progress bar, no summary")
    parser.set_defaults(run=_run)


def _add_show(commands: Any) -> None:
    parser = commands.add_parser(
        "show",
        help="print a profile, and draw it",
        description="Prints a profile: each head's category (one letter per head, one line per "
        "layer), what was measured, and how far the sparse answers are from the dense ones.",
        allow_abbrev=False,
    )
    parser.add_argument("profile", metavar="PROFILE", help="a file, or a shipped profile's name")
    parser.add_argument(
        "--output",
        metavar="PICTURE",
        type=Path,
        help="draw categories, attention per key group and errors (PNG, PDF or SVG)",
    )
    parser.set_defaults(run=_show)


def _add_diff(commands: Any) -> None:
    parser = commands.add_parser(
        "diff",
        help="compare two profiles of one model",
        description="Says which heads have other categories in B than in A, and how FLOPs and "
        "measurements differ. Exit status: 0 when categories and sinks are the same, 1 when they "
        "differ, 2 when the profiles cannot be compared.",
        allow_abbrev=False,
    )
    parser.add_argument("first", metavar="A", help="a profile's file, or a shipped profile's name")
    parser.add_argument("second", metavar="B")
    parser.set_defaults(run=_diff)


def _run(options: argparse.Namespace) -> None:
    import bsjax
    from bsjax.samples import QUESTIONS

    sinks = _sinks(options)
    _check_writable(options.output)
    samples = bsjax.read_samples(
        options.sources,
        limit=options.limit,
        seed=options.seed,
        images_per_prompt=options.images_per_prompt,
        max_pixels=options.max_pixels,
        pan_and_scan=options.pan_and_scan,
        question=options.question or QUESTIONS,
    )
    model = bsjax.load(options.checkpoint, dtype=options.dtype)
    try:
        profile = bsjax.profile(
            model,
            samples.messages,
            threshold=options.threshold,
            criterion=options.criterion,
            quantile=options.quantile,
            target_reduction=options.target_reduction,
            refine=options.refine,
            max_kl=options.max_kl,
            max_evaluations=options.max_evaluations,
            sinks=sinks,
            held_out=options.held_out,
            answer_tokens=options.answer_tokens,
            seed=options.seed,
            source=samples.description,
            resume=options.resume,
            progress=False if options.quiet else None,
            backend=options.backend,
        )
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
    print_profile(profile, options.profile)
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
    return Sinks(first, tuple(options.sink_offset or ()))


def _check_writable(path: Path) -> None:
    """Refuses a place that cannot be written to now rather than after hours of measuring."""
    folder = path.absolute().parent
    if os.path.isdir(path):
        raise ProfileError(f"--output {path} is a folder: name a file in it.")
    if not os.path.isdir(folder):
        raise ProfileError(f"--output {path}: there is no folder {folder}. Make it first.")
    if not os.access(folder, os.W_OK):
        raise ProfileError(f"--output {path}: the folder {folder} cannot be written to.")


def _range(text: str) -> tuple[int, int]:
    least, dash, most = text.partition("-")
    try:
        return int(least), int(most if dash else least)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no range such as 2-12") from None
