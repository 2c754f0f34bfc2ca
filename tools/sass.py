"""Reads machine code: the instructions in a kernel's loops."""

import re
from collections import Counter
from typing import NamedTuple

PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "DMMA", "IMMA")
"""Tensor core instructions: of Ampere and Ada, of Hopper, of Blackwell, and for dtypes that the
kernels do not use."""

KINDS = {
    "tensor": PRODUCTS,
    "float32": ("FFMA", "FMUL", "FADD", "FMNMX", "FSEL", "FSETP"),
    "special": ("MUFU",),
    "convert": ("F2F", "F2FP", "I2F"),
    "shared": ("LDS", "LDSM", "STS", "STSM"),
    "copy": ("LDGSTS", "UBLKCP", "UTMALDG"),
    "shuffle": ("SHFL",),
}
"""Instructions by purpose; all others are address and control arithmetic."""

_LABEL = re.compile(r"^(\.L\S+):")
_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)(\S*)\s*(.*)$"
)
_BRANCH_TARGET = re.compile(r"`\((\.L\S+?)\)")


class Instruction(NamedTuple):
    """One instruction, such as `@!P0 HGMMA.64x64x16.F32.BF16 R88, gdesc[UR12], RZ`."""

    name: str
    """Such as "HGMMA"."""
    modifiers: str
    """Such as ".64x64x16.F32.BF16"."""
    operands: str
    predicate: str
    """Such as "@!P0"; empty if all threads execute it."""


def opcodes(sass: str) -> list[str]:
    """The names of all instructions of a disassembled kernel, in order, such as "HGMMA", "FFMA"."""
    return [match.group(2) for line in sass.splitlines() if (match := _INSTRUCTION.match(line))]


def attention_loops(sass: str) -> list[list[str]]:
    """The names of the instructions of each of `loops_over_blocks`."""
    return [[each.name for each in loop] for loop in loops_over_blocks(sass)]


def loops_over_blocks(sass: str) -> list[list[Instruction]]:
    """The instructions of each loop over blocks of keys, shortest loop first.

    These loops are the innermost ones that evaluate exponentials, and that use tensor cores if the
    kernel does. The prefill kernel has two: the shorter is for full blocks, the longer for partial
    blocks.
    """
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in sass.splitlines():
        label = _LABEL.match(line)
        if label:
            labels[label.group(1)] = len(found)
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        predicate, name, modifiers, operands = match.groups()
        found.append(Instruction(name, modifiers, operands, (predicate or "").strip()))
        target = _BRANCH_TARGET.search(operands)
        if name == "BRA" and target and target.group(1) in labels:
            loops.append((labels[target.group(1)], len(found)))
    names = [each.name for each in found]
    on_tensor_cores = not set(PRODUCTS).isdisjoint(names)
    over_blocks = [
        (start, end)
        for start, end in loops
        if "MUFU" in names[start:end]
        and on_tensor_cores != set(PRODUCTS).isdisjoint(names[start:end])
    ]
    innermost = [
        (start, end)
        for start, end in over_blocks
        if not any(
            start <= other_start and other_end <= end and (start, end) != (other_start, other_end)
            for other_start, other_end in over_blocks
        )
    ]
    # On Blackwell, a pipelined loop is accompanied by short loops that fill the pipeline.
    exponentials = {loop: names[slice(*loop)].count("MUFU") for loop in innermost}
    most = max(exponentials.values(), default=0)
    over_blocks = [loop for loop in innermost if 2 * exponentials[loop] >= most]
    return sorted((found[start:end] for start, end in over_blocks), key=len)


def mix(instructions: list[str]) -> dict[str, int]:
    """The number of instructions of each kind in `KINDS`, and of all others ("other")."""
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    counted = Counter(kind_of.get(name, "other") for name in instructions)
    return {kind: counted[kind] for kind in (*KINDS, "other")}
