"""The command line of the converter: `python -m convert SOURCE DESTINATION`."""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_DESCRIPTION = """\
Convert a Hugging Face checkpoint (Qwen2-VL, Qwen2.5-VL, Gemma 3) into one that bsjax.load reads:
the weights as an Orbax checkpoint, plus configuration, tokenizer and image processor files.
Weights stream from the safetensors files to the disk: converting needs little memory and no GPU.
"""

_EPILOG = """\
examples:
  python -m convert Qwen/Qwen2-VL-2B-Instruct checkpoints/qwen2-vl-2b
  python -m convert ~/models/Qwen2.5-VL-3B-Instruct checkpoints/qwen2.5-vl-3b --verify

DESTINATION appears only when it is complete. A run that is killed leaves a folder named
DESTINATION.converting-NUMBER, which the next run removes.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m convert",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of a Hugging Face checkpoint (safetensors), or its id on the hub",
    )
    parser.add_argument(
        "destination",
        metavar="DESTINATION",
        type=Path,
        help="folder to write; must be empty or not exist",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="dtype to store the weights in (default: the dtype of most source weights)",
    )
    parser.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit on the hub (default: main)"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare the result with transformers on a small prompt before it is published; needs "
        "torch, and memory for the model in float32",
    )
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
      The exit status: 0 for success, 2 for bad input or a failed verification (explained on
      stderr), 130 if interrupted.
    """
    options = build_parser().parse_args(arguments)
    from bsjax.cli.output import output_failed
    from bsjax.errors import BsjaxError

    if isinstance(sys.stdout, io.TextIOWrapper):
        # The names of folders may contain characters that the terminal cannot encode.
        sys.stdout.reconfigure(errors="replace")
    try:
        status = _convert(options)
        sys.stdout.flush()
        return status
    except BsjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return output_failed(error)
    except KeyboardInterrupt:
        print(f"interrupted: {options.destination} was not written", file=sys.stderr)
        return 130


def _convert(options: argparse.Namespace) -> int:
    # Imported here, so that --help is fast.
    from bsjax.cli.imports import import_jax

    import_jax(devices=True)
    from convert.conversion import convert_checkpoint
    from convert.writing import remove_unfinished

    # Hides Orbax's message that there was nothing to merge.
    logging.getLogger("absl").setLevel(logging.ERROR)
    removed = remove_unfinished(options.destination)
    if not options.quiet:
        for folder in removed:
            print(
                f"note: removed {folder}, which a conversion that was killed had left",
                file=sys.stderr,
            )
    with _progress_bar(options.quiet) as progress:
        result = convert_checkpoint(
            options.source,
            options.destination,
            dtype=options.dtype,
            revision=options.revision,
            check=options.verify,
            trial=True,
            progress=progress,
        )
    if options.quiet:
        return 0
    print(f"converted    {options.source} ({result.family})")
    print(f"parameters   {result.parameters:,} in {result.arrays} arrays")
    print(f"size         {result.nbytes:,} bytes of {result.dtype}")
    print(f"time         {result.seconds:.1f} s")
    if not result.tried:
        print("logits       not tried: the model is large; --verify runs and compares it")
    if result.verification is not None:
        print(
            f"verified     logits within {result.verification.difference:.1e} of transformers' "
            f"(allowed: {result.verification.tolerance:.0e}) at {result.verification.tokens} tokens"
        )
    print(f"fingerprint  {result.manifest} (bsjax verify)")
    print(f"written to   {result.destination}")
    print()
    print("next:")
    question = '"What is in this picture?" PHOTO.jpg' if result.reads_images else '"Who are you?"'
    print(f"  bsjax generate {result.destination} {question}")
    return 0


@contextlib.contextmanager
def _progress_bar(quiet: bool) -> Iterator:
    """A progress bar on stderr, if that is a terminal."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("converting"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _use_little(verify: bool) -> None:
    """Keeps this process from loading what a conversion does not need."""
    # Otherwise JAX would reserve GPU memory, although a conversion only moves bytes.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Silences warnings about missing torch and about token ids, irrelevant to a conversion.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not verify:
        # transformers imports torch if it is installed, which costs seconds and hundreds of
        # megabytes. A module that is None in sys.modules cannot be imported.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    _use_little(verify="--verify" in sys.argv)
    sys.exit(main())
