"""What a module computes, read off its dataflow: is it one pre-activation unit (design 2)?

``read_unit`` runs a module's forward once with proxies (torch.fx) on a deep copy and compares the
graph with the one thing that this library computes: k times norm -> act -> conv, then the addition
of a shortcut. Names of classes and attributes say nothing (modules of one name compute different
functions), so none is looked at. A module is either exactly a unit or is left alone.

A trace fixes what Python decided on the way. Whatever plain attribute a forward read is therefore
written down as a guard, and ``recipe_of`` looks at the guards, the hooks and the children again at
every call.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from .kernels.operands import Act
from .run import NO_PAD, Pad, Recipe, act_of, hooked, is_plain, run_chain, why_not
from .spec import IDENTITY_PREACT, IDENTITY_RAW, PROJECTION_PREACT, PROJECTION_RAW

Path = tuple[str, ...]

# More norms than any unit has: a whole stage or model, whose children are looked at instead.
MOST_NORMS = 16

# Of images for a trial; some blocks take only even sizes, or squares.
_TRIAL_SIZES = ((8, 6), (16, 16), (7, 7))

_SIMPLE = (bool, int, float, str, type(None), torch.dtype)
# What every nn.Module has, besides ``training``, is no choice of a forward.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


class NotAUnitError(Exception):
    """Why a module is not exactly a pre-activation unit.

    resembles: whether its own forward adds two tensors, or cannot be traced.
    """

    resembles = False


class Container(NamedTuple):
    """A module that holds others: its class, its children's paths and its own parameters' names."""

    path: Path
    kind: type
    children: tuple[Path, ...]
    parameters: tuple[str, ...]


class UnitPlan(NamedTuple):
    """Where a block's children are, in the order of the computation; paths are relative to it.

    norms, convs: one each per repetition. norm_types: None, or the subclass of BatchNorm2d whose
    own forward was found to compute BatchNorm2d's function and the activation. acts: per
    repetition a module's path, or the activation that was called as a function. projection: its
    path, if any. pads: as in ``Recipe``. inert: modules that pass their input on (identity,
    dropout that is off).
    containers: the block and the modules between it and these, whose calls are bypassed. others:
    all other descendants (path, type; NoneType for a child that is None). guards: (path,
    attribute, value) of the plain attributes that the forward read. otherwise: why the block is
    no unit in the other mode (training, evaluation), or empty.
    """

    norms: tuple[Path, ...]
    norm_types: tuple[type | None, ...]
    convs: tuple[Path, ...]
    acts: tuple[Path | Act, ...]
    shortcut: int
    projection: Path | None
    add_in_place: bool
    pads: tuple[Pad, ...]
    inert: tuple[Path, ...]
    containers: tuple[Container, ...]
    others: tuple[tuple[Path, type], ...]
    guards: tuple[tuple[Path, str, Any], ...]
    otherwise: str = ""


def child_at(module: nn.Module, path: Path) -> Any:
    """The descendant at ``path``, or None where there is none."""
    for name in path:
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def recipe_of(block: nn.Module, plan: UnitPlan) -> Recipe | str:
    """The block's children as they are now, or why they must run one by one."""
    # Every child once, container by container: a call of ``child_at`` for each costs as much again.
    at: dict[Path, Any] = {(): block}
    for path, kind, children, parameters in plan.containers:
        module = at[path]
        if path and type(module) is not kind:
            return f"{_dotted(path)} was replaced by {type(module).__name__}"
        inner = module._modules
        if len(inner) != len(children) or tuple(module._parameters) != parameters:
            return f"{_dotted(path)} has other children than when the block was fused"
        if path and hooked(module):
            return f"a hook on {_dotted(path)}"
        for child in children:
            if child[-1] not in inner:
                return f"{_dotted(child)} is gone"
            at[child] = inner[child[-1]]
    for path, name, value in plan.guards:
        module = at[path] if path in at else child_at(block, path)
        now = getattr(module, name, NotAUnitError)
        if now is not value and not (isinstance(value, _SIMPLE) and now == value):
            if name == "training" and plan.otherwise:
                return plan.otherwise
            return f"{_dotted((*path, name))} is {now!r}, was {value!r} when the block was fused"
    for path, kind in plan.others:
        if type(at[path]) is not kind:
            return f"{_dotted(path)} was replaced by {type(at[path]).__name__}"
    for path in plan.inert:
        module = at[path] if path in at else child_at(block, path)
        reason = _why_active(module)
        if reason is not None:
            return f"{_dotted(path)}: {reason}"
    act: Act | None = None
    for where in plan.acts:
        here = where
        if not isinstance(here, Act):
            module = at[here] if here in at else child_at(block, here)
            if not isinstance(module, nn.Module):
                return f"{_dotted(here)} is gone"
            if hooked(module):
                return f"a hook on {_dotted(here)}"
            found = act_of(module)
            if found is None:
                return f"activation {type(module).__name__} is not one that kernels know"
            here = found
        if act is not None and here != act:
            return f"activations differ: {act.kind} and {here.kind}"
        act = here
    assert act is not None
    recipe = Recipe(
        tuple([at[path] for path in plan.norms]),
        tuple([at[path] for path in plan.convs]),
        act,
        plan.shortcut,
        None if plan.projection is None else at[plan.projection],
        plan.add_in_place,
        plan.pads,
    )
    return why_not(recipe, plan.norm_types) or recipe


