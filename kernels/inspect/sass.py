"""How many instructions a program executes, read from its machine code (NVIDIA SASS).

    issue cycles  = instructions per warp * warps / 4     (a multiprocessor issues 4 a cycle)
    memory cycles = distinct bytes / 14.5                 (its share of an H100's 3.35 TB/s)

Their ratio says before any GPU is seen whether a kernel can be bound by memory (well under 1) or
drowns in instructions. It bounds time from below and predicts nothing: occupancy, latency and L2
hits come on top. Straight-line code counts once, with both sides of a branch; a loop counts as
often as its ``scf.for`` in the kernel's TTGIR says for this launch's arguments and program 0. What
follows a ticket (kernels/merging.py) is left out: one program of a group does it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .trips import Trip

ISSUE_PER_CYCLE = 4.0
BYTES_PER_CYCLE = 14.5

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# Instructions that multiply matrices: wgmma, mma.sync and tcgen05 (sm_90; sm_80; sm_100).
_MATRIX = ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA")
_SPILLS = ("LDL", "STL")
_MEMORY = ("LDG", "STG", "LDGSTS", "UBLKCP", "UTMALDG", "UTMASTG")
_WORK = (*_MATRIX, *_MEMORY)
_ATOMIC = ("ATOM", "ATOMG")


class Instruction(NamedTuple):
    """One instruction: its address, its predicate ("" if none), its name and its operands."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without modifiers: LDG of LDG.E.128."""
        return self.opcode.split(".", 1)[0]


class Loop(NamedTuple):
    """A loop of the machine code: first and last address, and how many loops enclose it."""

    start: int
    stop: int
    depth: int


