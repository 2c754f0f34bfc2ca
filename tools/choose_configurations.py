"""Chooses the prefill kernel's configurations by compiling candidates, without a GPU.

    python -m tools.choose_configurations pallas --target sm_90

Every candidate is compiled for the target, and its machine code is read. Candidates that spill
registers or do not fit into shared memory are dropped. The others are ranked by an estimate of the
cycles that a visible pair takes on one multiprocessor:

    issue    instructions in a block's loop, divided by the four schedulers
    tensor   multiply-adds of a block, divided by the rate of the tensor cores
    special  exponentials of a block, at 16 per cycle
    memory   bytes of a block's keys and values, divided by a multiprocessor's share of the L2
             bandwidth
    block    the maximum of these, or the time of one program if too few are resident to overlap:
             (tensor + max(issue, special)) / resident programs
    pair     time of the full and partial blocks of reference schedules, each with its own loop,
             divided by the number of visible pairs

Which candidates spill depends on the version of JAX, or of Triton. An entry must pass the test
suite with the oldest and the newest supported version; the table has the best candidate that does.

The estimate serves only to rank candidates; it does not predict speed. Entries that `tools.tune`
has measured are not changed.
"""

import argparse
import itertools
import sys
from typing import Any, NamedTuple

from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.schedule import build_schedule
from bsjax.masks.template import Image, Template, Text
from bsjax.pallas.configurations import TARGETS, WIDTHS, KernelConfiguration
from tools.compiled_kernels import prefill_kernel
from tools.configuration_table import table_of, write_table
from tools.gpu_targets import TARGETS as GPUS
from tools.gpu_targets import KernelReport
from tools.sass import attention_loops
from tools.speed.rates import EXPONENTIALS, SCHEDULERS, rates_of
from tools.triton_kernels import triton_prefill, triton_reports