def signature(module: nn.Module) -> Any:
    """Equal for modules that compute the same: classes, plain attributes, children, parameters.

    Whatever else a module holds goes in by identity, so that only like blocks are alike.
    """
    parts: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        values = []
        for key, value in vars(child).items():
            if key in _INTERNAL:
                continue
            simple = isinstance(value, (*_SIMPLE, tuple)) and _hashable(value)
            values.append((key, type(value), value if simple else id(value)))
        tensors = [
            (key, None if tensor is None else tensor.dim())
            for group in (child._parameters, child._buffers)
            for key, tensor in group.items()
        ]
        none = tuple(key for key, value in child._modules.items() if value is None)
        hooks = "forward" in vars(child)
        parts.append((name, type(child), tuple(values), tuple(tensors), none, hooks))
    # A module that is called in two places is not two modules that are alike.
    numbers: dict[int, int] = {}
    for _, child in module.named_modules(remove_duplicate=False):
        numbers.setdefault(id(child), len(numbers))
    same = tuple(numbers[id(c)] for _, c in module.named_modules(remove_duplicate=False))
    return tuple(parts), same


def _hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def describe_unit(block: nn.Module, plan: UnitPlan) -> str:
    """In words what a plan is: "basic, projection from raw"."""
    kernels = [child_at(block, path).kernel_size for path in plan.convs]
    k = len(kernels)
    bottleneck = k == 3 and kernels[0] == kernels[2] == (1, 1)
    name = "basic" if k == 2 else "bottleneck" if bottleneck else f"{k} convolutions"
    shortcuts = {
        IDENTITY_RAW: "identity",
        IDENTITY_PREACT: "identity from preact",
        PROJECTION_RAW: "projection from raw",
        PROJECTION_PREACT: "projection from preact",
    }
    return f"{name}, {shortcuts[plan.shortcut]}"


def _dotted(path: Path) -> str:
    return ".".join(path) or "the block"


def _why_active(module: Any) -> str | None:
    """Why a module that was the identity when it was traced is not now, or None."""
    if not isinstance(module, nn.Module):
        return "is gone"
    if hooked(module):
        return "a hook"
    if type(module) is nn.Identity or (type(module) is nn.Sequential and not len(module)):
        return None
    if isinstance(module, _DropoutNd) and type(module).__module__ == _DropoutNd.__module__:
        active = module.training and module.p > 0
        return f"dropout with p = {module.p} in training" if active else None
    return f"{type(module).__name__} in place of an identity"


