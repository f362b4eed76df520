"""What a chain is, as plain data, and as the integers and floats that an operator takes.

A **unit** is k >= 1 repetitions of norm -> act -> conv plus a shortcut; a **chain** is a list of
units (design 2). ``torch.library`` operators take tensors and lists of numbers, so a chain travels
as ``params`` (its tensors, flat), ``layout`` (integers) and ``constants`` (floats), and
``decode`` gives the record back, cached.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..kernels.dispatch import BACKENDS
from ..kernels.operands import ACTS, Act, Geometry

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Where the shortcut of a unit reads: x itself, or z = act(norm_1(x)) (design 5).
IDENTITY_RAW, IDENTITY_PREACT, PROJECTION_RAW, PROJECTION_PREACT = range(4)

# What is kept from forward to backward (design 3).
MEMORY = ("recompute", "invert", "invert_h1", "segment")


class Norm(NamedTuple):
    """One normalisation: ``training`` says whether statistics are those of the batch.

    sync: the group over whose ranks they are taken (``sync.group_number``), 0 for none.
    """

    training: bool
    weight: bool
    bias: bool
    eps: float
    sync: int = 0


class Conv(NamedTuple):
    """One convolution and whether it has a bias."""

    geometry: Geometry
    bias: bool


class Unit(NamedTuple):
    """k norms and convolutions (norms[i] comes before convs[i]), one activation, one shortcut.

    add_in_place: whether eager adds in place (``out += shortcut``), which fixes the output's
    dtype under autocast to the convolution's.
    """

    norms: tuple[Norm, ...]
    convs: tuple[Conv, ...]
    act: Act
    shortcut: int
    projection: Conv | None
    add_in_place: bool

    @property
    def walkable(self) -> bool:
        """Whether x can be walked back to from the output: x + F(x) with x carried untouched.

        A single repetition has no h between x and the output from which F could be recomputed.
        """
        return self.shortcut == IDENTITY_RAW and len(self.convs) > 1


class UnitParams(NamedTuple):
    """Positions in ``params``, or -1: per repetition the norm's and convolution's tensors."""

    norm_weight: tuple[int, ...]
    norm_bias: tuple[int, ...]
    running_mean: tuple[int, ...]
    running_var: tuple[int, ...]
    conv_weight: tuple[int, ...]
    conv_bias: tuple[int, ...]
    projection_weight: int
    projection_bias: int
    first_stats: int  # number of the unit's first norm in the chain


class Spec(NamedTuple):
    """A chain with all that a forward or backward needs to know besides its tensors.

    dtype: in which convolutions multiply. backend, memory: names. segment: units a segment has in
    mode "segment". wide: whether the residual stream between units is float32 though convolutions
    are in half precision, as walking it back needs (design 3). keep: whether a backward follows.
    need_x: whether x's gradient is wanted. needs: the same for each of ``params``; first_need:
    position of the first whose gradient is.
    """

    units: tuple[Unit, ...]
    dtype: torch.dtype
    backend: str
    memory: str
    segment: int
    wide: bool
    keep: bool
    need_x: bool
    needs: tuple[bool, ...]
    first_need: int
    positions: tuple[UnitParams, ...]

    @property
    def synced(self) -> int:
        """How many norms take their statistics over several ranks."""
        return sum(norm.sync > 0 for unit in self.units for norm in unit.norms)

    def needs_before(self, position: int) -> bool:
        """Whether a gradient is wanted of x or of anything before ``params[position]``."""
        return self.need_x or self.first_need < position

    def kept(self) -> tuple[tuple[int, int], ...]:
        """(unit, i) of each h_i that the forward keeps; (l, 0) is unit l's x, (0, 0) the chain's.

        The chain's own x and output are saved by autograd as they are, and not listed.
        """
        if not self.keep:
            return ()
        if self.memory == "segment":
            return tuple((u, 0) for u in range(self.segment, len(self.units), self.segment))
        return self.kept_of(0, len(self.units), self.memory)

    def kept_of(self, start: int, stop: int, memory: str) -> tuple[tuple[int, int], ...]:
        """The same for a run of units [start, stop) whose own x and output are at hand."""
        keys: list[tuple[int, int]] = []
        for number in range(start, stop):
            unit = self.units[number]
            k = len(unit.convs)
            if memory == "recompute" or not unit.walkable:
                keys.extend((number, i) for i in range(k) if i or number > start)
            elif memory == "invert_h1":
                keys.extend((number, i) for i in range(1, k))
            else:
                keys.append((number, k - 1))
        return tuple(keys)


def encode_unit(layout: list[int], constants: list[float], unit: Unit) -> None:
    """Append a unit to a layout and its constants; torch.compile can trace it."""
    layout += [len(unit.convs), ACTS.index(unit.act.kind), unit.shortcut, int(unit.add_in_place)]
    constants.append(unit.act.slope)
    for norm, conv in zip(unit.norms, unit.convs):
        layout += [int(norm.training), int(norm.weight), int(norm.bias), norm.sync]
        constants.append(norm.eps)
        _encode_conv(layout, conv)
    if unit.projection is not None:
        _encode_conv(layout, unit.projection)


def _encode_conv(layout: list[int], conv: Conv) -> None:
    geometry = conv.geometry
    layout += [*geometry.stride, *geometry.padding, *geometry.dilation]
    layout += [geometry.groups, *geometry.extra, int(conv.bias)]


def encode_header(
    dtype: torch.dtype, backend: str, memory: str, segment: int, wide: bool, keep: bool, units: int
) -> list[int]:
    """The head of a layout; ``encode_unit`` and then the ``needs`` follow."""
    return [
        DTYPES.index(dtype),
        BACKENDS.index(backend),
        MEMORY.index(memory),
        segment,
        int(wide),
        int(keep),
        units,
    ]


@functools.lru_cache(maxsize=512)
def _decode(layout: tuple[int, ...], constants: tuple[float, ...]) -> Spec:
    numbers = iter(layout)
    floats = iter(constants)
    dtype, backend, memory, segment, wide, keep, count = (next(numbers) for _ in range(7))
    units: list[Unit] = []
    positions: list[UnitParams] = []
    position = norms_before = 0

    def place(present: bool) -> int:
        nonlocal position
        position += present
        return position - 1 if present else -1

    def conv() -> Conv:
        a, b, c, d, e, f, groups, g, h, bias = (next(numbers) for _ in range(10))
        return Conv(Geometry((a, b), (c, d), (e, f), groups, (g, h)), bool(bias))

    for _ in range(count):
        k, kind, shortcut, in_place = (next(numbers) for _ in range(4))
        act = Act(ACTS[kind], next(floats))
        norms: list[Norm] = []
        convs: list[Conv] = []
        rows: list[tuple[int, ...]] = []
        for _ in range(k):
            training, weight, bias = (bool(next(numbers)) for _ in range(3))
            norms.append(Norm(training, weight, bias, next(floats), next(numbers)))
            convs.append(conv())
            running = not training
            rows.append(
                (
                    place(weight),
                    place(bias),
                    place(running),
                    place(running),
                    place(True),
                    place(convs[-1].bias),
                )
            )
        projection = conv() if shortcut in (PROJECTION_RAW, PROJECTION_PREACT) else None
        units.append(Unit(tuple(norms), tuple(convs), act, shortcut, projection, bool(in_place)))
        columns = zip(*rows)
        positions.append(
            UnitParams(
                norm_weight=next(columns),
                norm_bias=next(columns),
                running_mean=next(columns),
                running_var=next(columns),
                conv_weight=next(columns),
                conv_bias=next(columns),
                projection_weight=place(projection is not None),
                projection_bias=place(projection is not None and projection.bias),
                first_stats=norms_before,
            )
        )
        norms_before += k
    need_x, *needs = (bool(n) for n in numbers)
    return Spec(
        tuple(units),
        DTYPES[dtype],
        BACKENDS[backend],
        MEMORY[memory],
        segment,
        bool(wide),
        bool(keep),
        need_x,
        tuple(needs),
        needs.index(True) if True in needs else len(needs),
        tuple(positions),
    )


def decode(layout: list[int], constants: list[float]) -> Spec:
    """The record that ``layout`` and ``constants`` spell; cached, so that a step costs a lookup."""
    return _decode(tuple(layout), tuple(constants))
