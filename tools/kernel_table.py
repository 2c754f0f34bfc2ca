"""Writes docs/kernels.md: what the assembler reports about every kernel.

    python -m tools.kernel_table

Compiles all kernels ahead of time, which needs no GPU.
"""

import argparse
import importlib.metadata
from collections.abc import Mapping
from pathlib import Path

import jax

from bsjax.gpu.configurations import KernelConfiguration
from bsjax.gpu.decode_configurations import decode_configuration
from tools import compiled_kernels, triton_kernels
from tools.gpu_targets import TARGETS, KernelReport
from tools.kernel_lines import (
    DECODE_MATRIX,
    GRADIENT_MATRIX,
    PAGE,
    Case,
    compile_case,
    decode_row,
    figures_of,
    gpu_name,
    line_name,
    matrix,
    row,
)
from tools.sass import KINDS, attention_loops
from tools.triton_kernels import (
    triton_decode,
    triton_gradients,
    triton_prefill,
    triton_reports,
)


def compile_triton_case(case: Case) -> KernelReport:
    """Compiles a case and returns the report on its Triton kernel."""
    kernel = triton_prefill(*case[:3], sparse=case.sparse)
    return triton_reports(kernel.function, kernel.arguments, case.gpu)["prefill_attention"]


def triton_row(case: Case, report: KernelReport) -> list[str]:
    """A case's line in the table of Triton kernels."""
    return [*triton_name(case), *figures_of(report, TARGETS[case.gpu])]


def triton_name(case: Case) -> list[str]:
    """The first columns of a case's line, which say what Triton kernel it is."""
    chosen = triton_kernels.default_prefill(*case[:3], sparse=case.sparse)
    return line_name(case, chosen, f"{gpu_name(case.gpu)}, Triton")


def side_by_side(
    pallas: dict[Case, KernelReport], triton: dict[Case, KernelReport]
) -> list[list[str]]:
    """The figures in which the kernels of both packages can be compared, case by case."""

    def figures(chosen: KernelConfiguration, report: KernelReport, gpu: str) -> list[str]:
        full, partial = (
            len(loop) * chosen.num_warps * 1024 / (chosen.block_q * chosen.block_kv)
            for loop in (attention_loops(report.sass) * 2)[:2]
        )
        resident = report.resident(TARGETS[gpu])
        rows = resident * chosen.block_q
        return [f"{full:.0f}", f"{partial:.0f}", str(report.registers), f"{resident} ({rows})"]

    return [
        [
            gpu_name(case.gpu),
            str(case.head_dim),
            case.dtype,
            *figures(compiled_kernels.default_prefill(*case[:3]), report, case.gpu),
            *figures(triton_kernels.default_prefill(*case[:3]), triton[case], case.gpu),
        ]
        for case, report in pallas.items()
        if case.sparse
    ]


def triton_decode_row(gpu: str, head_dim: int, dtype: str) -> list[str]:
    """A Triton decode kernel's line in the table."""
    kernel = triton_decode(gpu, head_dim, dtype)
    report = triton_reports(kernel.function, kernel.arguments, gpu)["decode_attention"]
    chosen = ", ".join(map(str, decode_configuration(head_dim, dtype)))
    figures = figures_of(report, TARGETS[gpu])
    return [f"{gpu_name(gpu)}, Triton", str(head_dim), dtype, chosen, *figures]


def gradient_rows(
    gpu: str, head_dim: int, dtype: str, reports: Mapping[str, KernelReport]
) -> list[list[str]]:
    """The lines of the kernels of the gradients."""
    chosen = triton_kernels.gradient_configurations(gpu, head_dim, dtype)
    return [
        [
            *gradient_name(gpu, head_dim, dtype, name, chosen[name]),
            *figures_of(report, TARGETS[gpu]),
        ]
        for name, report in reports.items()
    ]


def gradient_name(
    gpu: str, head_dim: int, dtype: str, name: str, chosen: KernelConfiguration
) -> list[str]:
    """The first columns of the line of a kernel of the gradients."""
    blocks = f"{chosen.block_q} x {chosen.block_kv}, {chosen.num_warps}, {chosen.num_stages}"
    return [
        f"{gpu_name(gpu)}, gradients",
        str(head_dim),
        dtype,
        name.removesuffix("_gradients"),
        blocks,
    ]