class _Size:
    """The shape of a ``_Value``: rank and channels are known, N, H and W only symbolically."""

    def __init__(self, value: _Value) -> None:
        self.value = value

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: Any) -> Any:
        channels = self.value.layout.channels
        if index in (1, -3) and channels is not None:
            return channels
        return fx.Proxy.__getattr__(self.value, "shape")[index]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(4))

    def __eq__(self, other: object) -> bool:
        mine = self.value.layout
        if not isinstance(other, _Size) or mine.channels is None:
            raise NotAUnitError("its course depends on the size of the input")
        theirs = other.value.layout
        if theirs.channels is not None and theirs.channels != mine.channels:
            return False
        if theirs == mine:
            return True
        raise NotAUnitError("its course depends on the size of the input")

    __hash__ = None  # type: ignore[assignment]


class _Layout(NamedTuple):
    """What is known of a value's shape: channels, and the list of what changed height and width."""

    channels: int | None
    spatial: tuple[Any, ...] = ()


class _Value(fx.Proxy):
    """A proxy for (N, C, H, W) that answers what a forward may ask of any such tensor."""

    layout = _Layout(None, ("unknown",))
    is_image = False

    def dim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "dim")()

    @property
    def ndim(self) -> Any:
        return 4 if self.is_image else fx.Proxy.__getattr__(self, "ndim")

    @property
    def shape(self) -> Any:
        return _Size(self) if self.is_image else fx.Proxy.__getattr__(self, "shape")

    def size(self, *args: Any) -> Any:
        if self.is_image and not args:
            return _Size(self)
        if self.is_image and args[0] in (1, -3) and self.layout.channels is not None:
            return self.layout.channels
        return fx.Proxy.__getattr__(self, "size")(*args)

    def __iadd__(self, other: Any) -> Any:  # fx would take it for an addition out of place
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})


class _Tracer(fx.Tracer):
    """Traces with the modules of torch.nn as leaves, but for containers; norms of any class too."""

    proxy_buffer_attributes = True

    def __init__(self, channels: int | None) -> None:
        super().__init__()
        self.channels = channels

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # The root too can be of a leaf's class (a norm's own forward is traced like a block's).
        return m is not self.root and _is_leaf(m)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        value = _Value(node, self)
        layout = self._layout(node)
        if layout is not None:
            value.is_image, value.layout = True, layout
        node.meta["layout"] = layout
        return value

    def _layout(self, node: fx.Node) -> _Layout | None:
        if node.op == "placeholder":
            return _Layout(self.channels)
        source = node.args[0] if node.args else None
        before = source.meta.get("layout") if isinstance(source, fx.Node) else None
        if before is None:
            return None
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            if isinstance(module, nn.Conv2d):
                kept = not isinstance(module.padding, str) and all(
                    s == 1 and 2 * p == d * (k - 1)
                    for s, p, d, k in zip(
                        module.stride, module.padding, module.dilation, module.kernel_size
                    )
                )
                change = () if kept else (str(node.target),)
                return _Layout(module.out_channels, before.spatial + change)
            known = isinstance(module, (nn.BatchNorm2d, nn.Identity, _DropoutNd))
            return before if known or act_of(module) is not None else None
        known = node.target in _ACT_FUNCTIONS or node.target in _ADDITIONS
        return before if known or node.target in ("relu", "relu_", "add", "add_") else None


def _is_leaf(module: nn.Module) -> bool:
    if isinstance(module, (_BatchNorm, _ConvNd, _DropoutNd)):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _act_function(kind: str) -> Any:
    # Bound like the call itself, so that slopes and flags are found wherever they were passed.
    def relu(input: Any, inplace: bool = False) -> Act:
        return Act("relu")

    def leaky_relu(input: Any, negative_slope: Any = 0.01, inplace: bool = False) -> Act | None:
        known = isinstance(negative_slope, (int, float)) and negative_slope >= 0
        return Act("leaky_relu", float(negative_slope)) if known else None

    def silu(input: Any, inplace: bool = False) -> Act:
        return Act("silu")

    def gelu(input: Any, approximate: str = "none") -> Act | None:
        return Act("gelu") if approximate == "none" else None

    return {"relu": relu, "leaky_relu": leaky_relu, "silu": silu, "gelu": gelu}[kind]


