"""What a chain is, as plain data, and as the integers and floats that an operator takes.

A **unit** is k >= 1 repetitions of norm -> act -> conv plus a shortcut; a **chain** is a list of
units. ``torch.library`` operators take tensors and lists of numbers, so a chain travels
as ``params`` (its tensors, flat), ``layout`` (integers) and ``constants`` (floats), and
``decode`` gives the record back, cached.
"""

from __future__ import annotations

import enum
import functools
from typing import NamedTuple

import torch

from ..kernels.operands import ACTS, Act, Geometry
from ..names import BACKENDS, MEMORY_MODES

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Shortcut(enum.IntEnum):
    """A unit's shortcut: x or z = act(norm_1(x)), as it is or through a convolution."""

    IDENTITY_RAW = 0
    IDENTITY_PREACT = 1
    PROJECTION_RAW = 2
    PROJECTION_PREACT = 3

    @property
    def projects(self) -> bool:
        """Whether a convolution stands in it."""
        return self >= Shortcut.PROJECTION_RAW

    @property
    def reads_preact(self) -> bool:
        """Whether it reads z = act(norm_1(x)) instead of x."""
        return self in (Shortcut.IDENTITY_PREACT, Shortcut.PROJECTION_PREACT)

    @staticmethod
    def of(projects: bool, reads_preact: bool) -> Shortcut:
        """The member with these properties."""
        return Shortcut(2 * projects + reads_preact)

    @property
    def words(self) -> str:
        """For people: "projection from raw"."""
        return (
            "identity",
            "identity from preact",
            "projection from raw",
            "projection from preact",
        )[self]


class Norm(NamedTuple):
    """One normalisation: ``training`` says whether statistics are those of its input.

    sync: the group over whose ranks they are taken (``sync.group_number``), 0 for none. groups: 0
    for those of the batch; else of each of so many groups of an image's channels, in training and
    evaluation alike.
    """

    training: bool
    weight: bool
    bias: bool
    eps: float
    sync: int = 0
    groups: int = 0


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
    shortcut: Shortcut
    projection: Conv | None
    add_in_place: bool

    @property
    def walkable(self) -> bool:
        """Whether x can be walked back to from the output: x + F(x) with x carried untouched.

        A single repetition has no h between x and the output from which F could be recomputed.
        """
        return self.shortcut == Shortcut.IDENTITY_RAW and len(self.convs) > 1


Slot = tuple[str, int, str]


def slots(unit: Unit) -> list[Slot]:
    """A unit's tensors in the order in which ``params`` holds them: (kind, number, attribute).

    The one place for that order: modules are read and positions are found by it.
    """
    result: list[Slot] = []
    for i, (norm, conv) in enumerate(zip(unit.norms, unit.convs)):
        if norm.weight:
            result.append(("norms", i, "weight"))
        if norm.bias:
            result.append(("norms", i, "bias"))
        if not norm.training:
            result += [("norms", i, "running_mean"), ("norms", i, "running_var")]
        result.append(("convs", i, "weight"))
        if conv.bias:
            result.append(("convs", i, "bias"))
    if unit.projection is not None:
        result.append(("projection", 0, "weight"))
        if unit.projection.bias:
            result.append(("projection", 0, "bias"))
    return result


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

    @classmethod
    def of(cls, unit: Unit, first: int, first_stats: int) -> UnitParams:
        """The positions of a unit whose tensors begin at ``first``."""
        places = {slot: place for place, slot in enumerate(slots(unit), first)}

        def at(kind: str, name: str) -> tuple[int, ...]:
            return tuple(places.get((kind, i, name), -1) for i in range(len(unit.convs)))

        return cls(
            at("norms", "weight"),
            at("norms", "bias"),
            at("norms", "running_mean"),
            at("norms", "running_var"),
            at("convs", "weight"),
            at("convs", "bias"),
            at("projection", "weight")[0],
            at("projection", "bias")[0],
            first_stats,
        )


HAND, HAND_TO_RANKS = 1, 2


class Part(NamedTuple):
    """A part's place in its chain.

    first, last: whether it begins and ends it. hands_on: whether the next part wants the moments of
    its output (HAND), and those for ranks to merge (HAND_TO_RANKS). natural: eager's dtype of its
    input where the stream is wider, None elsewhere.
    """

    first: bool = True
    last: bool = True
    hands_on: int = 0
    natural: torch.dtype | None = None


WHOLE = Part()


