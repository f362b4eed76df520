"""Convolutions and group norms that code calls as functions, and whose tensors they take."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from ..core.checks import is_norm, is_plain
from .formula import Path, ancestors
from .trace import caller_of

_CONV2D = {"input": None, "weight": None, "bias": None, "stride": 1, "padding": 0, "dilation": 1,
           "groups": 1}  # fmt: skip
_GROUP_NORM = {"input": None, "num_groups": None, "weight": None, "bias": None, "eps": 1e-5}


class Call(NamedTuple):
    """A call that computes what a module would, but for the tensors that are given.

    path: the module's. own: its class, if that has a forward of its own. weight, bias: nodes, or
    None for the module's. fixed: attributes of the module that were passed on as they are.
    """

    path: Path
    own: type | None
    weight: fx.Node | None
    bias: fx.Node | None
    fixed: tuple[tuple[str, Any], ...]


def read_conv2d(node: fx.Node, root: nn.Module) -> Call | str:
    """A call of conv2d whose weight and bias do not follow from x, or what is against it."""
    given = _arguments(node, _CONV2D)
    weight, bias = given["weight"], given["bias"]
    if not _of_x(given["input"]) or _of_x(weight) or _of_x(bias):
        return "conv2d with a weight that depends on the input"
    module = caller_of(node, root, nn.Conv2d) or _owner(weight, root, nn.Conv2d)
    if module is None:
        return "conv2d with a weight of no Conv2d"
    name, conv = module
    names = ("stride", "padding", "dilation", "groups")
    for each in names:
        if _pair(given[each]) != _pair(getattr(conv, each)):
            return f"conv2d with another {each} than {name} has"
    fixed = [(each, getattr(conv, each)) for each in names]
    if bias is None:
        if conv.bias is not None:
            return f"conv2d without the bias of {name}"
        fixed.append(("bias", None))
    own = None if is_plain(conv, nn.Conv2d) else type(conv)
    weight = None if _is_attribute(weight, f"{name}.weight") else weight
    bias = None if _is_attribute(bias, f"{name}.bias") else bias
    return Call(tuple(name.split(".")), own, weight, bias, tuple(fixed))


def read_group_norm(node: fx.Node, root: nn.Module) -> Call | str:
    """A call of group_norm with all that a module has, or what is against it."""
    given = _arguments(node, _GROUP_NORM)
    module = caller_of(node, root, nn.GroupNorm) or _owner(given["weight"], root, nn.GroupNorm)
    if module is None:
        return "group_norm with tensors of no GroupNorm"
    name, norm = module
    names = ("num_groups", "eps")
    computed = [each for each in (*names, "num_channels") if each not in vars(norm)]
    if computed:
        return f"{type(norm).__name__}, which computes its {computed[0]},"
    same = all(given[each] == getattr(norm, each) for each in names)
    for each in ("weight", "bias"):
        absent = given[each] is None and getattr(norm, each) is None
        same = same and (absent or _is_attribute(given[each], f"{name}.{each}"))
    if not same or not _of_x(given["input"]):
        return f"group_norm with something else than {name} has"
    fixed = tuple((each, getattr(norm, each)) for each in names)
    own = None if is_norm(norm) else type(norm)
    return Call(tuple(name.split(".")), own, None, None, fixed)


def name_silu(graph: fx.Graph) -> None:
    """x*sigmoid(x), as much code has it, by its name: one node instead of two."""
    for node in list(graph.nodes):
        pair = operands(node) if node.target in (operator.mul, torch.mul) else None
        if pair is None or not node.meta.get("of_x", True):
            continue
        for x, gate in (pair, pair[::-1]):
            if isinstance(gate, fx.Node) and _is_sigmoid_of(gate, x) and len(gate.users) == 1:
                with graph.inserting_before(node):
                    silu = graph.call_function(F.silu, (x,))
                silu.meta = node.meta
                node.replace_all_uses_with(silu)
                graph.erase_node(node)
                graph.erase_node(gate)
                break


def _is_sigmoid_of(gate: fx.Node, x: Any) -> bool:
    return gate.args == (x,) and not gate.kwargs and gate.target in _SIGMOIDS


def operands(node: fx.Node) -> tuple[Any, Any] | None:
    """The two operands of a sum or product, or None for another call."""
    if len(node.args) != 2 or not set(node.kwargs) <= {"alpha"}:
        return None
    return None if node.kwargs.get("alpha", 1) not in (1, None) else (node.args[0], node.args[1])


def number_at_end(node: fx.Node) -> tuple[Callable[[Any, Any], Any], float] | None:
    """The function and the number of a tensor's product with a number, or division by one."""
    if len(node.args) != 2 or node.kwargs:
        return None
    first, second = node.args
    if node.target in PRODUCTS and isinstance(first, (int, float)):
        first, second = second, first
    known = node.target in (*PRODUCTS, *QUOTIENTS)
    if not known or isinstance(second, bool) or not isinstance(second, (int, float)):
        return None
    return (operator.mul if node.target in PRODUCTS else operator.truediv), second


def changes_in_place(node: fx.Node) -> bool:
    """Whether a node's function or method writes into what it is given."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    own = name.endswith("_") and not name.endswith("__")
    asked = any(node.kwargs.get(each) not in (None, False) for each in ("out", "inplace"))
    return own or node.target in _IN_PLACE or asked


def _arguments(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any]:
    return defaults | dict(zip(defaults, node.args)) | dict(node.kwargs)


def _of_x(value: Any) -> bool:
    return isinstance(value, fx.Node) and bool(value.meta["of_x"])


def _owner(weight: Any, root: nn.Module, kind: type[nn.Module]) -> tuple[str, Any] | None:
    """The module of ``kind`` whose weight another was computed from, by its path."""
    if not isinstance(weight, fx.Node):
        return None
    found = ancestors([weight])
    for node in weight.graph.nodes:
        name, _, attribute = str(node.target).rpartition(".")
        if node in found and node.op == "get_attr" and attribute == "weight" and name:
            module = root.get_submodule(name)
            if isinstance(module, kind):
                return name, module
    return None


def _is_attribute(value: Any, name: str) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr" and value.target == name


def _pair(value: Any) -> Any:
    """As Conv2d keeps strides and paddings; groups are one number on both sides."""
    if isinstance(value, int):
        return (value, value)
    return tuple(value) if isinstance(value, (tuple, list)) else value


_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid")
PRODUCTS = (operator.mul, operator.imul, torch.mul)
QUOTIENTS = (operator.truediv, operator.itruediv, torch.div)
_IN_PLACE = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.imatmul, operator.setitem,
)  # fmt: skip
