"""Times configurations of a prefill kernel, Pallas' or Triton's, on this machine's GPU.

    python3 -m tools.tune --kernel triton --head-dims 128 --dtypes bfloat16 --time-limit 540

For every head dimension, dtype and kind of heads (all DENSE, or all INTRA_IMAGE_SINK), the kernel
is compiled with every configuration of a grid. Configurations that do not compile (for instance
because they need too much shared memory) or give wrong results are dropped; the others are timed,
interleaved. Spilling is not checked, because it shows in the time. Prints the fastest
configurations and writes every sample as JSON. `--write-table` puts the fastest ones into the
kernel's configurations.json, in bsjax/pallas or bsjax/triton.

Needs only JAX for CUDA and NumPy, and jax-triton for Triton's kernel.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.attention_arrays import Arrays, random_arrays
from benchmarks.dense_rows import greatest_error, tolerance
from benchmarks.device_timing import jax_sampler, repeated, repeats_for
from benchmarks.kernels import problem_of
from benchmarks.measure import RESULTS, interleaved_samples, markdown_table, write_result
from benchmarks.variants import wanted_rows
from benchmarks.workloads import AttentionShape, HeadMask, Workload
from bsjax.attention import GPU_KERNELS
from bsjax.gpu.configurations import KernelConfiguration, table_width, target_in_use
from bsjax.masks.schedule import build_schedule, category_tables
from tools.configuration_table import table_of, write_table

KINDS = {"dense": "DENSE", "sparse": "INTRA_IMAGE_SINK"}
BLOCKS_Q = (64, 128, 256)
BLOCKS_KV = (16, 32, 64, 128)
WARPS = (4, 8, 16)
STAGES = (1, 2, 3, 4)
# The most elements of scores and output per thread; with more, a kernel is certain to spill.
_MOST_ELEMENTS_PER_THREAD = 256


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    started = time.monotonic()
    options = parse(arguments)
    deadline = started + options.time_limit
    results: list[dict[str, Any]] = []
    path = None
    for head_dim, dtype, kind in itertools.product(
        options.head_dims, options.dtypes, options.kinds
    ):
        if time.monotonic() > deadline:
            print(f"Not run, out of time: head dim {head_dim}, {dtype}, {kind}.")
            continue
        results.append(tune(head_dim, dtype, kind, options, deadline))
        print(f"\n{render(results[-1])}", flush=True)
        record = {"kernel": options.kernel, "results": results}
        path = write_result(f"tune_{options.kernel}", record, options.output)
    if options.write_table:
        print(f"entries written to {write_fastest(options.kernel, results)}")
    if path is not None:
        print(f"written to {path}")
    return 0 if path is not None else 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; ends the program if it cannot do what that says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kernel", choices=GPU_KERNELS, default="pallas")
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 80, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--blocks-q", type=int, nargs="+", default=BLOCKS_Q)
    parser.add_argument("--blocks-kv", type=int, nargs="+", default=BLOCKS_KV)
    parser.add_argument("--warps", type=int, nargs="+", default=WARPS)
    parser.add_argument("--stages", type=int, nargs="+", default=STAGES)
    parser.add_argument("--tokens", type=int, default=36 * 1024)
    parser.add_argument("--image-tokens", type=int, default=400)
    parser.add_argument("--heads", type=int, nargs=2, default=(28, 4), metavar=("Q", "KV"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument(
        "--interpret",
        action="store_true",
        help="interpret the kernel, on any machine, for tests (triton: TRITON_INTERPRET=1)",
    )
    parser.add_argument(
        "--write-table", action="store_true", help="put the fastest configurations into the table"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the JSON file")
    options = parser.parse_args(arguments)
    problem = problem_of(options.kernel)
    if problem is not None:
        parser.error(problem)
    if jax.default_backend() != "gpu":
        if not options.interpret:
            parser.error("JAX finds no GPU. For tests, --interpret runs the kernel on any machine.")
        if options.write_table:
            parser.error("--write-table needs times of a GPU.")
    return options


def grid(options: argparse.Namespace, head_dim: int) -> list[KernelConfiguration]:
    """Configurations whose scores and output can fit into the registers of their threads."""
    padded_dim = max(64, 1 << (head_dim - 1).bit_length())
    candidates = itertools.starmap(
        KernelConfiguration,
        itertools.product(options.blocks_q, options.blocks_kv, options.warps, options.stages),
    )
    return [
        each
        for each in candidates
        if each.block_q * (each.block_kv + padded_dim)
        <= _MOST_ELEMENTS_PER_THREAD * 32 * each.num_warps
    ]


def tune(
    head_dim: int, dtype: str, kind: str, options: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """Checks and times every configuration of one head dimension, dtype and kind."""
    q_heads, kv_heads = options.heads
    shape = AttentionShape("tuned", q_heads, kv_heads, head_dim, dtype)
    workload = Workload(shape, options.tokens, options.image_tokens)
    mask = workload.masks([KINDS[kind]])[0]
    arrays = random_arrays(workload)
    entries: list[dict[str, Any]] = []
    samplers = {}
    for index, configuration in enumerate(grid(options, head_dim)):
        entry: dict[str, Any] = {"configuration": configuration._asdict(), "problem": None}
        entries.append(entry)
        if time.monotonic() > deadline:
            entry["problem"] = "not run, out of time"
            continue
        try:
            attend = _attention(options.kernel, head_dim**-0.5, configuration, options.interpret)
            samplers[index] = _sampler(workload, mask, arrays, configuration, attend)
        except Exception as error:  # The compiler's message is this configuration's result.
            first_line = (str(error).strip() or "no message").splitlines()[0]
            entry["problem"] = f"{type(error).__name__}: {first_line[:200]}"
    samples = interleaved_samples(samplers, options.rounds, deadline)
    for index, seconds in samples.items():
        entries[index] |= {"seconds": seconds, "median_seconds": statistics.median(seconds)}
    return {
        "head_dim": head_dim,
        "dtype": dtype,
        "kind": kind,
        "mask": mask.description,
        "tokens": workload.tokens,
        "image_tokens": workload.image_tokens,
        "visible_flops": workload.flops(workload.visible_pairs(mask)),
        "entries": entries,
    }


def _attention(
    kernel: str, scale: float, configuration: KernelConfiguration, interpret: bool
) -> Callable[..., Any]:
    """The output of a kernel that is compiled so, as a function of all arrays."""
    options: dict[str, Any] = {"scale": scale, "configuration": configuration}
    if kernel == "pallas":
        from bsjax.pallas import prefill as pallas

        return functools.partial(pallas.prefill_attention, **options, interpret=interpret)
    from bsjax.triton import prefill as triton

    return lambda *arrays: triton.prefill_attention(*arrays, **options)[0]


def _sampler(
    workload: Workload,
    mask: HeadMask,
    arrays: Arrays,
    configuration: KernelConfiguration,
    attend: Callable[..., Any],
) -> Any:
    """Compiles and checks one configuration.

    Raises:
      ValueError: its output is wrong.
    """
    schedule = build_schedule(
        workload.template,
        category_tables(mask.categories),
        block_q=configuration.block_q,
        block_kv=configuration.block_kv,
    )
    operands = (
        arrays.q,
        arrays.k,
        arrays.v,
        *jax.device_put((schedule, np.asarray(mask.categories, np.int32))),
    )
    rows = np.linspace(0, workload.tokens - 1, 32).astype(np.int64)
    out = np.asarray(jax.jit(attend)(*operands)[rows].astype(np.float32))
    wanted = wanted_rows(workload, mask, arrays, np.asarray(schedule.queries.position), rows)
    error, limit = greatest_error(out, wanted), tolerance(workload.shape.dtype)
    if not error <= limit:
        raise ValueError(f"wrong: error {error:.1e}, {limit:.1e} allowed")
    repeats = repeats_for(workload.flops(workload.visible_pairs(mask)))
    looped = jax.jit(repeated(attend, repeats))
    return jax_sampler(lambda: looped(*operands), repeats)


def fastest(result: dict[str, Any]) -> dict[str, Any] | None:
    """The table's entry for the fastest configuration; None if nothing ran."""
    timed = [entry for entry in result["entries"] if "median_seconds" in entry]
    if not timed:
        return None
    best = min(timed, key=lambda entry: entry["median_seconds"])
    return {
        "target": target_in_use(),
        "width": table_width(result["head_dim"]),
        "bytes": np.dtype(jax.numpy.dtype(result["dtype"])).itemsize,
        "heads": result["kind"],
        **best["configuration"],
        "basis": "measured",
    }