@dataclass(frozen=True)
class Count:
    """What one warp executes for one program.

    opcodes:  executed instructions by opcode, loops multiplied out.
    loops:    the loops found and the trips each was given.
    unsure:   what could not be matched, in words; "" where the count is certain.
    """

    opcodes: dict[str, int]
    loops: tuple[tuple[Loop, int], ...]
    unsure: str = ""

    @property
    def instructions(self) -> int:
        """Instructions that one warp executes."""
        return sum(self.opcodes.values())

    def of(self, names: Sequence[str]) -> int:
        """Executed instructions whose name, without modifiers, is one of ``names``."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.split(".", 1)[0] in names)

    @property
    def matrix(self) -> int:
        """Executed matrix multiplications of any kind."""
        return self.of(_MATRIX)

    @property
    def wgmma(self) -> int:
        """Executed warpgroup multiplications (sm_90's wgmma)."""
        return self.of(("HGMMA", "IGMMA", "QGMMA"))

    def multiply_adds(self, num_warps: int) -> int:
        """Multiply-adds of a program's matrix instructions, on zeros of a tile's border too."""
        total = 0
        for opcode, n in self.opcodes.items():
            name, _, rest = opcode.partition(".")
            wide = re.match(r"(\d+)x(\d+)x(\d+)", rest)
            if name in ("HGMMA", "IGMMA", "QGMMA") and wide:
                total += n * int(wide[1]) * int(wide[2]) * int(wide[3]) * num_warps // 4
            elif name == "HMMA" and rest[:2] == "16":
                # HMMA.16816 and HMMA.1684 multiply 16 x 8 x 16 and 16 x 8 x 4 a warp.
                total += n * 16 * 8 * int(rest.split(".")[0][3:]) * num_warps
        return total

    @property
    def local(self) -> int:
        """Executed loads from and stores to local memory: spills."""
        return self.of(_SPILLS)

    @property
    def memory(self) -> dict[str, int]:
        """Executed accesses to global memory by name and bytes a lane: {"LDG.16": 8, ...}."""
        widths: Counter[str] = Counter()
        for opcode, n in self.opcodes.items():
            name = opcode.split(".", 1)[0]
            if name in _MEMORY:
                bits = re.search(r"\.(?:U|S)?(8|16|64|128)\b", opcode)
                widths[f"{name}.{int(bits[1]) // 8 if bits else 4}"] += n
        return dict(widths)

    def issue_cycles(self, num_warps: int) -> float:
        """Cycles in which a multiprocessor issues one program of ``num_warps`` warps."""
        return self.instructions * num_warps / ISSUE_PER_CYCLE

    def ratio(self, num_warps: int, nbytes: float) -> float:
        """Issue cycles over memory cycles for a program that moves ``nbytes`` distinct bytes."""
        return self.issue_cycles(num_warps) * BYTES_PER_CYCLE / nbytes


def parse(text: str) -> list[Instruction]:
    """The instructions of ``cuobjdump --dump-sass``'s output, one kernel, in order."""
    found = (_LINE.match(line) for line in text.splitlines())
    return [Instruction(int(m[1], 16), m[2] or "", m[3], m[4]) for m in found if m]


def _target(instruction: Instruction) -> int | None:
    """Where a branch goes, or None for what is no branch with a known target."""
    if instruction.name not in ("BRA", "JMP"):
        return None
    addresses = re.findall(r"0x([0-9a-f]+)", instruction.operands)
    return int(addresses[-1], 16) if addresses else None


def reachable(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions on some path from the entry, without called subroutines.

    Triton's subroutines are the slow paths of division and square root, which ordinary values
    never take; what follows the last exit is padding.
    """
    index = {instruction.address: i for i, instruction in enumerate(code)}
    seen: set[int] = set()
    pending = [0]
    while pending:
        i = pending.pop()
        while i < len(code) and i not in seen:
            seen.add(i)
            instruction = code[i]
            always = instruction.predicate in ("", "@PT", "@UPT") and not re.match(
                r"!?U?P\d", instruction.operands
            )
            goal = _target(instruction)
            if goal is not None and goal in index:
                pending.append(index[goal])
            if always and (goal is not None or instruction.name in ("EXIT", "RET", "BRX", "KILL")):
                break
            i += 1
    return [code[i] for i in sorted(seen)]


def before_ticket(code: Sequence[Instruction]) -> list[Instruction]:
    """What every program executes: the instructions up to the first atomic one."""
    tickets = (i for i, instruction in enumerate(code) if instruction.name in _ATOMIC)
    return list(code[: next(tickets, len(code))])


def loops(code: Sequence[Instruction]) -> list[Loop]:
    """The loops of ``code`` in the order of their starts, outer ones before those they hold."""
    ends: dict[int, int] = {}
    for instruction in code:
        goal = _target(instruction)
        if goal is not None and goal <= instruction.address:
            ends[goal] = max(ends.get(goal, 0), instruction.address)
    spans = [span for span in sorted(ends.items()) if not _idle(code, *span)]
    return [
        Loop(start, stop, sum(a <= start and stop <= b for a, b in spans) - 1)
        for start, stop in spans
    ]


def _idle(code: Sequence[Instruction], start: int, stop: int) -> bool:
    """A loop that waits for a barrier (normally once), or an emptied one that only counts."""
    names = {i.name for i in code if start <= i.address <= stop}
    return len(names) < 16 and ("SYNCS" in names or names <= {"UIADD3", "IADD3", "ISETP", "BRA"})


def count(text: str, trips: Sequence[Trip | int] = (), bodies: Sequence[int] = ()) -> Count:
    """Count what one warp executes in the disassembly ``text``.

    Args:
        text: of ``cuobjdump --dump-sass``.
        trips: of the loops in the order of their code: from ``trips.loop_trips``, or numbers.
        bodies: accesses and matrix instructions in each loop before the assembler unrolled it
            (``trips.loop_bodies``); what it leaves over for the rest counts once, as always run.
    """
    code = before_ticket(reachable(parse(text)))
    found = loops(code)
    known = [t if isinstance(t, Trip) else Trip(t, 0, False) for t in trips]
    matched, unsure = match(found, known)
    if len(bodies) == len(found):
        for i, (loop, body) in enumerate(zip(found, bodies, strict=True)):
            work = sum(j.name in _WORK for j in code if loop.start <= j.address <= loop.stop)
            matched[i] //= max(1, round(work / max(1, body)))
    opcodes: Counter[str] = Counter()
    for instruction in code:
        times = 1
        for loop, trip in zip(found, matched, strict=True):
            if loop.start <= instruction.address <= loop.stop:
                times *= trip
        if times:
            opcodes[instruction.opcode] += times
    return Count(dict(opcodes), tuple(zip(found, matched, strict=True)), unsure)


def match(found: Sequence[Loop], trips: Sequence[Trip]) -> tuple[list[int], str]:
    """Trips for each loop of the machine code, and what stayed unsure.

    The compiler keeps the loops' order. One with few, constant trips may have become straight-line
    code, and then drops out here.
    """
    remaining = list(trips)
    while len(remaining) > len(found):
        constant = [t for t in remaining if t.constant or t.times <= 1]
        if not constant:
            break
        remaining.remove(min(constant, key=lambda t: t.times))
    result = [trip.times for trip in remaining[: len(found)]]
    result += [1] * (len(found) - len(result))
    if len(remaining) == len(found):
        return result, ""
    return result, f"{len(found)} loops in the code, {len(trips)} in TTGIR"
