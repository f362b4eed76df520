"""What a module computes, read off its dataflow: is it one pre-activation unit?

``read_unit`` traces a module's forward on a copy (``trace``) and compares the graph with the one
thing that this library computes: k times norm -> act -> conv, then the addition of a shortcut.
Names of classes and attributes say nothing (modules of one name compute different functions), so
none is looked at. A module is either exactly a unit or is left alone; and what the trace says is
tried against the module's own forward.
"""

from __future__ import annotations

import copy
import operator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import UnfitError, is_norm, is_plain
from ..core.modules import NO_PAD, Pad, UnitModules, act_of
from ..core.reading import Reading
from ..core.run import run_chain
from ..core.spec import Shortcut
from ..core.sync import NORMS, SyncBatchNorm
from ..kernels.operands import Act
from .frozen import Freezer, Frozen, difference, is_same
from .reads import Guard, Reads, lookup
from .reasons import NotAUnitError
from .trace import (
    ACT_FUNCTIONS,
    ADDITIONS,
    UNTRACEABLE,
    keep_groups,
    make_local,
    meta_copy,
    no_modes,
    random_states,
    restore,
    same_states,
    trace,
    unhook,
)
from .unit_plan import Container, Path, UnitPlan, child_at, dotted, is_leaf, modules_of
from .watch import Watch

# More norms than any unit has: a whole stage or model, whose children are looked at instead.
MOST_NORMS = 16

# Of images for a trial; some blocks take only even sizes, or squares.
_TRIAL_SIZES = ((8, 6), (16, 16), (7, 7))

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)

_NO_EFFECT = (torch._assert, getattr, operator.getitem)


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
            _try(module, plan, training)
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
    for channels in dict.fromkeys(norm.num_features for norm in norms):
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
    first = child_at(module, norms[0].path).num_features
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
        guards += [(path, name, Frozen(getattr(norm, name), "equal")) for name in _PASSED_ON]
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
    return plan._replace(**_structure(module, plan))


def _structure(module: nn.Module, plan: UnitPlan) -> dict[str, Any]:
    """The containers of a block, and its descendants that a plan does not read at every call."""
    read = {*plan.norms, *plan.convs, *plan.inert, plan.projection, *plan.acts}
    containers: list[Container] = []
    others: list[tuple[Path, type]] = []

    def visit(child: nn.Module | None, path: Path) -> None:
        if path and (child is None or is_leaf(child)):
            if path not in read:
                others.append((path, type(child)))
            return
        assert child is not None
        children = tuple((*path, name) for name in child._modules)
        containers.append(Container(path, type(child), children, tuple(child._parameters)))
        for name, grandchild in child._modules.items():
            visit(grandchild, (*path, name))

    visit(module, ())
    return {"containers": tuple(containers), "others": tuple(others)}


