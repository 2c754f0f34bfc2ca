"""The console script `bsjax`; each of its subcommands is a module."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

import bsjax
from bsjax.checks import arguments_named
from bsjax.cli import chat, generate, mask, profile, score, verify, warmup
from bsjax.cli.arguments import names_of
from bsjax.cli.distributed import leaving_at_errors
from bsjax.cli.output import output_failed
from bsjax.errors import BsjaxError

_EPILOG = """\
examples:
  bsjax generate checkpoints/qwen2-vl-2b "Which picture shows a cat?" one.jpg two.jpg --stream
  bsjax generate checkpoints/qwen2-vl-2b --batch questions.jsonl --output answers.jsonl
  bsjax chat checkpoints/qwen2-vl-2b --profile profile.json
  bsjax score checkpoints/qwen2-vl-2b "Is it a cat? Answer yes or no." yes no --image one.jpg
  bsjax mask checkpoints/qwen2-vl-2b "Which picture shows a cat?" one.jpg two.jpg --output mask.png
  bsjax mask --segments text:12,image:256,text:5,image:300,text:9 --category sink
  bsjax profile checkpoints/qwen2-vl-2b benchmark:muirbench --limit 64 --output profile.json
  bsjax profile show profile.json --output profile.png
  bsjax verify checkpoints/qwen2-vl-2b
  bsjax warmup checkpoints/qwen2-vl-2b --max-tokens 32768

Checkpoints are folders written by `python -m convert`.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="bsjax",
        description="Block-sparse prefill for vision-language models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"bsjax {bsjax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (generate, chat, score, mask, profile, verify, warmup):
        module.add_to(commands)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      arguments: the words after `bsjax`; None for those of this process, which then belongs to the
        command.

    Returns:
      The exit status: 0 for success, 1 if two profiles differ or conversations of a batch have
      errors, 2 for bad input (one line on stderr says what is wrong), 130 if interrupted.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(profile.with_run(given))
    options.own_process = arguments is None
    # transformers would warn that torch is missing, which tokenizers and image processors do not
    # need.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Answers may contain characters that the terminal cannot encode.
        sys.stdout.reconfigure(errors="replace")
    try:
        with leaving_at_errors(options), arguments_named(names_of(options)):
            status = options.run(options) or 0
        sys.stdout.flush()
    except BsjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return output_failed(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status
