"""What a compiled loop over blocks of keys does, and how many cycles a block takes.

The machine code of one iteration becomes a short list of events, in order: so many instructions, a
product on tensor cores, a wait for it, copies to shared memory, a wait for them. `alone` replays
them for a program that has a multiprocessor to itself. Waits that the code places too early show
there: a copy that is waited for at once costs its latency in every block. `shared` is what limits
several programs together.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from tools.sass import PRODUCTS, Instruction
from tools.speed.rates import (
    EXPONENTIALS,
    ISSUE,
    L2_LATENCY,
    PRODUCT_LATENCY,
    SCHEDULERS,
    SHARED_ISSUE,
    Rates,
)

Event = tuple[str, str, int]
"""What happens, to which group, how much:

("issue", "", n)         n instructions of each warp
("product", mode, n)     n FLOPs of the program on tensor cores; mode "wait" if a warp cannot go on
                         meanwhile, else "go on"
("products", group, 0)   the products so far are a group
("await products", g, n) until all but the last n groups g are done
("copies", "", n)        n bytes of the program on their way to shared memory are a group
("await copies", "", n)  until all but the last n groups of copies have arrived
"""

_ITERATIONS = 24


class Loop(NamedTuple):
    """One iteration: one block of keys."""

    events: tuple[Event, ...]
    exponentials: int
    """Special functions of each thread."""

    @property
    def instructions(self) -> int:
        """Of each warp."""
        return self._sum("issue")

    @property
    def flops(self) -> int:
        """On tensor cores, of the program."""
        return self._sum("product")

    @property
    def copied_bytes(self) -> int:
        """Read from L2 into shared memory, of the program."""
        return self._sum("copies")

    def _sum(self, kind: str) -> int:
        return sum(amount for what, _, amount in self.events if what == kind)


def loop_of(instructions: Sequence[Instruction], warps: int, block_flops: int) -> Loop:
    """Reads one iteration of a loop.

    Args:
      instructions: of the loop.
      warps: of a program.
      block_flops: FLOPs of a block, for tensor cores whose instructions do not say how many theirs
        are.

    Raises:
      ValueError: the loop copies by TMA, which this model does not read.
    """
    names = [each.name for each in instructions]
    unread = {"UTMALDG", "UBLKCP"} & set(names)
    if unread:
        raise ValueError(f"The loop uses {', '.join(sorted(unread))}, which the model cannot read.")
    blackwell = [_from_memory(each) for each in instructions if each.name == "UTCHMMA"]
    # Half of a block's FLOPs are queries times keys, the others weights times values. If only one
    # of the two takes its left side from tensor memory, that tells them apart.
    apart = len(set(blackwell)) == 2
    events: list[Event] = []
    issued = copied = 0

    def happens(*event: str | int) -> None:
        nonlocal issued
        events.append(("issue", "", issued))
        issued = 0
        events.append(event)  # type: ignore[arg-type]

    for each in instructions:
        issued += 1
        operands = [part.strip(" ;") for part in each.operands.split(",")]
        if each.name in PRODUCTS:
            if each.name == "UTCHMMA":
                among = blackwell.count(_from_memory(each)) if apart else len(blackwell)
                flops = block_flops // (among * (2 if apart else 1))
            else:
                flops = _flops(each) * (warps // 4 if each.name == "HGMMA" else warps)
            happens("product", "wait" if each.name == "HMMA" else "go on", flops)
            if "gsb0" in operands:
                happens("products", "wgmma", 0)
        elif each.name == "UTCBAR":
            happens("products", operands[0], 0)
        elif each.name == "SYNCS" and "PHASECHK" in each.modifiers:
            happens("await products", operands[1], 0)
        elif each.name == "WARPGROUP" and "DEPBAR" in each.modifiers:
            happens("await products", "wgmma", int(operands[1], 16))
        elif each.name == "LDGSTS":
            bits = re.search(r"\.(64|128)\b", each.modifiers)
            width = int(bits[1]) // 8 if bits else 4
            # Copies of single numbers per key are made by some of the threads only.
            copied += width * (32 * warps if width == 16 or not each.predicate else 64)
        elif each.name == "LDGDEPBAR":
            happens("copies", "", copied)
            copied = 0
        elif each.name == "DEPBAR" and operands[0] == "SB0":
            happens("await copies", "", int(operands[1], 16))
    events.append(("issue", "", issued))
    return Loop(_joined(_with_known_groups(events)), names.count("MUFU"))


def alone(loop: Loop, warps: int, rates: Rates) -> float:
    """Cycles of a block if the program has the multiprocessor to itself."""
    return _replayed(loop, warps, rates)[0]


def waits(loop: Loop, warps: int, rates: Rates) -> float:
    """Of the cycles of `alone`, those in which the program waits for copies and does nothing."""
    return _replayed(loop, warps, rates)[1]


def _replayed(loop: Loop, warps: int, rates: Rates) -> tuple[float, float]:
    """Cycles of a block, and those of them that are spent waiting for copies."""
    now = tensor = copying = 0.0
    waited = 0.0
    products: dict[str, list[float]] = {}
    copies: list[float] = []
    ends = []
    for _ in range(_ITERATIONS):
        for what, group, amount in loop.events:
            match what:
                case "issue":
                    now += amount * warps / SCHEDULERS / ISSUE
                case "product":
                    tensor = max(now, tensor) + amount / rates.tensor
                    if group == "wait":
                        now = tensor
                case "products":
                    products.setdefault(group, []).append(tensor + PRODUCT_LATENCY)
                case "await products":
                    done = products.get(group, [])
                    if len(done) > amount:
                        now = max(now, done[-1 - amount])
                case "copies":
                    copying = max(now, copying) + amount / rates.l2
                    copies.append(copying + L2_LATENCY)
                case "await copies":
                    if len(copies) > amount:
                        # What tensor cores do meanwhile is no waiting.
                        waited += max(0.0, copies[-1 - amount] - max(now, tensor))
                        now = max(now, copies[-1 - amount])
        ends.append((max(now, tensor), waited))
    half = _ITERATIONS // 2
    cycles, waiting = (
        (last - middle) / half for last, middle in zip(ends[-1], ends[half - 1], strict=True)
    )
    return cycles, waiting


def shared(loop: Loop, warps: int, rates: Rates, heads_per_key_head: int) -> float:
    """Cycles of a block that programs on the same multiprocessor cannot overlap.

    The heads that share a key head read its keys at about the same time: one of them from memory,
    the others from L2.
    """
    return max(
        loop.instructions * warps / SCHEDULERS / SHARED_ISSUE,
        loop.flops / rates.tensor,
        loop.exponentials * 32 * warps / EXPONENTIALS,
        loop.copied_bytes / rates.l2,
        loop.copied_bytes / heads_per_key_head / rates.memory,
    )


def _flops(instruction: Instruction) -> int:
    """FLOPs of a warp's or warp group's product, from the instruction's name."""
    shape = re.match(r"\.(\d+)x(\d+)x(\d+)\.", instruction.modifiers)
    if shape is None:
        # HMMA.16816 multiplies 16 x 16 by 16 x 8; HMMA.1688, 16 x 8 by 8 x 8.
        shape = re.match(r"\.(16)(8)(16|8)\.", instruction.modifiers)
    assert shape is not None, f"unknown product {instruction}"
    rows, columns, inner = map(int, shape.groups())
    return 2 * rows * columns * inner


