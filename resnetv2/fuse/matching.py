"""What the steps of a graph are as one unit, and what of it is computed at every call."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..core.norms import channels_of
from ..core.spec import Shortcut, Slot
from .formula import (
    Builder,
    Formula,
    Result,
    bias_like,
    like,
    per_channel,
    scaled,
    scaled_bias,
    shifted,
)
from .graph import Graph
from .ops import Op
from .reasons import NotAUnitError
from .unit_plan import child_at, dotted


class Match(NamedTuple):
    links: list[tuple[Op, Op | None, Op]]  # norm, act, conv in the order of the computation
    shortcut: Shortcut
    projection: Op | None
    add: Op
    end: tuple[Any, float] | None  # of the sum: a function and a number


def match_unit(graph: Graph) -> Match:
    """The unit that a graph is; raises ``NotAUnitError`` with the difference."""
    ops = graph.ops
    for op in ops:
        if op.kind == "other" or (op.kind == "end" and op.number != graph.result):
            raise NotAUnitError(f"{op.what} is no part of a pre-activation unit")
    add, end = ops[graph.result], None
    if add.kind == "end" and graph.users[add.inputs[0]] == {add.number}:
        add, end = ops[add.inputs[0]], add.end
    if add.kind != "add":
        if add.kind in ("act", "norm") and any(op.kind == "add" for op in ops):
            raise NotAUnitError("post-activation: its output is activated or normalised")
        raise NotAUnitError("no shortcut is added at its end")
    if len(set(add.inputs)) != 2:
        raise NotAUnitError("a tensor is added to itself")
    reasons: list[tuple[int, NotAUnitError]] = []
    for branch, other in (add.inputs, add.inputs[::-1]):
        links: list[tuple[Op, Op | None, Op]] = []
        try:
            _branch(graph, ops[branch], add, links)
            return Match(links, *_shortcut(graph, links, ops[other], add), add, end)
        except NotAUnitError as reason:
            steps = 2 * len(links) + (ops[branch].kind != "input")
            reasons.append((steps, reason))
    # The side that is most like a branch says more than the one that is most like a shortcut.
    raise max(reasons, key=lambda reason: reason[0])[1]


def _branch(graph: Graph, last: Op, add: Op, links: list[tuple[Op, Op | None, Op]]) -> None:
    """Fills ``links``, from the last convolution to the input."""
    ops, users = graph.ops, graph.users
    conv, reader = last, add.number
    while True:
        if conv.kind != "conv":
            place = f"{dotted(conv.path)} " if conv.path else ""
            what = conv.what or conv.kind
            raise NotAUnitError(f"{what} {place}stands where a convolution would")
        if users[conv.number] != {reader}:
            raise NotAUnitError(f"the output of {dotted(conv.path)} is read more than once")
        z = ops[conv.inputs[0]]
        act = z if z.kind == "act" else None
        norm = ops[act.inputs[0]] if act is not None else z
        if norm.kind != "norm":
            raise NotAUnitError(f"{dotted(conv.path)} does not read an activated norm")
        if act is not None and users[norm.number] != {act.number}:
            raise NotAUnitError(f"the output of {dotted(norm.path)} is read more than once")
        links.insert(0, (norm, act, conv))
        source = ops[norm.inputs[0]]
        if source.kind == "input":
            break
        if users[z.number] != {conv.number}:
            raise NotAUnitError(f"the input of {dotted(conv.path)} is read elsewhere too")
        conv, reader = source, norm.number


def _shortcut(
    graph: Graph, links: list[tuple[Op, Op | None, Op]], other: Op, add: Op
) -> tuple[Shortcut, Op | None]:
    ops, users = graph.ops, graph.users
    norm, act, _ = links[0]
    z = act or norm
    x = norm.inputs[0]
    projection = None
    if other.number == x:
        shortcut = Shortcut.IDENTITY_RAW
    elif other.number == z.number:
        shortcut = Shortcut.IDENTITY_PREACT
    elif other.kind == "conv" and users[other.number] == {add.number}:
        projection = other
        if other.inputs[0] == x:
            shortcut = Shortcut.PROJECTION_RAW
        elif other.inputs[0] == z.number:
            shortcut = Shortcut.PROJECTION_PREACT
        else:
            raise NotAUnitError(f"{dotted(other.path)} reads neither x nor act(norm(x))")
    else:
        raise NotAUnitError(f"its shortcut ends in {other.kind} {dotted(other.path)}")
    part = {op.number for link in links for op in link if op is not None}
    part |= {x, add.number, graph.result, *([] if projection is None else [projection.number])}
    for op in ops:
        if op.number not in part and op.kind != "folded":
            raise NotAUnitError(f"{op.kind} {dotted(op.path)} is computed besides")
    if add.in_place and add.inputs[0] in (x, z.number):
        raise NotAUnitError("the addition writes into its input")
    return shortcut, projection


def formula_of(graph: Graph, match: Match) -> Formula | None:
    """What a unit's weights, biases and affines are computed by, where they are no attributes."""
    links, projection = list(match.links), match.projection
    if projection is not None and projection.sides:
        # What is added behind it may as well be added behind the last convolution.
        norm, act, last = links[-1]
        links[-1] = norm, act, last._replace(sides=(*last.sides, *projection.sides))
        projection = projection._replace(sides=())
    ops = [op for norm, _, conv in links for op in (norm, conv)]
    ops += [] if projection is None else [projection]
    builder = Builder(graph.graph, [node for op in ops for node in op.nodes])
    slots: list[tuple[Slot, Result]] = []
    for i, (norm, _, conv) in enumerate(links):
        _add_affine(builder, graph, norm, i, slots)
        _add_convolution(builder, graph, conv, ("convs", i), slots)
    if projection is not None:
        _add_convolution(builder, graph, projection, ("projection", 0), slots)
    return builder.formula(slots)


def _add_convolution(
    builder: Builder, graph: Graph, op: Op, place: tuple[str, int], slots: list[tuple[Slot, Result]]
) -> None:
    channels = child_at(graph.root, op.path).out_channels
    if op.weight is not None:
        own = builder.attribute((*op.path, "weight"))
        slots.append(((*place, "weight"), builder.add(like, builder.of(op.weight), own)))
    if op.bias is None and not op.sides:
        return
    bias = builder.attribute((*op.path, "bias"))
    if op.bias is not None:
        own = builder.attribute((*op.path, "weight"))
        bias = builder.add(bias_like, builder.of(op.bias), own)
    for _, node in op.sides:
        bias = builder.add(shifted, bias, builder.add(per_channel, builder.of(node), channels))
    slots.append(((*place, "bias"), bias))


def _add_affine(
    builder: Builder, graph: Graph, op: Op, i: int, slots: list[tuple[Slot, Result]]
) -> None:
    if not op.sides:
        return
    channels = channels_of(child_at(graph.root, op.path))
    weight = builder.attribute((*op.path, "weight"))
    bias = builder.attribute((*op.path, "bias"))
    for kind, node in op.sides:
        side = builder.add(per_channel, builder.of(node), channels)
        if kind == "scale":
            weight = builder.add(scaled, weight, side)
            bias = builder.add(scaled_bias, bias, side)
        else:
            bias = builder.add(shifted, bias, side)
    if any(kind == "scale" for kind, _ in op.sides):
        slots.append((("norms", i, "weight"), weight))
    slots.append((("norms", i, "bias"), bias))
