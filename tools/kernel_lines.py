"""The lines of docs/kernels.md: which kernels are compiled, and how Pallas' are described."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bsjax.gpu.configurations import KernelConfiguration
from bsjax.gpu.decode_configurations import decode_configuration
from tools.compiled_kernels import compile_decode, compile_prefill, default_prefill
from tools.gpu_targets import TARGETS, GpuTarget, KernelReport
from tools.sass import KINDS, attention_loops, mix

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"

_GPUS = ("a100", "l40s", "h200", "b200")


class Case(NamedTuple):
    """A prefill kernel that must compile without spilling."""

    gpu: str
    """A key of `gpu_targets.TARGETS`."""
    head_dim: int
    dtype: str
    sparse: bool = True
    """Whether to use the table's block sizes for sparse or for dense launches."""

    def __str__(self) -> str:
        heads = "sparse" if self.sparse else "dense"
        return f"{self.gpu}-{self.head_dim}-{self.dtype}-{heads}"


def matrix(
    default_prefill: Callable[..., KernelConfiguration] = default_prefill,
) -> list[Case]:
    """Every architecture, head width and element size, and cases that compile differently.

    Args:
      default_prefill: the configurations of the Pallas or of the Triton kernel.
    """
    cases = [
        Case(gpu, head_dim, dtype)
        for gpu in _GPUS
        for head_dim in (64, 80, 128, 256)
        for dtype in ("bfloat16", "float32")
    ]
    cases += [Case("h200", 72, dtype) for dtype in ("bfloat16", "float32")]
    cases += [Case("h200", 128, "float16")]
    dense = [case._replace(sparse=False) for case in cases]
    return cases + [
        case
        for case in dense
        if default_prefill(*case[:3], sparse=False) != default_prefill(*case[:3], sparse=True)
    ]


DECODE_MATRIX = [(gpu, 128, dtype) for gpu in _GPUS for dtype in ("bfloat16", "float32")] + [
    ("h200", 256, "bfloat16")
]
"""(GPU, head dim, dtype) of the decode kernels on the page."""


GRADIENT_MATRIX = [
    (gpu, head_dim, dtype)
    for gpu in _GPUS
    for head_dim in (64, 80, 128, 256)
    for dtype in ("bfloat16", "float32")
] + [("h200", 72, "bfloat16"), ("h200", 72, "float32"), ("h200", 128, "float16")]
"""(GPU, head dim, dtype) of the kernels of the gradients on the page."""


def compile_case(case: Case) -> KernelReport:
    """Compiles a case and returns the report on its Pallas kernel."""
    return compile_prefill(case.gpu, case.head_dim, case.dtype, sparse=case.sparse)


def row(case: Case, report: KernelReport) -> list[str]:
    """A case's line in the table of Pallas kernels."""
    return [*name(case), *figures_of(report, TARGETS[case.gpu])]


def name(case: Case) -> list[str]:
    """The first columns of a case's line, which say what Pallas kernel it is."""
    return line_name(case, default_prefill(*case[:3], sparse=case.sparse), gpu_name(case.gpu))


def line_name(case: Case, chosen: KernelConfiguration, gpu: str) -> list[str]:
    """The first columns of the line of a kernel with this configuration."""
    return [
        gpu,
        str(case.head_dim),
        case.dtype,
        "sparse" if case.sparse else "dense",
        f"{chosen.block_q} x {chosen.block_kv}, {chosen.num_warps}, {chosen.num_stages}",
    ]


def gpu_name(name: str) -> str:
    """How tables call a GPU of `gpu_targets.TARGETS`."""
    target = TARGETS[name]
    return f"{target.device_kind.removeprefix('NVIDIA ')} ({target.architecture})"


def figures_of(report: KernelReport, target: GpuTarget) -> list[str]:
    """The columns that follow those of the name."""
    instructions = mix(attention_loops(report.sass)[0])
    return [
        str(report.registers),
        str(report.spilled),
        f"{report.shared_memory:,}",
        str(report.resident(target)),
        *(str(instructions[kind]) for kind in (*KINDS, "other")),
    ]


def decode_row(gpu: str, head_dim: int, dtype: str) -> list[str]:
    """A Pallas decode kernel's line in the table."""
    report = compile_decode(gpu, head_dim, dtype)["decode_attention"]
    chosen = ", ".join(map(str, decode_configuration(head_dim, dtype)))
    return [gpu_name(gpu), str(head_dim), dtype, chosen, *figures_of(report, TARGETS[gpu])]
