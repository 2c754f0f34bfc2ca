"""What the model of speed takes for granted: all of its inputs but the code and the schedules.

Figures of data sheets, published measurements, two numbers that are fitted to a published
measurement (`ISSUE`, `PROGRAM_CYCLES`), and assumptions that a first run on a GPU can replace.
"""

from typing import NamedTuple

from tools.gpu_targets import TARGETS


class Rates(NamedTuple):
    """What one GPU can do. Cycles are those of a multiprocessor.

    Attributes:
      multiprocessors: how many there are.
      clock: cycles per second at which the data sheet's rate of tensor cores is reached. Under load
        a GPU may run slower; that changes all times alike, and no speed-up.
      tensor: FLOPs per cycle of one multiprocessor's tensor cores, 16-bit inputs, float32 sums.
      l2: bytes per cycle that one multiprocessor reads from L2 while all do.
      memory: bytes per cycle and multiprocessor that the GPU's memory delivers.
    """

    multiprocessors: int
    clock: float
    tensor: int
    l2: float
    memory: float


# FLOPs per cycle and multiprocessor of 16-bit tensor cores, and all of them per second: from
# NVIDIA's data sheets and architecture white papers, without sparsity.
_TENSOR = {
    "a100": (2048, 312e12),
    "l40s": (1024, 362e12),
    "rtx4090": (512, 165.2e12),
    "h100": (4096, 989.4e12),
    "h200": (4096, 989.4e12),
    "b200": (8192, 2250e12),
}

# Bytes per cycle of all multiprocessors together: assumed to be three fifths of the 5,120 that
# NVIDIA states for the A100, and less on the L40S and the RTX 4090.
_L2 = {"a100": 3072, "l40s": 2048, "rtx4090": 2048, "h100": 3072, "h200": 3072, "b200": 3072}


class Relative(NamedTuple):
    """A GPU of the same chip as another one, whose kernels it runs.

    Attributes:
      device_kind: what it calls itself.
      of: the other one, a key of `gpu_targets.TARGETS`.
      multiprocessors: how many it has.
      all_tensor: FLOPs per second of its 16-bit tensor cores, from NVIDIA's data sheet, without
        sparsity.
      memory_bandwidth: bytes per second, from the data sheet.
    """

    device_kind: str
    of: str
    multiprocessors: int
    all_tensor: float
    memory_bandwidth: float


RELATIVES = {
    "a100-40gb": Relative("NVIDIA A100-SXM4-40GB", "a100", 108, 312e12, 1.555e12),
    "a100-pcie-40gb": Relative("NVIDIA A100-PCIE-40GB", "a100", 108, 312e12, 1.555e12),
    "a100-pcie-80gb": Relative("NVIDIA A100 80GB PCIe", "a100", 108, 312e12, 1.935e12),
    "h100-pcie": Relative("NVIDIA H100 PCIe", "h100", 114, 756e12, 2.0e12),
    "h100-nvl": Relative("NVIDIA H100 NVL", "h100", 132, 835e12, 3.9e12),
    "gh200": Relative("NVIDIA GH200 480GB", "h100", 132, 989.4e12, 4.0e12),
    "gh200-144gb": Relative("NVIDIA GH200 144G HBM3e", "h200", 132, 989.4e12, 4.9e12),
}
"""Other GPUs that the model knows. What they do per cycle is what their chip does."""

MEMORY_SHARE = 0.9
"""What a long read gets of the data sheet's bandwidth."""


def rates_of(gpu: str) -> Rates:
    """The rates of a GPU in `gpu_targets.TARGETS` or in `RELATIVES`."""
    chip = RELATIVES[gpu].of if gpu in RELATIVES else gpu
    tensor, all_tensor = _TENSOR[chip]
    cores, bandwidth = TARGETS[chip].cores, float(TARGETS[chip].memory_bandwidth)
    if gpu in RELATIVES:
        _, _, cores, all_tensor, bandwidth = RELATIVES[gpu]
    clock = all_tensor / tensor / cores
    memory = MEMORY_SHARE * bandwidth / clock / cores
    return Rates(cores, clock, tensor, _L2[chip] / cores, memory)


SCHEDULERS = 4
"""Warp instructions per cycle that a multiprocessor can issue at most (CUDA programming guide)."""

EXPONENTIALS = 16
"""Special functions per cycle and multiprocessor (CUDA programming guide)."""

L2_LATENCY = 270
"""Cycles until a read from L2 returns.

An L40 takes 222 to 339, by multiprocessor, about 279 on average (arXiv:2606.22588). Assumed to be
alike on all GPUs, and under load.
"""

PRODUCT_LATENCY = 16
"""Cycles from the end of the last product on tensor cores until waiting warps go on (assumed)."""

# Triton's tutorial kernel for attention on an H100, head dimension 128, no mask, 2,048 programs of
# 128 rows: TFLOP/s by the number of keys (pytorch/benchmark, pull request 2391). It has the
# structure of our Pallas kernel on Hopper: wgmma, copies ahead, no warp specialization.
#
# In 16 waves of 132 programs, each program then takes 7,546 cycles and another 2,030 for every 64
# keys: these two numbers give all six rates within 2 %.
ANCHOR = {512: 328.9, 1024: 389.7, 2048: 433.7, 4096: 458.4, 8192: 470.7, 16384: 476.8}

ISSUE = 0.49
"""Warp instructions issued per cycle and scheduler by a program that is alone and does not wait.

Fitted: with it, a full block of the Pallas kernel takes the 2,030 cycles of `ANCHOR` on an H100.
"""

SHARED_ISSUE = 0.8
"""The same while several programs are resident, and some of them can always go on (assumed)."""

PROGRAM_CYCLES = 5000
"""Cycles of one program beside its instructions: launching it, and reads that wait for each other.

Fitted: of the 7,546 cycles of `ANCHOR`, a kernel like it has instructions for about 2,500 outside
of its loop.
"""

EMPTY_CYCLES = 1000
"""Cycles of a program that finds no rows and ends: its launch, and two reads from L2 (assumed)."""
