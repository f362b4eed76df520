"""What a module computes, read off its dataflow: is it one pre-activation unit?

``read_unit`` traces a module's forward on a copy (``trace``) and compares the graph with the one
thing that this library computes: k times norm -> act -> conv, then the addition of a shortcut.
Names of classes and attributes say nothing (modules of one name compute different functions), so
none is looked at. A module is either exactly a unit or is left alone; and what the trace says is
tried against the module's own forward.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx, nn

from ..core.modules import NO_PAD
from ..core.norms import NORMS, channels_of
from ..core.spec import Shortcut
from ..kernels.operands import Act
from .frozen import Frozen
from .graph import PASSED_ON, Graph, Op
from .reads import Guard
from .reasons import NotAUnitError
from .trace import (
    ADDITIONS,
    UNTRACEABLE,
    meta_copy,
    trace,
)
from .trial import structure, try_out
from .unit_plan import UnitPlan, child_at, dotted
from .watch import Watch

# More norms than any unit has: a whole stage or model, whose children are looked at instead.
MOST_NORMS = 16


def read_unit(module: nn.Module) -> tuple[UnitPlan, ...]:
    """The plans of a module that is one pre-activation unit: one, or two if training differs.

    Raises:
        NotAUnitError: it is not, or that cannot be told; says why.
    """
    plans: dict[bool, UnitPlan] = {}
    reason: NotAUnitError | None = None
    for training in (True, False):
        try:
            plan = _plan(module, training)
            try_out(module, plan, training)
            plans[training] = plan
        except NotAUnitError as error:
            reason = reason or error
    if not plans:
        assert reason is not None
        raise reason
    watch = Watch([entry for plan in plans.values() for entry in plan.watch.entries])
    of_both = [plan._replace(guards=_without_mode(plan), watch=watch) for plan in plans.values()]
    modes = {path for plan in plans.values() for path, name, _ in plan.guards if name == "training"}
    if len(plans) == 2 and of_both[0] == of_both[1] and len(modes) < 2:
        return (of_both[0],)
    otherwise = "" if reason is None else str(reason)
    return tuple(
        plan._replace(
            guards=(*plan.guards, ((), "training", Frozen(training, "equal"))),
            watch=watch,
            otherwise=otherwise,
        )
        for training, plan in plans.items()
    )


def _without_mode(plan: UnitPlan) -> tuple[Guard, ...]:
    return tuple(guard for guard in plan.guards if guard[1] != "training")


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two tensors in the traced module's own forward."""
    known = node.target in ADDITIONS or (node.op == "call_method" and "add" in str(node.target))
    return known and len(node.all_input_nodes) == 2 and not node.meta.get("nn_module_stack")


def _plan(module: nn.Module, training: bool) -> UnitPlan:
    """The plan of a module in one mode.

    A forward may ask for the channels of its input: those of the norm that reads it, which mostly
    is the first of the module.
    """
    norms = (m for m in module.modules() if isinstance(m, NORMS))
    reasons: list[NotAUnitError] = []
    for channels in dict.fromkeys(map(channels_of, norms)):
        try:
            return _plan_for(module, training, channels)
        except NotAUnitError as error:
            reasons.append(error)
    if not reasons:
        return _plan_for(module, training, None)
    # A trace that fails for the wrong number of channels says less than one that does not.
    raise next((r for r in reasons if not str(r).startswith(UNTRACEABLE)), reasons[0])


def _plan_for(module: nn.Module, training: bool, channels: int | None) -> UnitPlan:
    """The same for an input of so many channels."""
    try:
        traced = meta_copy(module)
    except Exception as error:
        raise NotAUnitError(f"cannot be copied: {error}") from error
    resembles = True
    try:
        fx_graph, reads = trace(traced, training, channels)
        resembles = any(_adds(node) for node in fx_graph.nodes)
        graph = Graph(fx_graph, traced)
        match = match_unit(graph)
    except NotAUnitError as error:
        error.resembles = resembles
        raise
    norms = [norm for norm, _, _ in match.links]
    first = channels_of(child_at(module, norms[0].path))
    if first != channels:
        raise NotAUnitError(f"{dotted(norms[0].path)} takes {first} channels, not {channels}", True)
    entries = reads.entries(module)
    guards = reads.guards(module)
    # Which the forward may have asked its input for.
    guards.append((norms[0].path, "num_features", Frozen(channels, "equal")))
    for path, its in graph.reads:
        norm = child_at(module, path)
        entries += its.entries(norm)
        guards += [((*path, *p), name, frozen) for p, name, frozen in its.guards(norm)
                   if p or name != "training"]  # fmt: skip
        guards += [(path, name, Frozen(getattr(norm, name), "equal")) for name in PASSED_ON]
    guards += [
        (path, name, Frozen(value, "equal", tuple([Frozen(v, "equal") for v in value])))
        for path, name, value in graph.guards
    ]
    guards = [
        (path, name, Frozen(training, "equal") if name == "training" else frozen)
        for path, name, frozen in guards
    ]
    identity = Act("identity")
    acts = [identity if act is None or act.act is None else act.act for _, act, _ in match.links]
    convs = [conv for _, _, conv in match.links]
    pads = [conv.pad for conv in (*convs, match.projection) if conv is not None]
    pads += [NO_PAD] * (match.projection is None)
    plan = UnitPlan(
        norms=tuple(norm.path for norm in norms),
        norm_types=tuple(norm.norm_type for norm in norms),
        convs=tuple(conv.path for conv in convs),
        acts=tuple(acts),
        shortcut=match.shortcut,
        projection=None if match.projection is None else match.projection.path,
        add_in_place=match.add.in_place,
        pads=tuple(pads) if any(map(any, pads)) else (),
        inert=tuple(dict.fromkeys(graph.inert)),
        containers=(),
        others=(),
        guards=tuple(
            {(path, name): (path, name, frozen) for path, name, frozen in guards}.values()
        ),
        watch=Watch(entries),
    )
    return plan._replace(**structure(module, plan))


class Match(NamedTuple):
    links: list[tuple[Op, Op | None, Op]]  # norm, act, conv in the order of the computation
    shortcut: Shortcut
    projection: Op | None
    add: Op


def match_unit(graph: Graph) -> Match:
    """The unit that a graph is; raises ``NotAUnitError`` with the difference."""
    ops = graph.ops
    for op in ops:
        if op.kind == "other":
            raise NotAUnitError(f"{op.what} is no part of a pre-activation unit")
    add = ops[graph.result]
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
            return Match(links, *_shortcut(graph, links, ops[other], add), add)
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
            raise NotAUnitError(f"{conv.kind} {place}stands where a convolution would")
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
    part |= {x, add.number, *([] if projection is None else [projection.number])}
    for op in ops:
        if op.number not in part and op.kind != "folded":
            raise NotAUnitError(f"{op.kind} {dotted(op.path)} is computed besides")
    if add.in_place and add.inputs[0] in (x, z.number):
        raise NotAUnitError("the addition writes into its input")
    return shortcut, projection
