"""How often the loops of a compiled kernel run, from its TTGIR and a launch's arguments.

The bounds of an ``scf.for`` are integer arithmetic on arguments, constants and the program's
number, which is evaluated here for program 0. The same loops stand in the machine code, whose own
bounds are registers (sass.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Trip(NamedTuple):
    """An ``scf.for``: how often its body runs, how deep it lies, whether that is a constant."""

    times: int
    depth: int
    constant: bool


_BINARY: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if a * b < 0 else a // b,
    "arith.divui": lambda a, b: a // b,
    "arith.ceildivsi": lambda a, b: -(-a // b),
    "arith.remsi": lambda a, b: a - b * (int(a / b) if a * b < 0 else a // b),
    "arith.remui": lambda a, b: a % b,
    "arith.minsi": min,
    "arith.minui": min,
    "arith.maxsi": max,
    "arith.maxui": max,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_FOR = re.compile(
    r"scf\.for (%[\w-]+) = (%[\w-]+) to (%[\w-]+) step (%[\w-]+)(?: iter_args\((.*?)\))?"
)


def loop_trips(ttgir: str, arguments: Sequence[int | None], grid: Sequence[int]) -> list[Trip]:
    """How often each ``scf.for`` before a ticket (sass.py) runs in program 0, in order.

    Args:
        ttgir: the kernel in Triton's GPU dialect.
        arguments: the values of the function's arguments in order, None for pointers and floats.
        grid: the launch's programs along each axis.

    Raises:
        ValueError: a bound is not computed from the arguments by integer arithmetic.
    """
    definitions: dict[str, str] = {}
    values: dict[str, tuple[int, bool]] = {}
    result: list[Trip] = []
    header = re.search(r"tt\.func public @\w+\((.*?)\) attributes", ttgir)
    names = re.findall(r"(%[\w-]+): ", header[1]) if header else []
    for name, argument in zip(names, arguments, strict=False):
        if argument is not None:
            values[name] = (int(argument), False)

    def value(name: str) -> tuple[int, bool]:
        if name not in values:
            if name not in definitions:
                raise ValueError(f"{name} is not known when the kernel is launched")
            values[name] = evaluate(definitions[name])
        return values[name]

    def evaluate(text: str) -> tuple[int, bool]:
        operation, _, rest = text.partition(" ")
        operands = re.findall(r"%[\w-]+(?:#\d+)?", rest)
        if operation == "arith.constant":
            word = rest.split()[0]
            return {"true": 1, "false": 0}.get(word, 0) if word.isalpha() else int(word), True
        if operation == "tt.get_program_id":
            return 0, False
        if operation == "tt.get_num_programs":
            return grid["xyz".index(rest.strip()[0])], False
        known = [value(operand) for operand in operands]
        constant = all(flag for _, flag in known)
        numbers = [number for number, _ in known]
        if operation in _BINARY:
            return _BINARY[operation](numbers[0], numbers[1]), constant
        if operation == "arith.cmpi":
            return int(_COMPARE[rest.split(",")[0].strip()[-2:]](*numbers)), constant
        if operation == "arith.select":
            return numbers[1] if numbers[0] else numbers[2], constant
        if operation in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
            return numbers[0], constant
        raise ValueError(f"no rule for {operation} in a loop's bound")

    closing: list[int] = []
    for line in ttgir.partition("tt.atomic_rmw")[0].splitlines():
        indent = len(line) - len(line.lstrip())
        while closing and indent <= closing[-1] and line.lstrip().startswith("}"):
            closing.pop()
        text = re.sub(r" loc\(.*\)$", "", line.strip())
        defined = re.match(r"(%[\w-]+)(?::\d+)? = (.*)", text)
        if defined:
            definitions[defined[1]] = defined[2]
        loop = _FOR.search(text)
        if loop:
            (start, a), (stop, b), (step, c) = value(loop[2]), value(loop[3]), value(loop[4])
            result.append(Trip(max(0, -(-(stop - start) // step)), len(closing), a and b and c))
            # Bounds of inner loops are taken as of the outer loop's first trip.
            values[loop[1]] = (start, False)
            for name, initial in re.findall(r"(%[\w-]+) = (%[\w-]+)", loop[5] or ""):
                definitions[name] = f"arith.extsi {initial}"
            closing.append(indent)
    return result


_PTX_WORK = re.compile(r"\b(ld\.global|st\.global|cp\.async\.c[ag]|wgmma\.mma|mma\.sync)")


def loop_bodies(ptx: str) -> list[int]:
    """Accesses to global memory and matrix instructions in each loop of a kernel's PTX."""
    lines = re.split(r"\batom\.", ptx, maxsplit=1)[0].splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\$L\w+):", line))}
    ends: dict[int, int] = {}
    for i, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$L\w+)", line)
        if branch and labels.get(branch[1], i + 1) <= i:
            ends[labels[branch[1]]] = i
    return [
        sum(bool(_PTX_WORK.search(line)) for line in lines[start:stop])
        for start, stop in sorted(ends.items())
    ]
