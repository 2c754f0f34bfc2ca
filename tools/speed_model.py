"""A MODEL of the speed of prefill attention on GPUs. Nothing that it prints is measured.

    python -m tools.speed_model                            # one layer on an H200, all lengths
    python -m tools.speed_model --gpu a100 --tokens 36 --images 1000 --chunks
    python -m tools.speed_model --page                     # the tables of docs/speed.md
    python -m tools.speed_model --compile                  # kernels.json, after kernels changed

From the compiled loops (instructions, products on tensor cores, waits, bytes, programs per
multiprocessor) and from real schedules (blocks of each tile, in the order in which programs start)
it predicts the time of a layer, and what of it is lost to what. `docs/speed.md` says how, and what
would prove it wrong.
"""

import argparse
import sys
from collections.abc import Sequence

from benchmarks.workloads import MASK_NAMES, SHAPES
from tools.gpu_targets import TARGETS
from tools.speed.comparison import FALSIFIERS
from tools.speed.kernels import compile_all
from tools.speed.page import MASKS, PAGE, THOUSANDS, predictions_table, write_page
from tools.speed.whole import predict_whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tools.speed_model", description=description)
    parser.add_argument("--gpu", choices=TARGETS, default="h200")
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-vl-7b", help="whose heads")
    parser.add_argument("--tokens", type=int, nargs="+", default=THOUSANDS, help="in units of 1024")
    parser.add_argument("--images", type=int, default=400, help="tokens of an image")
    parser.add_argument("--heads", choices=MASK_NAMES, nargs="+", default=MASKS)
    parser.add_argument(
        "--chunks", action="store_true", help="in chunks, as bsjax.generate runs it, not at once"
    )
    parser.add_argument("--page", action="store_true", help=f"write the tables of {PAGE.name}")
    parser.add_argument("--compile", action="store_true", help="compile all kernels first")
    options = parser.parse_args(arguments)
    if options.compile:
        compile_all()
    if options.page:
        write_page()
        return 0
    predict = predict_whole
    if options.chunks:
        from tools.speed.chunks import predict_chunks as predict
    heads = list(dict.fromkeys(["DENSE", *options.heads]))
    what = (options.images, options.gpu, options.tokens, heads, options.shape)
    print(f"MODEL, not measured: one layer of {options.shape} on {options.gpu}\n")
    print(predictions_table(predict, *what))
    print("\nThe model is wrong if\n" + "\n".join(f"- {each};" for each in FALSIFIERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