GPU_OF = {"sm_80": "a100", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200"}

CANDIDATES = {
    2: list(itertools.product([(64, 4), (64, 8), (128, 8)], [32, 64], [2, 3])),
    4: list(itertools.product([(16, 4), (16, 8), (32, 4), (32, 8), (32, 16)], [16, 32], [2])),
}
"""By bytes per element: (block_q, num_warps), block_kv, num_stages."""


def _pallas_report(
    gpu: str, head_dim: int, dtype: str, candidate: KernelConfiguration
) -> KernelReport:
    return prefill_kernel(gpu, head_dim, dtype, chosen=candidate).report()


def _triton_report(
    gpu: str, head_dim: int, dtype: str, candidate: KernelConfiguration
) -> KernelReport:
    kernel = triton_prefill(gpu, head_dim, dtype, chosen=candidate)
    return triton_reports(kernel.function, kernel.arguments, gpu)["prefill_attention"]


COMPILE_PREFILL = {"pallas": _pallas_report, "triton": _triton_report}
"""By package of bsjax: the report on its kernel for a GPU, a head dimension and a dtype."""


class Work(NamedTuple):
    """The number of blocks that a schedule visits, and of pairs that a head sees."""

    full_blocks: int
    partial_blocks: int
    pairs: int


def reference_work(block_q: int, block_kv: int, *, sparse: bool) -> Work:
    """The work of two prompts of 36K tokens: 90 images of 400 and 36 of 1000."""
    groups = HeadCategory.INTRA_IMAGE_SINK.groups if sparse else ALL_KEY_GROUPS
    full = partial = pairs = 0
    for images, image_tokens in ((90, 400), (36, 1000)):
        template = Template.from_segments([Text(8), Image(image_tokens)] * images)
        tiles = build_schedule(template, [groups], block_q=block_q, block_kv=block_kv).tiles
        full += int(tiles.full_blocks.sum())
        partial += int(tiles.partial_blocks.sum())
        pairs += visible_pairs(template, groups)
    return Work(full, partial, pairs)


def cycles_per_pair(
    report: KernelReport,
    candidate: KernelConfiguration,
    target: str,
    width: int,
    itemsize: int,
    work: Work,
) -> float:
    """The estimate that candidates are ranked by."""
    loops = [len(loop) for loop in attention_loops(report.sass)]
    full_loop, partial_loop = loops[0], loops[min(1, len(loops) - 1)]
    rates = rates_of(GPU_OF[target])
    pairs = candidate.block_q * candidate.block_kv
    # Float32 products do not use the tensor cores; their instructions are counted.
    tensor = 4 * pairs * width / rates.tensor if itemsize == 2 else 0.0
    special = pairs / EXPONENTIALS
    memory = 2 * candidate.block_kv * width * itemsize / rates.l2
    resident = report.resident(GPUS[GPU_OF[target]])

    def block(instructions: int) -> float:
        issue = instructions * candidate.num_warps / SCHEDULERS
        alone = (tensor + max(issue, special)) / resident
        return max(issue, tensor, special, memory, alone)

    total = work.full_blocks * block(full_loop) + work.partial_blocks * block(partial_loop)
    return total / work.pairs


def fits(candidate: KernelConfiguration, target: str, width: int, itemsize: int) -> bool:
    """Whether queries, keys and values alone fit into shared memory, with some room to spare."""
    rows = candidate.block_q + 2 * candidate.num_stages * candidate.block_kv
    return rows * width * itemsize <= GPUS[GPU_OF[target]].shared_memory_per_block - 2048


def choose(package: str, target: str, width: int, itemsize: int) -> list[dict[str, Any]]:
    """The table entries for heads of one width: one for dense and one for sparse launches."""
    compile_prefill = COMPILE_PREFILL[package]
    compiled: list[tuple[KernelConfiguration, KernelReport]] = []
    for (block_q, warps), block_kv, stages in CANDIDATES[itemsize]:
        candidate = KernelConfiguration(block_q, block_kv, warps, stages)
        if not fits(candidate, target, width, itemsize):
            continue
        dtype = "bfloat16" if itemsize == 2 else "float32"
        try:
            # Head dim 72 shares the entry of 80, but needs masks that 80 does not.
            reports = [
                compile_prefill(GPU_OF[target], head_dim, dtype, candidate)
                for head_dim in ((80, 72) if width == 80 else (width,))
            ]
        except Exception as error:  # What does not compile is not a candidate.
            print(f"  {candidate}: {str(error)[:80]}", file=sys.stderr)
            continue
        limit = GPUS[GPU_OF[target]].shared_memory_per_block
        if all(report.spilled == 0 and report.shared_memory <= limit for report in reports):
            compiled.append((candidate, reports[0]))
    if not compiled:
        raise SystemExit(
            f"{target}, width {width}, {itemsize} bytes: every candidate spills or fails to compile"
        )
    entries = []
    for heads in ("dense", "sparse"):
        ranked = sorted(
            (
                (
                    cycles_per_pair(
                        report,
                        candidate,
                        target,
                        width,
                        itemsize,
                        reference_work(
                            candidate.block_q, candidate.block_kv, sparse=heads == "sparse"
                        ),
                    ),
                    candidate,
                    report,
                )
                for candidate, report in compiled
            ),
            key=lambda item: item[0],
        )
        # Estimates this close count as equal; more blocks in flight hide more latency.
        close = [item for item in ranked if item[0] <= 1.02 * ranked[0][0]]
        best = max(close, key=lambda item: item[1].num_stages)
        for estimate, candidate, report in ranked[:5]:
            print(
                f"{target} {width} {itemsize} {heads}: {estimate:.4f} {tuple(candidate)} "
                f"{report.registers} registers, {report.resident(GPUS[GPU_OF[target]])} resident"
            )
        entries.append(
            {
                "target": target,
                "width": width,
                "bytes": itemsize,
                "heads": heads,
                **best[1]._asdict(),
                "basis": "compiled",
            }
        )
    return entries


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", choices=COMPILE_PREFILL, help="whose table is written")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="default: all")
    parser.add_argument("--bytes", type=int, choices=(2, 4), action="append", help="default: both")
    options = parser.parse_args()
    for target in options.target or TARGETS:
        for itemsize in options.bytes or (2, 4):
            for width in options.width or WIDTHS:
                entries = choose(options.package, target, width, itemsize)
                write_table(entries, table_of(options.package))


if __name__ == "__main__":
    main()