def _from_memory(instruction: Instruction) -> bool:
    """Whether the left side of a product is in tensor memory."""
    return instruction.operands.lstrip().startswith("tmem")


def _with_known_groups(events: Sequence[Event]) -> tuple[Event, ...]:
    """Events in which every wait for products names a group of this loop.

    A barrier's address may be in another register where it is waited for. Such a wait is for the
    products before it: for the latest group.
    """
    groups = [group for what, group, _ in events if what == "products"]
    named = []
    for index, (what, group, amount) in enumerate(events):
        if what == "await products" and group not in groups:
            before = [each for kind, each, _ in events[:index] if kind == "products"]
            group = (before or groups)[-1]
        named.append((what, group, amount))
    return tuple(named)


def _joined(events: Sequence[Event]) -> tuple[Event, ...]:
    """Fewer events that take as long: those of products that warps wait for anyway are added up."""
    joined: list[Event] = []
    for event in events:
        # Instructions and such products take their time one after the other, in any order.
        for place in (-1, -2):
            other = joined[place] if len(joined) >= -place else ("", "", 0)
            if other[:2] == event[:2] and event[:2] in _IN_ANY_ORDER:
                joined[place] = (*event[:2], other[2] + event[2])
                break
            if other[:2] not in _IN_ANY_ORDER:
                joined.append(event)
                break
        else:
            joined.append(event)
    return tuple(event for event in joined if event[0] != "issue" or event[2])


_IN_ANY_ORDER = (("issue", ""), ("product", "wait"))
