"""The compiled prefill kernels, as far as the model of speed needs them, in kernels.json.

The file is written by `python -m tools.speed_model --compile`, which takes minutes and needs the
packages that compile for absent GPUs. Reading it needs neither, so that `tools.gpu_check` can print
predictions wherever a GPU is.
"""

import functools
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bsjax.gpu.configurations import KernelConfiguration
from tools.gpu_targets import TARGETS, KernelReport
from tools.sass import loops_over_blocks, opcodes
from tools.speed.loops import Loop, alone, loop_of, shared
from tools.speed.rates import ISSUE, PROGRAM_CYCLES, RELATIVES, SCHEDULERS, rates_of

FIGURES = Path(__file__).with_name("kernels.json")

Key = tuple[str, str, int, bool]
"""Package, GPU, head dimension, and whether for sparse heads."""

PACKAGES = ("pallas", "triton")
GPUS = ("a100", "l40s", "h200", "b200")
HEAD_DIMS = (128, 256)
"""Of language models. All kernels of the model are for bfloat16."""

_COMPILED_FOR = {"h100": "h200", "rtx4090": "l40s"}


def compiled_for(gpu: str) -> str:
    """The GPU of `GPUS` whose kernels a GPU of `rates.rates_of` runs."""
    chip = RELATIVES[gpu].of if gpu in RELATIVES else gpu
    return _COMPILED_FOR.get(chip, chip)


class Kernel(NamedTuple):
    """A compiled prefill kernel.

    Attributes:
      package: "pallas" or "triton".
      gpu: the GPU that it is compiled for, a key of `gpu_targets.TARGETS`.
      head_dim: channels per head.
      sparse: whether it is the table's kernel for sparse heads.
      chosen: how it is compiled.
      registers: of a thread.
      shared_memory: bytes of a program.
      resident: programs that a multiprocessor runs at the same time.
      outside: instructions of a warp outside of the loops.
      full: the loop over full blocks.
      partial: the loop over partial blocks.
    """

    package: str
    gpu: str
    head_dim: int
    sparse: bool
    chosen: KernelConfiguration
    registers: int
    shared_memory: int
    resident: int
    outside: int
    full: Loop
    partial: Loop


class Costs(NamedTuple):
    """Cycles of a kernel on one GPU.

    Attributes:
      full: of a full block, for a program that is alone on its multiprocessor.
      partial: of a partial block.
      program: of a program besides its blocks.
      crowding: how much of a multiprocessor a program needs all the time. If several programs need
        more than 1 together, they slow each other down.
      resident: programs that a multiprocessor runs at the same time.
    """

    full: float
    partial: float
    program: float
    crowding: float
    resident: int

    @property
    def speed(self) -> float:
        """How many programs' worth of work a full multiprocessor does at a time."""
        return min(float(self.resident), 1 / self.crowding)


def heads_per_key_head(head_dim: int) -> int:
    """Query heads that share a key head, in the language models that have this head dimension."""
    return 2 if head_dim == 256 else 7


def costs_of(kernel: Kernel, gpu: str, heads_per_key_head: int) -> Costs:
    """The costs of a kernel's blocks and programs."""
    rates, warps = rates_of(gpu), kernel.chosen.num_warps
    full = alone(kernel.full, warps, rates)
    return Costs(
        full,
        alone(kernel.partial, warps, rates),
        PROGRAM_CYCLES + kernel.outside * warps / SCHEDULERS / ISSUE,
        shared(kernel.full, warps, rates, heads_per_key_head) / full,
        kernel.resident,
    )


def kernel_of(
    package: str, gpu: str, head_dim: int, report: KernelReport, sparse: bool, chosen: Any
) -> Kernel:
    """The figures of a kernel, from the report on it.

    Raises:
      ValueError: the kernel reads keys and values in a way that the model cannot read.
    """
    # Some kernels have one loop for both kinds of blocks.
    full, partial = (loops_over_blocks(report.sass) * 2)[:2]
    flops = 4 * chosen.block_q * chosen.block_kv * head_dim
    names = opcodes(report.sass)
    loops = [loop_of(loop, chosen.num_warps, flops) for loop in (full, partial)]
    keys_and_values = 2 * chosen.block_kv * head_dim * 2
    if any(loop.copied_bytes < keys_and_values for loop in loops):
        raise ValueError(
            f"{package}, {gpu}, head dim {head_dim}: a loop does not copy its keys and values to "
            "shared memory asynchronously, and the model cannot say how long it waits for them."
        )
    return Kernel(
        package,
        gpu,
        head_dim,
        sparse,
        KernelConfiguration(*chosen),
        report.registers,
        report.shared_memory,
        report.resident(TARGETS[gpu]),
        len(names) - names.count("NOP") - len(full) - len(partial),
        *loops,
    )


def kernel(package: str, gpu: str, head_dim: int, *, sparse: bool) -> Kernel:
    """A kernel of kernels.json.

    Raises:
      KeyError: the file has no such kernel.
    """
    known = kernels()[1]
    key = (package, compiled_for(gpu), head_dim)
    # Where dense heads have no kernel of their own, they use that of sparse heads.
    return known[(*key, sparse)] if (*key, sparse) in known else known[(*key, True)]


@functools.cache
def kernels(
    path: Path = FIGURES,
) -> tuple[dict[str, str], dict[tuple[str, str, int, bool], Kernel]]:
    """The versions that kernels.json was made with, and its kernels."""
    content = json.loads(path.read_text(encoding="utf-8"))
    read = [
        Kernel(
            **{
                **entry,
                "chosen": KernelConfiguration(*entry["chosen"]),
                **{
                    name: Loop(tuple(map(tuple, events)), exponentials)
                    for name in ("full", "partial")
                    for events, exponentials in [entry[name]]
                },
            }
        )
        for entry in content["kernels"]
    ]
    return content["versions"], {(*each[:4],): each for each in read}


def compile_all(path: Path = FIGURES, told: Callable[[str], None] = print) -> None:
    """Compiles all kernels and writes kernels.json."""
    from tools import compiled_kernels, triton_kernels

    def pallas(gpu: str, head_dim: int, sparse: bool) -> KernelReport:
        return compiled_kernels.compile_prefill(gpu, head_dim, "bfloat16", sparse=sparse)

    def triton(gpu: str, head_dim: int, sparse: bool) -> KernelReport:
        compiled = triton_kernels.triton_prefill(gpu, head_dim, "bfloat16", sparse=sparse)
        reports = triton_kernels.triton_reports(compiled.function, compiled.arguments, gpu)
        return reports["prefill_attention"]

    roads = {
        "pallas": (pallas, compiled_kernels.default_prefill),
        "triton": (triton, triton_kernels.default_prefill),
    }
    found: list[Kernel] = []
    for package, (compiled, default) in roads.items():
        for gpu in GPUS:
            for head_dim in HEAD_DIMS:
                configurations = {}
                for sparse in (True, False):
                    chosen = default(gpu, head_dim, "bfloat16", sparse=sparse)
                    if chosen in configurations.values():
                        continue
                    configurations[sparse] = chosen
                    told(f"{package}, {gpu}, head dim {head_dim}, {tuple(chosen)}")
                    report = compiled(gpu, head_dim, sparse)
                    found.append(kernel_of(package, gpu, head_dim, report, sparse, chosen))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jax-triton", "triton")}
    lines = ",\n".join(f"  {json.dumps(each._asdict())}" for each in found)
    path.write_text(
        f'{{"versions": {json.dumps(versions)}, "kernels": [\n{lines}\n]}}\n', encoding="utf-8"
    )
    kernels.cache_clear()