class Spec(NamedTuple):
    """A chain with all that a forward or backward needs to know besides its tensors.

    dtype: in which convolutions multiply. backend, memory: names. segment: units a segment has in
    mode "segment". wide: whether the residual stream between units is float32 though convolutions
    are in half precision. anchors: after how many units at most a walk back begins anew at a kept
    x, 0 for never. keep: whether a backward follows.
    need_x: whether x's gradient is wanted. needs: the same for each of ``params``; first_need:
    position of the first whose gradient is.
    part: its place in the chain that it is a part of. running: positions of running statistics.
    """

    units: tuple[Unit, ...]
    dtype: torch.dtype
    backend: str
    memory: str
    segment: int
    wide: bool
    anchors: int
    keep: bool
    need_x: bool
    needs: tuple[bool, ...]
    first_need: int
    positions: tuple[UnitParams, ...]
    part: Part
    running: tuple[int, ...]

    @property
    def walks_to_x(self) -> bool:
        """Whether its own x is walked back to: parts before it need it, and nothing keeps it."""
        walks = self.memory in ("invert", "invert_h1")
        return walks and not self.part.first and self.units[0].walkable and not self.anchors

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
        # Units since the stream began, at a projection or the chain's input.
        age = -1 if self.part.first else self.anchors - 1
        for number in range(stop):
            unit = self.units[number]
            age = 0 if unit.projection is not None else age + 1
            if number < start:
                continue
            k = len(unit.convs)
            if memory == "recompute" or not unit.walkable:
                keys += [(number, i) for i in range(k) if i or number > start]
                continue
            if number > start and self._is_anchor(age):
                keys.append((number, 0))
            if memory == "invert_h1":
                keys += [(number, i) for i in range(1, k)]
            else:
                keys.append((number, k - 1))
        return tuple(keys)

    def _is_anchor(self, age: int) -> bool:
        """Whether x is kept so many units after the stream began.

        A young stream grows fastest, and its first values are drowned by the roundings of larger
        ones soonest.
        """
        young = age in (self.anchors // 4, self.anchors // 2)
        return self.anchors > 0 and (young or age % self.anchors == 0)


def encode_unit(layout: list[int], constants: list[float], unit: Unit) -> None:
    """Append a unit to a layout and its constants; torch.compile can trace it."""
    layout += [
        len(unit.convs),
        ACTS.index(unit.act.kind),
        int(unit.shortcut),
        int(unit.add_in_place),
    ]
    constants.append(unit.act.slope)
    for norm, conv in zip(unit.norms, unit.convs):
        layout += [int(norm.training), int(norm.weight), int(norm.bias), norm.sync, norm.groups]
        constants.append(norm.eps)
        _encode_conv(layout, conv)
    if unit.projection is not None:
        _encode_conv(layout, unit.projection)


def _encode_conv(layout: list[int], conv: Conv) -> None:
    geometry = conv.geometry
    layout += [*geometry.stride, *geometry.padding, *geometry.dilation]
    layout += [geometry.groups, *geometry.extra, int(conv.bias)]


def encode_header(
    dtype: torch.dtype,
    backend: str,
    memory: str,
    segment: int,
    wide: bool,
    anchors: int,
    keep: bool,
    units: int,
    part: Part = WHOLE,
) -> list[int]:
    """The head of a layout; ``encode_unit`` and then the ``needs`` follow."""
    return [
        DTYPES.index(dtype),
        BACKENDS.index(backend),
        MEMORY_MODES.index(memory),
        segment,
        int(wide),
        anchors,
        int(keep),
        units,
        int(part.first),
        int(part.last),
        part.hands_on,
        -1 if part.natural is None else DTYPES.index(part.natural),
    ]


@functools.lru_cache(maxsize=512)
def _decode(layout: tuple[int, ...], constants: tuple[float, ...]) -> Spec:
    numbers = iter(layout)
    floats = iter(constants)
    dtype, backend, memory, segment, wide, anchors, keep, count = (next(numbers) for _ in range(8))
    first, last = (bool(next(numbers)) for _ in range(2))
    hands_on = next(numbers)
    natural = next(numbers)
    units: list[Unit] = []
    positions: list[UnitParams] = []
    params_before = norms_before = 0

    def conv() -> Conv:
        a, b, c, d, e, f, groups, g, h, bias = (next(numbers) for _ in range(10))
        return Conv(Geometry((a, b), (c, d), (e, f), groups, (g, h)), bool(bias))

    for _ in range(count):
        k, kind, shortcut, in_place = (next(numbers) for _ in range(4))
        act = Act(ACTS[kind], next(floats))
        norms: list[Norm] = []
        convs: list[Conv] = []
        for _ in range(k):
            training, weight, bias = (bool(next(numbers)) for _ in range(3))
            norms.append(Norm(training, weight, bias, next(floats), next(numbers), next(numbers)))
            convs.append(conv())
        reads = Shortcut(shortcut)
        projection = conv() if reads.projects else None
        units.append(Unit(tuple(norms), tuple(convs), act, reads, projection, bool(in_place)))
        positions.append(UnitParams.of(units[-1], params_before, norms_before))
        params_before += len(slots(units[-1]))
        norms_before += k
    need_x, *needs = (bool(n) for n in numbers)
    return Spec(
        tuple(units),
        DTYPES[dtype],
        BACKENDS[backend],
        MEMORY_MODES[memory],
        segment,
        bool(wide),
        anchors,
        bool(keep),
        need_x,
        tuple(needs),
        needs.index(True) if True in needs else len(needs),
        tuple(positions),
        Part(first, last, hands_on, None if natural < 0 else DTYPES[natural]),
        tuple(n for at in positions for n in (*at.running_mean, *at.running_var) if n >= 0),
    )


def decode(layout: list[int], constants: list[float]) -> Spec:
    """The record that ``layout`` and ``constants`` spell; cached, so that a step costs a lookup."""
    return _decode(tuple(layout), tuple(constants))
