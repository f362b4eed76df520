"""A traced forward as operations that units are made of: norms, activations, convolutions, sums."""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import is_norm, is_plain
from ..core.modules import Pad, act_of
from ..core.norms import NORMS
from ..core.sync import SyncBatchNorm
from ..kernels.operands import Act
from .formula import Path, ancestors
from .functional import (
    PRODUCTS,
    changes_in_place,
    name_silu,
    number_at_end,
    operands,
    read_conv2d,
    read_group_norm,
)
from .ops import Op, fold_pads, fold_sides
from .reads import Reads
from .reasons import NotAUnitError
from .trace import (
    ACT_FUNCTIONS,
    ADDITIONS,
    trace,
)

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)


_NO_EFFECT = (torch._assert, getattr, operator.getitem)


class Graph:
    """A traced forward as a list of ``Op``, what passes its input on being left out."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.ops: list[Op] = []
        self.inert: list[Path] = []
        self.guards: list[tuple[Path, str, Any]] = []
        self.reads: list[tuple[Path, Reads]] = []  # of norms with a forward of their own
        self.graph = graph
        self._number: dict[fx.Node, int] = {}
        self._sides: list[fx.Node] = []  # that do not follow from x
        self.result: int = -1
        name_silu(graph)
        for node in reversed(list(graph.nodes)):
            if not node.users and self._harmless(node):
                graph.erase_node(node)
        for node in graph.nodes:
            if node.meta.get("of_x", True):
                self._read(node)
            else:
                self._read_side(node)
        self.result = fold_sides(self.ops, root, self.result)
        fold_pads(self.ops, self.result)
        self._refuse_unused()
        self.users: list[set[int]] = [set() for _ in self.ops]
        for op in self.ops:
            for number in op.inputs:
                self.users[number].add(op.number)

    def _read_side(self, node: fx.Node) -> None:
        self._sides.append(node)
        if changes_in_place(node):
            self._add(None, "other", (), what="a change in place of what is not computed from x")
        elif node.op == "get_attr":
            number = self._names_of(str(node.target))
            if number != 1:
                more = ", which has another name too," if number else ""
                self._add(None, "other", (), what=f"the tensor {node.target}{more}")

    def _names_of(self, name: str) -> int:
        """How many names a parameter or buffer of the root has, of which a trace knows the first
        alone; 0 for another tensor."""
        path, _, attribute = name.rpartition(".")
        owner = self.root.get_submodule(path)
        tensor = owner._parameters.get(attribute, owner._buffers.get(attribute))
        if tensor is None:
            return 0
        tensors = [t for m in self.root.modules() for d in (m._parameters, m._buffers)
                   for t in d.values()]  # fmt: skip
        return sum(each is tensor for each in tensors)

    def _refuse_unused(self) -> None:
        """A step that no unit has for what is computed for nothing: its effects would be lost."""
        used = ancestors(node for op in self.ops for node in op.nodes)
        for node in self._sides:
            if node not in used and node.op not in ("placeholder", "get_attr"):
                self._add(None, "other", (), what=f"{_name_of(node)}, whose result is not used,")

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
        inputs = tuple(self._number[n] for n in node.all_input_nodes if n in self._number)
        if node.op == "placeholder":
            self._add(node, "input", ())
        elif node.op == "output":
            result = node.args[0]
            if not isinstance(result, fx.Node):
                raise NotAUnitError(f"returns a {type(result).__name__}, not one tensor")
            if result not in self._number:
                raise NotAUnitError("returns what is not computed from its input")
            self.result = self._number[result]
        elif node.op == "call_module":
            self._read_module(node, inputs)
        elif node.op == "call_function":
            self._read_function(node, inputs)
        elif node.op == "call_method":
            self._read_method(node, inputs)

    def _other(self, node: fx.Node, inputs: tuple[int, ...], what: str) -> None:
        """A step that no unit has; what follows from a parameter goes by its name."""
        sides = ancestors(n for n in node.all_input_nodes if n not in self._number)
        names = [n.target for n in self.graph.nodes if n in sides and n.op == "get_attr"]
        self._add(node, "other", inputs, what=f"the tensor {names[0]}" if names else what)

    def _read_module(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        name = str(node.target)
        path = tuple(name.split("."))
        module = self.root.get_submodule(name)
        one = len(inputs) == 1 and len(node.args) == 1 and not node.kwargs
        if not one:
            self._other(node, inputs, f"{type(module).__name__} ({name})")
        elif isinstance(module, NORMS) and is_norm(module):
            self._add(node, "norm", inputs, path=path)
        elif isinstance(module, nn.BatchNorm2d) and not isinstance(module, SyncBatchNorm):
            act, inert, reads = _read_norm(module)
            number = self._add(None, "norm", inputs, path=path, own=type(module))
            self.inert += [(*path, *p) for p in inert]
            self.reads += [(path, each) for each in reads]
            if act is None:
                self._number[node] = number
            else:
                act = act if isinstance(act, Act) else (*path, *act)
                self._add(node, "act", (number,), act=act)
        elif isinstance(module, nn.Conv2d):
            # A parametrization can go again; whether there is one is asked at every call.
            if not (is_plain(module, nn.Conv2d) or hasattr(module, "parametrizations")):
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
        elif node.target in (*ADDITIONS, *PRODUCTS) and operands(node) is not None:
            if self._read_binary(node, node.target in (operator.iadd, operator.imul)):
                return
        elif node.target is F.conv2d or node.target is F.group_norm:
            self._read_call(node, inputs)
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
        end = number_at_end(node)
        if end is not None:
            if end[1] == 1:
                self._number[node] = inputs[0]
            else:
                self._add(node, "end", inputs, end=end, what=name)
            return
        if node.target is getattr:
            name = f"a tensor's {node.args[1]}"
        self._other(node, inputs, name)

    def _read_binary(self, node: fx.Node, in_place: bool) -> bool:
        """A sum of two tensors of x, or one of them with what does not follow from x; False for
        other operands."""
        pair = operands(node)
        if pair is None or not all(isinstance(each, fx.Node) for each in pair):
            return False
        of_x = [each for each in pair if each in self._number]
        adds = node.target in (*ADDITIONS, "add", "add_")
        if len(of_x) == 2:
            if adds:
                numbers = (self._number[pair[0]], self._number[pair[1]])
                self._add(node, "add", numbers, in_place=in_place)
            return adds
        side = pair[1] if of_x[0] is pair[0] else pair[0]
        if in_place and side is pair[0]:
            return False
        kind = "shift" if adds else "scale"
        inputs = (self._number[of_x[0]],)
        what = f"{_name_of(node)} with {_name_of(side)}"
        self._add(node, kind, inputs, in_place=in_place, sides=((kind, side),), what=what)
        return True

    def _read_call(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        """conv2d or group_norm, called as a function or by a module's own forward."""
        convolves = node.target is F.conv2d
        call = read_conv2d(node, self.root) if convolves else read_group_norm(node, self.root)
        if isinstance(call, str):
            self._add(node, "other", inputs, what=call)
            return
        self.guards += [(call.path, name, value) for name, value in call.fixed]
        kind = "conv" if convolves else "norm"
        self._add(
            node, kind, inputs, path=call.path, own=call.own, weight=call.weight, bias=call.bias
        )

    def _read_method(self, node: fx.Node, inputs: tuple[int, ...]) -> None:
        plain = len(node.args) == 1 and not node.kwargs
        if node.target in ("relu", "relu_") and plain:
            in_place = node.target == "relu_"
            self._add(node, "act", inputs, act=Act("relu"), in_place=in_place)
        elif node.target == "clone" and plain:
            # A copy of what nobody writes to: ``match_unit`` refuses what writes into its input.
            self._number[node] = inputs[0]
        elif node.target == "contiguous" and plain:
            # Of no effect in front of a convolution, like a padding of nothing; elsewhere who reads
            # the block's output may count on its strides.
            self._add(node, "pad", inputs, what="the method contiguous")
        elif node.target in ("add", "add_") and self._read_binary(node, node.target == "add_"):
            pass
        else:
            self._other(node, inputs, f"the method {node.target}")


