"""`bsjax warmup`: compiles a checkpoint's programs into JAX's persistent cache."""

import argparse
from typing import Any

from bsjax.cli.arguments import add_device_options, described_model
from bsjax.cli.imports import import_libraries


def add_to(commands: Any) -> None:
    """Adds the subcommand."""
    parser = commands.add_parser(
        "warmup",
        help="compile a checkpoint's programs ahead of time",
        description="Compiles the programs that answer prompts up to a length, and keeps them in "
        "JAX's persistent cache, so that later processes only read them.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a converted checkpoint's folder")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="the most tokens of a prompt and its answer; default: 8192",
    )
    parser.add_argument("--no-images", action="store_true", help="prompts have no images")
    parser.add_argument("--no-scoring", action="store_true", help="no answers are scored")
    parser.add_argument(
        "--profile",
        metavar="FILE",
        help="also compile for prompts with this profile; default: dense attention only",
    )
    parser.add_argument(
        "--conversations",
        type=int,
        default=1,
        metavar="N",
        help="also compile for batches of N conversations; default: 1, for no batches",
    )
    add_device_options(parser)
    parser.set_defaults(run=_warmup)


def _warmup(options: argparse.Namespace) -> None:
    import_libraries(options)
    import bsjax
    from bsjax.checkpoint.loading import with_weights
    from bsjax.runtime.warmup import checked_warmup

    # What can be refused is refused before the weights are read.
    described = described_model(options)
    arguments: dict[str, Any] = {
        "max_tokens": options.max_tokens,
        "images": not options.no_images,
        "conversations": options.conversations,
        "scoring": not options.no_scoring,
        "backend": options.backend,
    }
    profile, _ = checked_warmup(described, profile=options.profile, **arguments)
    profiles: dict[str, bsjax.Profile | None] = {"dense": None}
    if profile is not None:
        profiles[options.profile] = profile
    model = with_weights(described)
    for name, each in profiles.items():
        done = bsjax.warmup(model, profile=each, **arguments)
        print(f"{name}: {done.programs} programs in {done.seconds:.1f} s")
