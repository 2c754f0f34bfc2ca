"""Chooses the prefill kernel's configurations by compiling candidates, without a GPU.

    python -m tools.choose_configurations pallas --target sm_90

Every candidate is compiled for the target. Candidates that spill registers or do not fit into
shared memory are dropped. Of the others, the model of speed (`tools.speed`, docs/speed.md) reads
the machine code: products that warps compute twice and copies that a loop waits for count with what
they cost. Candidates are ranked by the cycles that the model says for the full blocks, the partial
blocks and the programs of reference schedules, divided by the number of visible pairs.

The table's entry stays unless another candidate takes a tenth less, because nothing of the model is
measured. Entries that `tools.tune` has measured are not changed.

Which candidates spill depends on the version of JAX, or of Triton. An entry must pass the test
suite with the oldest and the newest supported version: exclude candidates that fail with another
version than the one that runs this command.

    python -m tools.choose_configurations pallas --target sm_89 --exclude 64,32,4,2
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from bsjax.gpu.configurations import TARGETS, WIDTHS, KernelConfiguration
from bsjax.masks.categories import ALL_KEY_GROUPS, HeadCategory
from bsjax.masks.query_rows import visible_pairs
from bsjax.masks.schedule import build_schedule
from bsjax.masks.template import Image, Template, Text
from bsjax.masks.visibility import CAUSAL, Visibility
from tools.compiled_kernels import prefill_kernel
from tools.configuration_table import read_table, table_of, write_table
from tools.gpu_targets import TARGETS as GPUS
from tools.gpu_targets import KernelReport
from tools.speed.kernels import Kernel, costs_of, heads_per_key_head, kernel_of

GPU_OF = {"sm_80": "a100", "sm_89": "l40s", "sm_90": "h200", "sm_100": "b200"}

CANDIDATES = {
    2: list(itertools.product([(64, 4), (64, 8), (128, 8)], [32, 64], [2, 3])),
    4: list(itertools.product([(16, 4), (16, 8), (32, 4), (32, 8), (32, 16)], [16, 32], [2])),
}
"""By bytes per element: (block_q, num_warps), block_kv, num_stages."""

CLEAR_GAIN = 0.9
"""The part of the present entry's time that another candidate must take at most."""


def _pallas_report(
    gpu: str, head_dim: int, dtype: str, candidate: KernelConfiguration, visibility: Visibility
) -> KernelReport:
    kernel = prefill_kernel(gpu, head_dim, dtype, chosen=candidate, visibility=visibility)
    return kernel.report()


def _triton_report(
    gpu: str, head_dim: int, dtype: str, candidate: KernelConfiguration, visibility: Visibility
) -> KernelReport:
    from tools.triton_kernels import triton_prefill, triton_reports

    kernel = triton_prefill(gpu, head_dim, dtype, chosen=candidate, visibility=visibility)
    return triton_reports(kernel.function, kernel.arguments, gpu)["prefill_attention"]


COMPILE_PREFILL = {"pallas": _pallas_report, "triton": _triton_report}
"""By package of bsjax: the report on its kernel for a GPU, a head dimension, a dtype and a
visibility."""


class Work(NamedTuple):
    """What a head of some schedules has: programs, blocks, and pairs that it sees."""

    programs: int
    full_blocks: int
    partial_blocks: int
    pairs: int


@functools.cache
def reference_work(block_q: int, block_kv: int, *, sparse: bool) -> Work:
    """The work of three prompts of 36K tokens: 140 images of 256, 90 of 400 and 36 of 1000."""
    groups = HeadCategory.INTRA_IMAGE_SINK.groups if sparse else ALL_KEY_GROUPS
    programs = full = partial = pairs = 0
    for images, image_tokens in ((140, 256), (90, 400), (36, 1000)):
        template = Template.from_segments([Text(8), Image(image_tokens)] * images)
        tiles = build_schedule(template, [groups], block_q=block_q, block_kv=block_kv).tiles
        programs += int((tiles.rows > 0).sum())
        full += int(tiles.full_blocks.sum())
        partial += int(tiles.partial_blocks.sum())
        pairs += visible_pairs(template, groups)
    return Work(programs, full, partial, pairs)


def cycles_per_pair(kernel: Kernel, *, sparse: bool) -> float:
    """The cycles of a multiprocessor that a pair takes, by the model of speed."""
    costs = costs_of(kernel, kernel.gpu, heads_per_key_head(kernel.head_dim))
    work = reference_work(kernel.chosen.block_q, kernel.chosen.block_kv, sparse=sparse)
    blocks = work.full_blocks * costs.full + work.partial_blocks * costs.partial
    return (blocks + work.programs * costs.program) / costs.speed / work.pairs