def _name_of(node: fx.Node) -> str:
    """A node as a user writes it."""
    if node.op == "call_method":
        return f"the method {node.target}"
    if node.op in ("get_attr", "call_module"):
        return f"{'the tensor ' if node.op == 'get_attr' else ''}{node.target}"
    return str(getattr(node.target, "__name__", node.target))


def _pad(pad: Any, mode: Any = "constant", value: Any = None, **rest: Any) -> Pad | None:
    """The zeros that ``torch.nn.functional.pad`` adds to height and width, or None."""
    if mode != "constant" or value not in (None, 0) or (rest and set(rest) != {"input"}):
        return None
    given = list(pad) if isinstance(pad, (list, tuple)) else []
    if not all(isinstance(n, int) and n >= 0 for n in given) or len(given) not in (2, 4, 6, 8):
        return None
    given += [0] * (8 - len(given))
    return None if any(given[4:]) else (given[0], given[1], given[2], given[3])


# Of a norm, what the chain reads at every call: its own forward must pass on just that.
PASSED_ON = ("momentum", "eps")


def _read_norm(
    module: nn.BatchNorm2d,
) -> tuple[Path | Act | None, tuple[Path, ...], tuple[Reads, ...]]:
    """The activation in a norm whose class has a forward of its own, what is inert, and its reads.

    Raises:
        NotAUnitError: the forward is not F.batch_norm as BatchNorm2d calls it, then an activation.
    """
    name = type(module).__name__
    computed = [key for key in PASSED_ON if key not in vars(module)]
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
