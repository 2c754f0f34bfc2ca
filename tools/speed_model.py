"""A MODEL of the speed of prefill attention on GPUs. Nothing that it prints is measured.

    python -m tools.speed_model                            # one layer on an H200, all lengths
    python -m tools.speed_model --gpu a100 --tokens 36 --images 1000 --chunks
    python -m tools.speed_model --beside attention_on_nvidia_h200.json     # a benchmark's results
    python -m tools.speed_model --page                     # the tables of docs/speed.md
    python -m tools.speed_model --compile                  # kernels.json, after kernels changed

From the compiled loops (instructions, products on tensor cores, waits, bytes, programs per
multiprocessor) and from real schedules (blocks of each tile, in the order in which programs start)
it predicts the time of a layer, and what of it is lost to what. `docs/speed.md` says how, and what
would prove it wrong.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import (
    LAST_TEXT_TOKENS,
    MASK_NAMES,
    OTHER_TEXT_TOKENS,
    SHAPES,
    TEXT_TOKENS,
)
from tools.gpu_targets import TARGETS
from tools.speed.comparison import beside, falsifiers, gpu_of, is_modelled
from tools.speed.kernels import compile_all
from tools.speed.page import MASKS, PAGE, THOUSANDS, predictions_table, write_page
from tools.speed.rates import RELATIVES
from tools.speed.whole import predict_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    options = parse(arguments)
    if options.compile:
        compile_all()
    if options.page:
        write_page()
        return 0
    if options.beside is not None:
        environment, workloads = options.beside
        gpu = gpu_of(environment["device"], environment.get("multiprocessors"))
        for each in workloads:
            print(f"{beside(each, gpu)}\n")
        print(f"The model is wrong if\n{falsifiers()}")
        return 0
    predict = predict_whole
    if options.chunks:
        from tools.speed.chunks import predict_chunks as predict
    heads = list(dict.fromkeys(["DENSE", *options.heads]))
    what = (options.images, options.gpu, options.tokens, heads, options.shape)
    how = "in chunks" if options.chunks else "the whole prompt at once"
    print(
        f"MODEL, not measured: one layer of {options.shape} on {options.gpu}, images of "
        f"{options.images} tokens, {how}\n"
    )
    print(predictions_table(predict, *what))
    print(f"\nThe model is wrong if\n{falsifiers()}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program if it asks for what cannot be."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.speed_model", description=description)
    shapes = [name for name, shape in SHAPES.items() if is_modelled(shape)]
    of_prediction = [
        parser.add_argument("--gpu", choices=[*TARGETS, *RELATIVES], help="(h200)"),
        parser.add_argument("--shape", choices=shapes, help="whose heads (qwen2.5-vl-7b)"),
        parser.add_argument(
            "--tokens", type=_above_zero, nargs="+", help="in units of 1024 (36 75 150 300)"
        ),
        parser.add_argument(
            "--images", type=_above_zero, help="tokens of an image (400; Gemma 3: 256)"
        ),
        parser.add_argument("--heads", choices=MASK_NAMES, nargs="+"),
        parser.add_argument(
            "--chunks",
            action="store_true",
            default=None,
            help="in chunks, as bsjax.generate runs it, not at once",
        ),
    ]
    parser.add_argument("--page", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument(
        "--beside",
        type=_benchmark,
        metavar="FILE",
        help="predictions beside what benchmarks.attention has measured, from its JSON file",
    )
    parser.add_argument("--compile", action="store_true", help="compile all kernels first")
    options = parser.parse_args(arguments)
    alone = "--page" if options.page else "--beside" if options.beside else None
    for each in of_prediction:
        if alone and getattr(options, each.dest) is not None:
            parser.error(f"{alone} and {each.option_strings[0]} exclude each other.")
    if options.page and options.beside:
        parser.error("--page and --beside exclude each other.")
    options.gpu = options.gpu or "h200"
    options.shape = options.shape or "qwen2.5-vl-7b"
    options.tokens = options.tokens or THOUSANDS
    options.heads = options.heads or MASKS
    sizes = SHAPES[options.shape].image_tokens
    if options.images and len(sizes) == 1 and options.images not in sizes:
        parser.error(f"Every image of {options.shape} has {sizes[0]} tokens, not {options.images}.")
    options.images = options.images or sizes[0]
    text = TEXT_TOKENS.get(options.images, OTHER_TEXT_TOKENS) + LAST_TEXT_TOKENS
    shortest = 1024 * min(options.tokens)
    if options.images + text > shortest:
        parser.error(f"A prompt of {shortest} tokens has no room for an image of {options.images}.")
    return options


def _above_zero(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _benchmark(text: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and workloads of a result of `benchmarks.attention`."""
    try:
        content = json.loads(Path(text).read_text(encoding="utf-8"))
        return content["environment"], content["workloads"]
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot read {text}: {error.strerror}") from error
    except (ValueError, TypeError, KeyError):
        raise argparse.ArgumentTypeError(
            f"{text} is not a result of benchmarks.attention: it is damaged, or of another program"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