_ACT_FUNCTIONS: dict[Any, Callable[..., Act | None]] = {
    F.relu: _act_function("relu"),
    F.relu_: _act_function("relu"),
    torch.relu: _act_function("relu"),
    torch.relu_: _act_function("relu"),
    F.leaky_relu: _act_function("leaky_relu"),
    F.leaky_relu_: _act_function("leaky_relu"),
    F.silu: _act_function("silu"),
    F.gelu: _act_function("gelu"),
}
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)
_NO_EFFECT = (torch._assert, getattr, operator.getitem)


class _Op(NamedTuple):
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


class _Graph:
    """A traced forward as a list of ``_Op``, what passes its input on being left out."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.ops: list[_Op] = []
        self.inert: list[Path] = []
        self.guards: list[tuple[Path, str, Any]] = []
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
        op = _Op(len(self.ops), kind, inputs, **rest)
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
        elif isinstance(module, nn.BatchNorm2d):
            if is_plain(module, nn.BatchNorm2d):
                self._add(node, "norm", inputs, path=path)
                return
            act, inert, guards = _read_norm(module)
            number = self._add(None, "norm", inputs, path=path, norm_type=type(module))
            self.inert += [(*path, *p) for p in inert]
            self.guards += [((*path, *p), name, value) for p, name, value in guards]
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
        if node.target in _ACT_FUNCTIONS and len(inputs) == 1:
            act = _ACT_FUNCTIONS[node.target](*node.args, **node.kwargs)
            flag = node.kwargs.get("inplace", False) or any(a is True for a in node.args)
            if act is not None:
                self._add(node, "act", inputs, act=act, in_place=flag or name.endswith("_"))
                return
        elif node.target in _ADDITIONS and self._is_addition(node):
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
        self._add(node, "other", inputs, what=name)

    def _read_method(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        plain = len(node.args) == 1 and not node.kwargs
        if node.target in ("relu", "relu_") and plain:
            in_place = node.target == "relu_"
            self._add(node, "act", inputs, act=Act("relu"), in_place=in_place)
        elif node.target in ("clone", "contiguous") and plain:
            # A copy of what nobody writes to: ``_match`` refuses what writes into its input.
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


class _Match(NamedTuple):
    links: list[tuple[_Op, _Op | None, _Op]]  # norm, act, conv in the order of the computation
    shortcut: int
    projection: _Op | None
    add: _Op


def _match(graph: _Graph) -> _Match:
    """The unit that a graph is; raises ``NotAUnitError`` with the difference."""
    ops, users = graph.ops, graph.users
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
    reasons = []
    for branch, other in (add.inputs, add.inputs[::-1]):
        try:
            links = _branch(graph, ops[branch], add)
            return _Match(links, *_shortcut(graph, links, ops[other], add), add)
        except NotAUnitError as reason:
            reasons.append(reason)
    assert users
    # The first side that has convolutions says more than one that is the bare input.
    bare = ops[add.inputs[0]].kind == "input"
    raise reasons[1] if bare else reasons[0]


def _branch(graph: _Graph, last: _Op, add: _Op) -> list[tuple[_Op, _Op | None, _Op]]:
    ops, users = graph.ops, graph.users
    links: list[tuple[_Op, _Op | None, _Op]] = []
    conv, reader = last, add.number
    while True:
        if conv.kind != "conv":
            place = f"{_dotted(conv.path)} " if conv.path else ""
            raise NotAUnitError(f"{conv.kind} {place}stands where a convolution would")
        if users[conv.number] != {reader}:
            raise NotAUnitError(f"the output of {_dotted(conv.path)} is read more than once")
        z = ops[conv.inputs[0]]
        act = z if z.kind == "act" else None
        norm = ops[act.inputs[0]] if act is not None else z
        if norm.kind != "norm":
            raise NotAUnitError(f"{_dotted(conv.path)} does not read an activated norm")
        if act is not None and users[norm.number] != {act.number}:
            raise NotAUnitError(f"the output of {_dotted(norm.path)} is read more than once")
        links.insert(0, (norm, act, conv))
        source = ops[norm.inputs[0]]
        if source.kind == "input":
            break
        if users[z.number] != {conv.number}:
            raise NotAUnitError(f"the input of {_dotted(conv.path)} is read elsewhere too")
        conv, reader = source, norm.number
    return links


def _shortcut(
    graph: _Graph, links: list[tuple[_Op, _Op | None, _Op]], other: _Op, add: _Op
) -> tuple[int, _Op | None]:
    ops, users = graph.ops, graph.users
    norm, act, _ = links[0]
    z = act or norm
    x = norm.inputs[0]
    projection = None
    if other.number == x:
        shortcut = IDENTITY_RAW
    elif other.number == z.number:
        shortcut = IDENTITY_PREACT
    elif other.kind == "conv" and users[other.number] == {add.number}:
        projection = other
        if other.inputs[0] == x:
            shortcut = PROJECTION_RAW
        elif other.inputs[0] == z.number:
            shortcut = PROJECTION_PREACT
        else:
            raise NotAUnitError(f"{_dotted(other.path)} reads neither x nor act(norm(x))")
    else:
        raise NotAUnitError(f"its shortcut ends in {other.kind} {_dotted(other.path)}")
    part = {op.number for link in links for op in link if op is not None}
    part |= {x, add.number, *([] if projection is None else [projection.number])}
    for op in ops:
        if op.number not in part and op.kind != "folded":
            raise NotAUnitError(f"{op.kind} {_dotted(op.path)} is computed besides")
    if add.in_place and add.inputs[0] in (x, z.number):
        raise NotAUnitError("the addition writes into its input")
    return shortcut, projection


def _read_norm(
    module: nn.BatchNorm2d,
) -> tuple[Path | Act | None, tuple[Path, ...], tuple[tuple[Path, str, Any], ...]]:
    """The activation in a norm whose class has a forward of its own, what is inert, and guards.

    Raises:
        NotAUnitError: the forward is not F.batch_norm as BatchNorm2d calls it, then an activation.
    """
    name = type(module).__name__
    if module.running_mean is None or module.num_batches_tracked is None:
        raise NotAUnitError(f"{name} has a forward of its own and no running statistics")
    found = []
    # Values that nothing else has: where they turn up in the call, these attributes were read.
    constants = {"momentum": 0.1257, "eps": 3.75e-4}
    for training in (True, False):
        trial = copy.deepcopy(module)
        for key, value in constants.items():
            setattr(trial, key, value)
        graph, log = _trace(trial, training, module.num_features)
        ignored = {"training", "momentum", "eps", "track_running_stats", "affine", "num_features"}
        guards = tuple(
            (path, key, value)
            for path, key, value in _guards(module, log)
            if path or key not in ignored
        )
        found.append((_norm_activation(graph, trial, training), guards))
    if found[0] != found[1]:
        raise NotAUnitError(f"{name} computes something else in training than in evaluation")
    (act, inert), guards = found[0]
    return act, inert, guards


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
    rest = _Graph(graph, module)
    if any(op.kind not in ("input", "act") for op in rest.ops) or len(rest.ops) > 2:
        raise NotAUnitError(f"{name} computes more than a norm and an activation")
    return rest.ops[rest.result].act, tuple(rest.inert)


Log = dict[tuple[Path, str], None]


def _recording(kind: type[nn.Module], path: Path, log: Log) -> type[nn.Module]:
    """A subclass that notes in ``log`` which plain attributes are read."""

    class Recording(kind):  # type: ignore[misc, valid-type]
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name in _INTERNAL or name.startswith("__"):
                return value
            own = name in super().__getattribute__("__dict__")
            if own or not (callable(value) or isinstance(getattr(kind, name, None), property)):
                log[path, name] = None
            return value

    Recording.__name__ = Recording.__qualname__ = kind.__name__
    Recording.__module__ = kind.__module__
    return Recording


def _trace(module: nn.Module, training: bool, channels: int | None) -> tuple[fx.Graph, Log]:
    """The graph of a copy's forward on one tensor, and the plain attributes read.

    ``module`` is used up: a forward may leave proxies in it.
    """
    log: Log = {}
    for name, child in list(module.named_modules()):
        child.training = training
        _unhook(child)
        path = tuple(name.split(".")) if name else ()
        if child is module or not _is_leaf(child):
            child.__class__ = _recording(type(child), path, log)
    root = type(module)
    inner = root.forward

    def forward(self: nn.Module, input: Any) -> Any:
        return inner(self, input)

    root.forward = forward  # type: ignore[method-assign]  # one argument, the others' defaults

    before = _contents(module)
    as_tensor = torch.as_tensor
    states = _random_states()
    try:
        # No torch function to a tracer, but of no effect on a tensor.
        torch.as_tensor = lambda data, *a, **k: (  # type: ignore[assignment]
            data if type(data) is _Value and not a and not k else as_tensor(data, *a, **k)
        )
        graph = _Tracer(channels).trace(module)
        if _random_states() != states:
            raise NotAUnitError("draws random numbers")
        if _contents(module) != before:
            raise NotAUnitError("its forward changes attributes")
    except NotAUnitError:
        raise
    except Exception as error:  # a forward may raise anything when it is given a proxy
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NotAUnitError(f"cannot be traced: {line}") from error
    finally:
        torch.as_tensor = as_tensor
        torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
    return graph, log


def _random_states() -> tuple[Any, Any, Any]:
    """Of torch, Python and NumPy, comparable."""
    legacy: Any = np.random.get_state()  # noqa: NPY002
    name, keys, *rest = legacy
    state = (name, tuple(keys.tolist()), *rest)
    return tuple(torch.get_rng_state().tolist()), random.getstate(), state


def _contents(module: nn.Module) -> list[Any]:
    """By identity, what all modules' attributes and the containers among them hold."""

    def items(value: Any) -> Any:
        if isinstance(value, (list, tuple, set)):
            return [id(item) for item in value]
        if isinstance(value, dict):
            return [(key, id(item)) for key, item in value.items()]
        return None

    return [
        [(key, id(value), items(value)) for key, value in vars(child).items()]
        for child in module.modules()
    ]


