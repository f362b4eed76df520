"""What a module computes, read off its dataflow: is it one pre-activation unit?

``read_unit`` traces a module's forward on a copy (``trace``) and compares the graph with the one
thing that this library computes: k times norm -> act -> conv, then the addition of a shortcut.
Names of classes and attributes say nothing (modules of one name compute different functions), so
none is looked at. A module is either exactly a unit or is left alone; and what the trace says is
tried against the module's own forward.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from ..core.modules import NO_PAD
from ..core.norms import NORMS, channels_of
from ..kernels.operands import Act
from .frozen import Frozen
from .graph import PASSED_ON, Graph
from .matching import formula_of, match_unit
from .reads import Guard
from .reasons import NotAUnitError
from .second import Second, seconds_of
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
    """The plans of a module that is one pre-activation unit: one, or more if training differs, or
    what a second input makes of it.

    Raises:
        NotAUnitError: it is not, or that cannot be told; says why.
    """
    plans: list[UnitPlan] = []
    reasons: list[NotAUnitError] = []
    for second in seconds_of(module):
        try:
            plans += _plans_of_modes(module, second)
        except NotAUnitError as reason:
            reasons.append(reason)
    if not plans:
        raise reasons[0]
    if len({plan.end for plan in plans}) > 1:
        raise NotAUnitError("what it does with the sum differs from call to call", True)
    watch = Watch([entry for plan in plans for entry in plan.watch.entries])
    return tuple([plan._replace(watch=watch) for plan in plans])


def _plans_of_modes(module: nn.Module, second: Second | None) -> list[UnitPlan]:
    """The plans of a module's calls with such a second input: one, or two if training differs."""
    plans: dict[bool, UnitPlan] = {}
    reason: NotAUnitError | None = None
    for training in (True, False):
        try:
            plan = _plan(module, training, second)
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
        return [of_both[0]]
    otherwise = "" if reason is None else str(reason)
    return [
        plan._replace(
            guards=(*plan.guards, ((), "training", Frozen(training, "equal"))),
            watch=watch,
            otherwise=otherwise,
        )
        for training, plan in plans.items()
    ]


def _without_mode(plan: UnitPlan) -> tuple[Guard, ...]:
    return tuple(guard for guard in plan.guards if guard[1] != "training")


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two tensors in the traced module's own forward."""
    known = node.target in ADDITIONS or (node.op == "call_method" and "add" in str(node.target))
    return known and len(node.all_input_nodes) == 2 and not node.meta.get("nn_module_stack")


def _plan(module: nn.Module, training: bool, second: Second | None) -> UnitPlan:
    """The plan of a module in one mode, for calls with such a second input.

    A forward may ask for the channels of its input: those of the norm that reads it, which mostly
    is the first of the module.
    """
    norms = (m for m in module.modules() if isinstance(m, NORMS))
    reasons: list[NotAUnitError] = []
    for channels in dict.fromkeys(map(channels_of, norms)):
        try:
            return _plan_for(module, training, channels, second)
        except NotAUnitError as error:
            reasons.append(error)
    if not reasons:
        return _plan_for(module, training, None, second)
    # A trace that fails for the wrong number of channels says less than one that does not.
    raise next((r for r in reasons if not str(r).startswith(UNTRACEABLE)), reasons[0])


def _plan_for(
    module: nn.Module, training: bool, channels: int | None, second: Second | None
) -> UnitPlan:
    """The same for an input of so many channels."""
    try:
        traced = meta_copy(module)
    except Exception as error:
        raise NotAUnitError(f"cannot be copied: {error}") from error
    # Where its forward cannot be traced, a module with a norm may add a shortcut.
    resembles = any(isinstance(m, NORMS) for m in module.modules())
    try:
        fx_graph, reads = trace(traced, training, channels, _passed(second))
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
    norm = child_at(module, norms[0].path)
    name = "num_channels" if isinstance(norm, nn.GroupNorm) else "num_features"
    guards.append((norms[0].path, name, Frozen(channels, "equal")))
    for path, its in graph.reads:
        norm = child_at(module, path)
        entries += its.entries(norm)
        guards += [((*path, *p), name, frozen) for p, name, frozen in its.guards(norm)
                   if p or name != "training"]  # fmt: skip
        guards += [(path, name, Frozen(getattr(norm, name), "equal")) for name in PASSED_ON]
    guards += [(path, name, _equal(value)) for path, name, value in graph.guards]
    guards = [
        (path, name, Frozen(training, "equal") if name == "training" else frozen)
        for path, name, frozen in guards
    ]
    identity = Act("identity")
    acts = [identity if act is None or act.act is None else act.act for _, act, _ in match.links]
    convs = [conv for _, _, conv in match.links]
    pads = [conv.pad for conv in (*convs, match.projection) if conv is not None]
    pads += [NO_PAD] * (match.projection is None)
    formula = formula_of(graph, match)
    own = [*norms, *convs, *([] if match.projection is None else [match.projection])]
    for path in () if formula is None else formula.called:
        if any(op.path[: len(path)] == path for op in own):
            raise NotAUnitError(f"{dotted(path)} is called with something else than x too", True)
    plan = UnitPlan(
        norms=tuple(norm.path for norm in norms),
        norm_types=tuple(norm.own for norm in norms),
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
        conv_types=tuple(conv.own for conv in (*convs, match.projection) if conv is not None),
        formula=formula,
        second=second,
        end=match.end,
    )
    return plan._replace(**structure(module, plan))


def _equal(value: Any) -> Frozen:
    parts = tuple([_equal(part) for part in value]) if isinstance(value, tuple) else None
    return Frozen(value, "equal", parts)


def _passed(second: Second | None) -> bool | None:
    """Whether a tensor or None is passed to a trace as its second input; None for nothing."""
    if second is None or not (second.required or second.given):
        return None
    return second.given