def write_fastest(kernel: str, results: Sequence[dict[str, Any]]) -> Path:
    """Puts the fastest configuration of each result into the kernel's table; returns its path."""
    table = table_of(kernel)
    write_table([entry for result in results if (entry := fastest(result)) is not None], table)
    return table


def render(result: dict[str, Any], shown: int = 10) -> str:
    """The fastest configurations as Markdown, and the problems of the others."""
    timed = [entry for entry in result["entries"] if "median_seconds" in entry]
    timed.sort(key=lambda entry: entry["median_seconds"])
    rows = [
        (
            ", ".join(f"{name} {value}" for name, value in entry["configuration"].items()),
            f"{1e3 * entry['median_seconds']:.3f}",
            f"{result['visible_flops'] / entry['median_seconds'] / 1e12:.4g}",
        )
        for entry in timed[:shown]
    ]
    problems = sorted({entry["problem"] for entry in result["entries"] if entry["problem"]})
    return "\n".join(
        [
            f"### head dim {result['head_dim']}, {result['dtype']}, {result['kind']} "
            f"({result['mask']}, {result['tokens']} tokens)",
            "",
            markdown_table(("configuration", "ms", "TFLOP/s visible"), rows),
            "",
            f"{len(timed)} of {len(result['entries'])} configurations ran.",
            *(f"- {problem}" for problem in problems[:shown]),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