def _guards(module: nn.Module, log: Log) -> Iterator[tuple[Path, str, Any]]:
    """What the attributes in ``log`` are in ``module`` itself."""
    for path, name in log:
        value = getattr(child_at(module, path), name, None)
        # Children are read afresh and checked themselves; a list of them is held by identity.
        if not isinstance(value, (nn.Module, Tensor)):
            yield path, name, value


def _copy(module: nn.Module) -> nn.Module:
    """A deep copy with tensors on the meta device: nothing large is copied, nothing can change."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)


def _try(module: nn.Module, plan: UnitPlan, training: bool) -> None:
    """Run a copy's own forward and its plan on a trial input; raise unless they are the same.

    A trace cannot see what Python decided on the type of its input (``isinstance(x, Tensor)``).
    In float64, on a CPU, with random parameters, so that no zero hides a difference.
    """
    generator = torch.Generator().manual_seed(0)
    tensors: dict[int, Tensor] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        values = torch.zeros(tensor.shape, dtype=tensor.dtype)
        if tensor.is_floating_point():
            values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.5
        tensors[id(tensor)] = values

    def trial_copy() -> nn.Module:
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            # Signs in weights, so that activations see both.
            value = tensors[id(parameter)]
            value = value - (value.dim() > 1) * 1.0
            memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
        for buffer in module.buffers():
            memo[id(buffer)] = tensors[id(buffer)].clone()
        twin = copy.deepcopy(module, memo)
        for child in twin.modules():
            child.training = training
            _unhook(child)
        return twin

    if isinstance(recipe_of(trial_copy(), plan), str):
        return  # nothing would run fused now: there is nothing to compare
    failure: Exception | None = None
    for height, width in _TRIAL_SIZES:
        mine, theirs = trial_copy(), trial_copy()
        recipe = recipe_of(mine, plan)
        assert isinstance(recipe, Recipe)
        size = (2, recipe.norms[0].num_features, height, width)
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        try:
            with torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
                expected = theirs(x.clone())
                found = run_chain([recipe], x, backend="aten")
            break
        except Exception as error:
            failure = failure or error
    else:
        line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
        raise NotAUnitError(f"its forward fails on a trial input: {line}") from failure
    pairs = [(found, expected), *zip(mine.buffers(), theirs.buffers())]
    for a, b in pairs:
        same = isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype
        if not same or not torch.allclose(a, b, rtol=1e-6, atol=1e-9 * float(b.abs().max())):
            raise NotAUnitError("its forward computes something else than its trace")


def _unhook(module: nn.Module) -> None:
    """Take away what is hooked on a copy: it must not run for a trace or trial."""
    module.__dict__.pop("forward", None)
    for hooks in (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    ):
        hooks.clear()


def read_unit(module: nn.Module) -> tuple[UnitPlan, ...]:
    """The plans of a module that is one pre-activation unit: one, or two if training differs.

    Raises:
        NotAUnitError: it is not, or that cannot be told; says why.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    channels = norms[0].num_features if norms else None
    plans: list[UnitPlan] = []
    reason: NotAUnitError | None = None
    for training in (True, False):
        try:
            pristine = _copy(module)
        except Exception as error:
            raise NotAUnitError(f"cannot be copied: {error}") from error
        graph = None
        try:
            graph, log = _trace(pristine, training, channels)
            resembles = any(_adds(node) for node in graph.nodes)
            plan = _plan(module, pristine, graph, log, training, channels)
            _try(module, plan, training)
            plans.append(plan)
        except NotAUnitError as error:
            error.resembles = graph is None or resembles
            reason = reason or error
    if not plans:
        assert reason is not None
        raise reason
    plain = [p._replace(guards=tuple(g for g in p.guards if g[1] != "training")) for p in plans]
    if len(plans) == 2 and plain[0] == plain[1]:
        return (plain[0],)
    if reason is not None:
        return (plans[0]._replace(otherwise=str(reason)),)
    return tuple(plans)