class _Trial:
    """Copies of a module with random parameters, and steps of them.

    In float64, so that rounding hides no difference, and in float32 under autocast, which leaves
    float64 alone. Random parameters, so that no zero hides one. On a CPU.
    """

    def __init__(self, module: nn.Module, plan: UnitPlan, training: bool) -> None:
        self.module, self.plan, self.training = module, plan, training
        self.generator = torch.Generator().manual_seed(0)
        self.values: dict[int, Tensor] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            value = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            if tensor.is_floating_point():
                value = self._random(torch.rand, tensor.shape) + 0.5
            if tensor.dim() > 1:
                value = value - 1.0  # signs in weights, so that activations see both
            self.values[id(tensor)] = value

    def _random(self, draw: Any, shape: Any) -> Tensor:
        drawn: Tensor = draw(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn

    def copy(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A twin in ``dtype``."""
        memo: dict[int, Any] = {}
        for parameter in self.module.parameters():
            value = self.values[id(parameter)].to(dtype, copy=True)
            memo[id(parameter)] = nn.Parameter(value)
        for buffer in self.module.buffers():
            value = self.values[id(buffer)]
            memo[id(buffer)] = value.to(
                dtype if value.is_floating_point() else value.dtype, copy=True
            )
        keep_groups(self.module, memo)
        twin = copy.deepcopy(self.module, memo)
        for child in twin.modules():
            child.training = self.training
            unhook(child)
        make_local(twin)
        return twin

    def images(self, channels: int, height: int, width: int) -> Tensor:
        return self._random(torch.randn, (2, channels, height, width))

    def own(self, twin: nn.Module, x: Tensor) -> list[Any]:
        """Output, buffers and gradients of a twin's own forward."""
        x = x.clone().requires_grad_()
        return _step(twin, twin(x), x)

    def fused(self, twin: nn.Module, x: Tensor) -> list[Any]:
        """The same of the chain that its plan gives."""
        unit = modules_of(twin, self.plan, guarded=False)
        assert isinstance(unit, UnitModules)
        x = x.clone().requires_grad_()
        return _step(twin, run_chain([Reading(unit)], x, backend="aten"), x)


def _step(twin: nn.Module, out: Any, x: Tensor) -> list[Any]:
    if not isinstance(out, Tensor):
        raise NotAUnitError(f"returns a {type(out).__name__}, not one tensor", True)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
    wanted = [x, *twin.parameters()]
    found = torch.autograd.grad(out, wanted, g.to(out.dtype), allow_unused=True)
    return [out.detach(), *twin.buffers(), *found]


def _try(module: nn.Module, plan: UnitPlan, training: bool) -> None:
    """Run a copy's own forward and its plan on trial inputs; raise unless they are the same.

    A trace cannot see what Python decided on the type of its input, nor what its code changed.
    """
    trial = _Trial(module, plan, training)
    unit = modules_of(trial.copy(), plan, guarded=False)
    if isinstance(unit, str):
        return  # nothing would run fused now: there is nothing to compare
    channels = unit.norms[0].num_features
    states = random_states()
    failure: Exception | None = None
    try:
        with no_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            for size in _TRIAL_SIZES:
                twin, x = trial.copy(), trial.images(channels, *size)
                before = _read_in(twin, plan)
                try:
                    expected = trial.own(twin, x)
                    found = trial.fused(trial.copy(), x)
                except NotAUnitError:
                    raise
                except Exception as error:
                    failure = failure or error
                    continue
                for (path, name, now), frozen in zip(_values_in(twin, plan), before):
                    if not is_same(frozen, now):
                        what = difference(frozen, now, dotted((*path, name))).split(",")[0]
                        raise NotAUnitError(f"its forward changes what it reads: {what}", True)
                reason = plan.watch.changed()
                if reason:
                    raise NotAUnitError(f"its forward changes what it reads: {reason}", True)
                _compare(found, expected, 1e-6)
                break
            else:
                line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
                fails = "" if isinstance(failure, UnfitError) else "its forward fails on a trial: "
                raise NotAUnitError(f"{fails}{line}", True)
            half = x.float()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                theirs = trial.own(trial.copy(torch.float32), half)
                mine = trial.fused(trial.copy(torch.float32), half)
            # Some gradients are sums that come to nothing but rounding.
            _compare(mine, theirs, 0.1, max(_norm(each) for each in theirs[1:]))
        if not same_states(states, random_states()):
            raise NotAUnitError("draws random numbers", True)
    finally:
        restore(states)


def _values_in(twin: nn.Module, plan: UnitPlan) -> list[tuple[Path, str, Any]]:
    return [(path, name, lookup(child_at(twin, path), name)) for path, name, _ in plan.guards]


def _read_in(twin: nn.Module, plan: UnitPlan) -> list[Frozen]:
    """What the guards of a plan read, in a copy."""
    inside = {id(child) for child in twin.modules()}
    freezer = Freezer(inside, lambda _: None, lambda _: None)
    frozen = []
    for (path, name, value), (_, _, guard) in zip(_values_in(twin, plan), plan.guards):
        kept = guard.same == "tensor"
        frozen.append(guard if kept else freezer.freeze(value, dotted((*path, name))))
    return frozen


def _norm(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.double().norm())


def _compare(found: list[Any], expected: list[Any], tolerance: float, scale: float = 1e-3) -> None:
    """By the norm of the difference; gradients that are missing must be so in both."""
    for a, b in zip(found, expected):
        if a is None or b is None:
            same = a is b
        else:
            same = a.shape == b.shape and a.dtype == b.dtype
            same = same and _norm(a.double() - b.double()) <= tolerance * max(_norm(b), scale)
        if not same:
            raise NotAUnitError("its forward computes something else than its trace", True)


class Op(NamedTuple):
    """One step of a graph that has been read. inputs, number: positions in the list of steps."""

    number: int
    kind: str  # input, norm, act, pad, conv, add, other
    inputs: tuple[int, ...]
    path: Path = ()
    act: Path | Act | None = None
    norm_type: type | None = None
    in_place: bool = False
    what: str = ""
    pad: Pad = NO_PAD  # before a convolution


class Graph:
    """A traced forward as a list of ``Op``, what passes its input on being left out."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.inert: list[Path] = []
        self.guards: list[tuple[Path, str, tuple[Any, ...]]] = []
        self.reads: list[tuple[Path, Reads]] = []  # of norms with a forward of their own
        self._number: dict[fx.Node, int] = {}
        self.result: int = -1
        for node in reversed(list(graph.nodes)):
            if not node.users and self._harmless(node):
                graph.erase_node(node)
        for node in graph.nodes:
            self._read(node)
        self._fold_pads()
        self.users: list[set[int]] = [set() for _ in self.ops]
        for op in self.ops:
            for number in op.inputs:
                self.users[number].add(op.number)

    def _fold_pads(self) -> None:
        """Make padding a matter of the convolutions that read it, where no one else does."""
        for op in self.ops:
            if op.kind == "conv" and self.ops[op.inputs[0]].kind == "pad":
                pad = self.ops[op.inputs[0]]
                self.ops[op.number] = op._replace(inputs=pad.inputs, pad=pad.pad)
        read = {number for op in self.ops for number in op.inputs} | {self.result}
        for op in self.ops:
            if op.kind == "pad":
                what = "padding that something else than a convolution reads"
                kind = "other" if op.number in read else "folded"
                self.ops[op.number] = op._replace(kind=kind, inputs=(), what=what)

    @staticmethod
    def _harmless(node: fx.Node) -> bool:
        if node.op == "call_method":
            return node.target in ("size", "dim")
        return node.op == "get_attr" or (node.op == "call_function" and node.target in _NO_EFFECT)

    def _add(self, node: fx.Node | None, kind: str, inputs: tuple[int, ...], **rest: Any) -> int:
        op = Op(len(self.ops), kind, inputs, **rest)
        self.ops.append(op)
        if node is not None:
            self._number[node] = op.number
        if op.in_place:
            # What is read of the changed tensor from here on is the result, under any name.
            for name, number in self._number.items():
                if number == inputs[0]:
                    self._number[name] = op.number
        return op.number

    def _read(self, node: fx.Node) -> None:
        inputs = tuple(self._number[n] for n in node.all_input_nodes)
        if node.op == "placeholder":
            self._add(node, "input", ())
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise NotAUnitError(f"returns a {type(result).__name__}, not one tensor")
            self.result = self._number[result]
        elif node.op == "call_module":
            self._read_module(node, inputs)
        elif node.op == "call_function":
            self._read_function(node, inputs)
        elif node.op == "call_method":
            self._read_method(node, inputs)
        else:
            self._add(node, "other", inputs, what=f"the tensor {node.target}")

    def _read_module(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        name = str(node.target)
        path = tuple(name.split("."))
        module = self.root.get_submodule(name)
        one = len(inputs) == 1 and len(node.args) == 1 and not node.kwargs
        if not one:
            self._add(node, "other", inputs, what=f"{type(module).__name__} ({name})")
        elif isinstance(module, NORMS) and is_norm(module):
            self._add(node, "norm", inputs, path=path)
        elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, SyncBatchNorm):
            act, inert, reads = _read_norm(module)
            number = self._add(None, "norm", inputs, path=path, norm_type=type(module))
            self.inert += [(*path, *p) for p in inert]
            self.reads += [(path, each) for each in reads]
            if act is None:
                self._number[node] = number
            else:
                act = act if isinstance(act, Act) else (*path, *act)
                self._add(node, "act", (number,), act=act)
        elif isinstance(module, nn.Conv2d):
            # A parametrization can go again; whether there is one is asked at every call.
            own = type(module).forward is not nn.Conv2d.forward
            if own or not (is_plain(module, nn.Conv2d) or hasattr(module, "parametrizations")):
                raise NotAUnitError(f"{type(module).__name__} ({name}) is not a plain Conv2d")
            self._add(node, "conv", inputs, path=path)
        elif type(module) is nn.Identity or (
            isinstance(module, _DropoutNd) and type(module).__module__ == _DropoutNd.__module__
        ):
            self.inert.append(path)
            self._number[node] = inputs[0]
        elif act_of(module) is not None:
            in_place = getattr(module, "inplace", False)
            self._add(node, "act", inputs, act=path, in_place=in_place)
        elif type(module) is nn.ZeroPad2d and min(module.padding) >= 0:
            self.guards.append((path, "padding", module.padding))
            left, right, top, bottom = module.padding
            self._add(node, "pad", inputs, path=path, pad=(left, right, top, bottom))
        else:
            self._add(node, "other", inputs, what=f"{type(module).__name__} ({name})")

    def _read_function(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        name = getattr(node.target, "__name__", str(node.target))
        if node.target in ACT_FUNCTIONS and len(inputs) == 1:
            act = ACT_FUNCTIONS[node.target](*node.args, **node.kwargs)
            flag = node.kwargs.get("inplace", False) or any(a is True for a in node.args)
            if act is not None:
                self._add(node, "act", inputs, act=act, in_place=flag or name.endswith("_"))
                return
        elif node.target in ADDITIONS and self._is_addition(node):
            in_place = node.target is operator.iadd
            self._add(node, "add", self._operands(node), in_place=in_place)
            return
        elif node.target is F.pad and len(inputs) == 1:
            given: Any = node.kwargs
            pad = _pad(*node.args[1:], **given)
            if pad is not None:
                self._add(node, "pad", inputs, pad=pad)
                return
        elif node.target in _DROPOUTS and len(inputs) == 1:
            # F.dropout(input, p=0.5, training=True, inplace=False)
            p = node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)
            on = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
            if p == 0 or on is False:
                self._number[node] = inputs[0]
                return
            name = f"dropout with p = {p} in training"
        if node.target is getattr:
            name = f"a tensor's {node.args[1]}"
        self._add(node, "other", inputs, what=name)

    def _read_method(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        plain = len(node.args) == 1 and not node.kwargs
        if node.target in ("relu", "relu_") and plain:
            in_place = node.target == "relu_"
            self._add(node, "act", inputs, act=Act("relu"), in_place=in_place)
        elif node.target == "clone" and plain:
            # A copy of what nobody writes to: ``match_unit`` refuses what writes into its input.
            self._number[node] = inputs[0]
        elif node.target in ("add", "add_") and self._is_addition(node):
            self._add(node, "add", self._operands(node), in_place=node.target == "add_")
        else:
            self._add(node, "other", inputs, what=f"the method {node.target}")

    @staticmethod
    def _is_addition(node: fx.Node) -> bool:
        two = len(node.args) == 2 and all(isinstance(a, fx.Node) for a in node.args)
        return two and set(node.kwargs) <= {"alpha"} and node.kwargs.get("alpha", 1) in (1, None)

    def _operands(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(self._number[a] for a in node.args if isinstance(a, fx.Node))


def _pad(pad: Any, mode: Any = "constant", value: Any = None, **rest: Any) -> Pad | None:
    """The zeros that ``torch.nn.functional.pad`` adds to height and width, or None."""
    if mode != "constant" or value not in (None, 0) or (rest and set(rest) != {"input"}):
        return None
    given = list(pad) if isinstance(pad, (list, tuple)) else []
    if not all(isinstance(n, int) and n >= 0 for n in given) or len(given) not in (2, 4, 6, 8):
        return None
    given += [0] * (8 - len(given))
    return None if any(given[4:]) else (given[0], given[1], given[2], given[3])


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


# Of a norm, what the chain reads at every call: its own forward must pass on just that.
_PASSED_ON = ("momentum", "eps")


def _read_norm(
    module: nn.BatchNorm2d,
) -> tuple[Path | Act | None, tuple[Path, ...], tuple[Reads, ...]]:
    """The activation in a norm whose class has a forward of its own, what is inert, and its reads.

    Raises:
        NotAUnitError: the forward is not F.batch_norm as BatchNorm2d calls it, then an activation.
    """
    name = type(module).__name__
    computed = [key for key in _PASSED_ON if key not in vars(module)]
    if computed:
        raise NotAUnitError(f"{name} computes its {computed[0]}")
    if module.running_mean is None or module.num_batches_tracked is None:
        raise NotAUnitError(f"{name} has a forward of its own and no running statistics")
    found, all_reads = [], []
    for training in (True, False):
        trial = copy.deepcopy(module)
        graph, reads = trace(trial, training, module.num_features)
        found.append(_norm_activation(graph, trial, training))
        all_reads.append(reads)
    if found[0] != found[1]:
        raise NotAUnitError(f"{name} computes something else in training than in evaluation")
    return *found[0], tuple(all_reads)


def _norm_activation(
    graph: fx.Graph, module: nn.BatchNorm2d, training: bool
) -> tuple[Path | Act | None, tuple[Path, ...]]:
    name = type(module).__name__
    counted = normed = False
    node = None
    for call in list(graph.nodes):
        if call.op == "call_method" and call.target == "add_":
            source = call.args[0]
            counted = isinstance(source, fx.Node) and str(source.target) == "num_batches_tracked"
            if not counted or call.args[1:] != (1,):
                raise NotAUnitError(f"{name} changes more than num_batches_tracked")
            call.replace_all_uses_with(source)
            graph.erase_node(call)
        elif call.op == "call_function" and call.target is F.batch_norm:
            if normed or node is None:
                raise NotAUnitError(f"{name} normalises twice")
            normed = True
            names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = dict(zip(names, call.args[1:])) | call.kwargs
            read = {k: v.target if isinstance(v, fx.Node) else v for k, v in given.items()}
            affine = {k: k if getattr(module, k) is not None else None for k in ("weight", "bias")}
            expected = {
                "running_mean": "running_mean",
                "running_var": "running_var",
                **affine,
                "training": training,
                "momentum": module.momentum,
                "eps": module.eps,
            }
            if call.args[0] is not node or read != expected:
                raise NotAUnitError(
                    f"{name} calls batch_norm with something else than BatchNorm2d does"
                )
            call.replace_all_uses_with(node)
            graph.erase_node(call)
        elif call.op == "placeholder":
            node = call
    if not normed or counted != training:
        raise NotAUnitError(f"{name} does not compute what BatchNorm2d does")
    rest = Graph(graph, module)
    if any(op.kind not in ("input", "act") for op in rest.ops) or len(rest.ops) > 2:
        raise NotAUnitError(f"{name} computes more than a norm and an activation")
    return rest.ops[rest.result].act, tuple(rest.inert)