def best(
    estimates: Mapping[KernelConfiguration, float], present: KernelConfiguration
) -> KernelConfiguration:
    """The candidate that takes least, or the present one if none is clearly faster."""
    fastest = min(estimates, key=estimates.__getitem__)
    if present in estimates and estimates[fastest] > CLEAR_GAIN * estimates[present]:
        return present
    return fastest


def _variants(width: int) -> list[tuple[int, Visibility]]:
    """Head dimension and visibility of the kernels that must not spill; the first one is ranked."""
    if width == 80:
        # Head dim 72 shares the entry, but needs masks that 80 does not.
        return [(80, CAUSAL), (72, CAUSAL)]
    # The predicate of Gemma 3's local layers needs more registers.
    return [(width, CAUSAL), (width, Visibility(bidirectional_images=True, window=1024))]


def fits(candidate: KernelConfiguration, target: str, width: int, itemsize: int) -> bool:
    """Whether queries, keys and values alone fit into shared memory, with some room to spare."""
    rows = candidate.block_q + 2 * candidate.num_stages * candidate.block_kv
    return rows * width * itemsize <= GPUS[GPU_OF[target]].shared_memory_per_block - 2048


def choose(
    package: str,
    target: str,
    width: int,
    itemsize: int,
    excluded: frozenset[KernelConfiguration] = frozenset(),
) -> list[dict[str, Any]]:
    """The table entries for heads of one width: one for dense and one for sparse launches."""
    gpu = GPU_OF[target]
    entries = [
        entry
        for entry in read_table(table_of(package))
        if (entry["target"], entry["width"], entry["bytes"]) == (target, width, itemsize)
    ]
    present = {
        entry["heads"]: KernelConfiguration(*(entry[each] for each in KernelConfiguration._fields))
        for entry in entries
    }
    candidates = [
        KernelConfiguration(block_q, block_kv, warps, stages)
        for (block_q, warps), block_kv, stages in CANDIDATES[itemsize]
    ]
    compiled: list[Kernel] = []
    for candidate in dict.fromkeys([*present.values(), *candidates]):
        if candidate in excluded or not fits(candidate, target, width, itemsize):
            continue
        dtype = "bfloat16" if itemsize == 2 else "float32"
        try:
            reports = [
                COMPILE_PREFILL[package](gpu, head_dim, dtype, candidate, visibility)
                for head_dim, visibility in _variants(width)
            ]
            limit = GPUS[gpu].shared_memory_per_block
            if all(report.spilled == 0 and report.shared_memory <= limit for report in reports):
                compiled.append(kernel_of(package, gpu, width, reports[0], True, candidate))
        except Exception as error:  # What does not compile, or not as it should, is no candidate.
            print(f"  {candidate}: {str(error)[:80]}", file=sys.stderr)
    if not compiled:
        raise SystemExit(
            f"{target}, width {width}, {itemsize} bytes: every candidate spills or fails to compile"
        )
    for entry in entries:
        heads = entry["heads"]
        estimates = {
            kernel.chosen: cycles_per_pair(kernel, sparse=heads == "sparse") for kernel in compiled
        }
        for candidate in sorted(estimates, key=estimates.__getitem__)[:5]:
            there = ", present" if candidate == present[heads] else ""
            print(
                f"{target} {width} {itemsize} {heads}: {estimates[candidate]:.4f} "
                f"{tuple(candidate)}{there}"
            )
        entry |= best(estimates, present[heads])._asdict()
        entry["basis"] = "compiled"
    return entries


def _configuration(text: str) -> KernelConfiguration:
    return KernelConfiguration(*map(int, text.split(",")))


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", choices=COMPILE_PREFILL, help="whose table is written")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--width", type=int, choices=WIDTHS, action="append", help="default: all")
    parser.add_argument("--bytes", type=int, choices=(2, 4), action="append", help="default: both")
    parser.add_argument(
        "--exclude",
        type=_configuration,
        action="append",
        default=[],
        metavar="BLOCK_Q,BLOCK_KV,WARPS,STAGES",
        help="what fails with another version",
    )
    options = parser.parse_args()
    for target in options.target or TARGETS:
        for itemsize in options.bytes or (2, 4):
            for width in options.width or WIDTHS:
                excluded = frozenset(options.exclude)
                entries = choose(options.package, target, width, itemsize, excluded)
                write_table(entries, table_of(options.package))


if __name__ == "__main__":
    main()