def _adds(node: fx.Node) -> bool:
    """Whether a node adds two tensors in the traced module's own forward."""
    known = node.target in _ADDITIONS or (node.op == "call_method" and "add" in str(node.target))
    return known and len(node.all_input_nodes) == 2 and not node.meta.get("nn_module_stack")


def _plan(
    module: nn.Module,
    traced: nn.Module,
    fx_graph: fx.Graph,
    log: Log,
    training: bool,
    channels: int | None,
) -> UnitPlan:
    graph = _Graph(fx_graph, traced)
    match = _match(graph)
    norms = [norm for norm, _, _ in match.links]
    first = child_at(module, norms[0].path)
    if first.num_features != channels:
        raise NotAUnitError(f"{_dotted(norms[0].path)} is not the first of its norms")
    guards = [*_guards(module, log), *graph.guards]
    reads = {path for path, name, _ in guards if name == "training"}
    guards = [
        (path, name, training if name == "training" and path in reads else value)
        for path, name, value in guards
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
        guards=tuple(guards),
    )
    return plan._replace(**_structure(module, plan))


def _structure(module: nn.Module, plan: UnitPlan) -> dict[str, Any]:
    """The containers of a block, and its descendants that a plan does not read at every call."""
    read = {*plan.norms, *plan.convs, *plan.inert, plan.projection, *plan.acts}
    containers: list[Container] = []
    others: list[tuple[Path, type]] = []

    def visit(child: nn.Module | None, path: Path) -> None:
        if path and (child is None or _is_leaf(child)):
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