def compile_gradients(gpu: str, head_dim: int, dtype: str) -> dict[str, KernelReport]:
    """Compiles the kernels of the gradients; the reports on them, by name."""
    kernel = triton_gradients(gpu, head_dim, dtype)
    return triton_reports(kernel.function, kernel.arguments, gpu)


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with `columns` and the figures from the assembler."""
    return _markdown(
        [
            *columns,
            "registers",
            "spilled bytes",
            "shared memory",
            "programs per multiprocessor",
            *KINDS,
            "other",
        ],
        rows,
    )


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page() -> str:
    """The whole page, for which it compiles all kernels."""
    pallas = {case: compile_case(case) for case in matrix()}
    triton = {case: compile_triton_case(case) for case in matrix(triton_kernels.default_prefill)}
    gradients = [
        line for case in GRADIENT_MATRIX for line in gradient_rows(*case, compile_gradients(*case))
    ]
    prefill_columns = ["GPU", "head dim", "dtype", "heads", "block, warps, stages"]
    gradient_columns = ["GPU", "head dim", "dtype", "of", "block, warps, stages"]
    decode_columns = ["GPU", "head dim", "dtype", "keys per block, warps, stages"]
    compared = ["full", "partial", "registers", "programs (rows)"]
    columns = [f"{package} {figure}" for package in ("Pallas", "Triton") for figure in compared]
    return f"""# Kernels, as compiled

Generated by `python -m tools.kernel_table` with JAX {jax.__version__}, on a machine without a GPU.
XLA compiles for the GPUs in the table; NVIDIA's assembler and disassembler report the result.
The Triton kernels are those of Triton {_version("triton")} and jax-triton {_version("jax-triton")}.
Nothing here has been measured on a GPU.
An RTX 4090 has the configurations of the L40S, and an H100 those of the H200.
No kernel of these head dimensions spills registers; others, such as 160 and 192, may.

The last columns count the instructions of one thread in the loop over full blocks, by purpose:
products on tensor cores (none for float32 inputs, which are multiplied in float32 arithmetic),
float32 arithmetic, special functions (exponentials), conversions, reads and writes of shared
memory, asynchronous copies to shared memory, shuffles, and everything else. On Blackwell, tensor
cores read their operands from shared and tensor memory, and the loop is unrolled for the pipeline's
stages.

## Prefill

{table(prefill_columns, [row(*item) for item in pallas.items()])}

## Decode

One token against a cache of 36,864 rows, with 28 query heads and 4 key-value heads. Here, too,
float32 inputs are multiplied in float32 arithmetic.

{table(decode_columns, [decode_row(*case) for case in DECODE_MATRIX])}

## Prefill, in Triton

The kernels of `bsjax.triton`, which `backend="triton"` calls through jax-triton.

{table(prefill_columns, [triton_row(*item) for item in triton.items()])}

## Decode, in Triton

{table(decode_columns, [triton_decode_row(*case) for case in DECODE_MATRIX])}

## Gradients, in Triton

Two kernels compute the gradients of `sparse_attention`, whichever kernel computed the output: those
of queries walk the schedule, and those of keys and values the transposed schedule. Blocks are query
rows x keys.

{table(gradient_columns, gradients)}

## Pallas and Triton side by side

The prefill kernels of sparse launches: warp instructions for 1,024 pairs of a query and a key, in
the loops over full and over partial blocks, each kernel with the block sizes of its own table;
registers of a thread; programs that run on a multiprocessor at the same time, and the query rows
that they have together. They are much alike. `docs/speed.md` predicts about the same speed, except
for head dimension 256 on an A100, where it prefers Triton. But nothing has been measured, so
`backend="auto"` takes Pallas while JAX has it, and Triton where it does not.

{_markdown(["GPU", "head dim", "dtype", *columns], side_by_side(pallas, triton))}
"""


def _version(package: str) -> str:
    return importlib.metadata.version(package)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    output = parser.parse_args().output
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page())
    print(output)


if __name__ == "__main__":
    main()
