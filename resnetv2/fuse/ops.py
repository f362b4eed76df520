"""The steps of a graph, and the folding of those that are a matter of their neighbours."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx, nn

from ..core.modules import NO_PAD, Pad
from ..core.norms import groups_of
from ..kernels.operands import Act
from .formula import Path
from .unit_plan import child_at, dotted


class Op(NamedTuple):
    """One step of a graph that has been read. inputs, number: positions in the list of steps.

    own: the class of a norm or convolution that has a forward of its own. pad: before a
    convolution. weight, bias: nodes that compute a convolution's. sides: nodes that are added
    behind a convolution ("shift"), or scale and shift a group norm's result, in their order. end:
    the function and number of a product or quotient.
    """

    number: int
    kind: str  # input, norm, act, pad, conv, add, scale, shift, end, folded, other
    inputs: tuple[int, ...]
    path: Path = ()
    act: Path | Act | None = None
    own: type | None = None
    in_place: bool = False
    what: str = ""
    pad: Pad = NO_PAD
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    sides: tuple[tuple[str, fx.Node], ...] = ()
    end: tuple[Any, float] | None = None

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes that give it what does not follow from x."""
        own = [node for node in (self.weight, self.bias) if node is not None]
        return own + [node for _, node in self.sides]


def fold_sides(ops: list[Op], root: nn.Module, result: int) -> int:
    """Make what is added behind a convolution, and what scales and shifts a group norm's result, a
    matter of these, where nobody reads them without; returns the result's new number."""
    moved: dict[int, int] = {}
    for op in ops:
        op = op._replace(inputs=tuple([moved.get(number, number) for number in op.inputs]))
        ops[op.number] = op
        if op.kind not in ("scale", "shift"):
            continue
        source = ops[op.inputs[0]]
        kinds = ("conv",) if op.kind == "shift" else ()
        if source.kind == "norm" and groups_of(child_at(root, source.path)):
            kinds = (*kinds, "norm")
        readers = [
            other for other in ops
            if source.number in [moved.get(number, number) for number in other.inputs]
        ]  # fmt: skip
        if source.kind not in kinds or len(readers) > 1:
            words = f"{op.what} behind {source.kind} {dotted(source.path)}"
            ops[op.number] = op._replace(kind="other", what=words)
            continue
        ops[source.number] = source._replace(sides=(*source.sides, *op.sides))
        ops[op.number] = op._replace(kind="folded", inputs=(), sides=())
        moved[op.number] = source.number
    return moved.get(result, result)


def fold_pads(ops: list[Op], result: int) -> None:
    """Make padding a matter of the convolutions that read it, where no one else does."""
    for op in ops:
        if op.kind == "conv" and ops[op.inputs[0]].kind == "pad":
            pad = ops[op.inputs[0]]
            ops[op.number] = op._replace(inputs=pad.inputs, pad=pad.pad)
    read = {number for op in ops for number in op.inputs} | {result}
    for op in ops:
        if op.kind == "pad":
            kind = "other" if op.number in read else "folded"
            what = f"{op.what or 'padding'} that something else than a convolution reads"
            ops[op.number] = op._replace(kind=kind, inputs=(), what=what)
