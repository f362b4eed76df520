"""What a block computes out of its parameters and second input alone, as steps for every call.

A standardised weight, or an embedding that is added behind a convolution or scales a norm, is no
attribute that a chain could read. Its part of the graph becomes a ``Formula``, which runs the
block's own modules and the functions that its code called, differentiably, and fills the slots of
``UnitModules.computed``.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..core.checks import UnfitError
from ..core.modules import Compute
from ..core.spec import Slot

Path = tuple[str, ...]


class Result(NamedTuple):
    """The result of an earlier step, as an argument."""

    number: int


class Step(NamedTuple):
    """One step. kind: second, attribute, module, function or method; target: a path from the block,
    a function or a method's name."""

    kind: str
    target: Any = None
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()


class Formula(NamedTuple):
    """Steps in the order of the block's code, and the slots that results of theirs fill."""

    steps: tuple[Step, ...]
    slots: tuple[tuple[Slot, int], ...]

    @property
    def called(self) -> tuple[Path, ...]:
        """The modules that are called, whatever is hooked on them."""
        found = [step.target for step in self.steps if step.kind == "module"]
        return tuple(dict.fromkeys(found))

    @property
    def words(self) -> tuple[str, ...]:
        """What ``explain`` says of weights that are computed."""
        weights = any(kind != "norms" and name == "weight" for (kind, _, name), _ in self.slots)
        return ("computed weights",) if weights else ()

    def bind(self, block: nn.Module) -> tuple[tuple[Slot, Compute], ...]:
        """The slots of a block, and what computes their tensors."""
        evaluation = Evaluation(self, block)
        return tuple([(slot, evaluation.of(i)) for i, (slot, _) in enumerate(self.slots)])


class Evaluation:
    """A formula of one block, run once for all of its slots.

    The first slot that a chain asks for has the formula run, the others take what it left: modules
    are called once at every call, as in the block's own forward.
    """

    def __init__(self, formula: Formula, block: nn.Module) -> None:
        self.formula = formula
        self._block = weakref.ref(block)  # a kept reading does not keep its block alive
        self._left = threading.local()

    def of(self, i: int) -> Compute:
        """What computes slot i; a chain asks for them in order."""

        def compute(second: Tensor | None) -> Tensor:
            if i == 0:
                self._left.results = self.run(second)
            tensor: Tensor = self._left.results[i]
            if i == len(self.formula.slots) - 1:
                del self._left.results
            return tensor

        return compute

    def run(self, second: Tensor | None) -> list[Tensor]:
        """The tensors of the formula's slots.

        Raises:
            UnfitError: what is computed does not fit its slot. Whatever the block's code raises.
        """
        block = self._block()
        assert block is not None
        results: list[Any] = []

        def resolve(value: Any) -> Any:
            return results[value.number] if isinstance(value, Result) else value

        for kind, target, args, kwargs in self.formula.steps:
            if kind == "second":
                results.append(second)
                continue
            if kind == "attribute":
                results.append(_at(block, target))
                continue
            given = [_map(arg, resolve) for arg in args]
            named = {name: _map(arg, resolve) for name, arg in kwargs}
            if kind == "method":
                results.append(getattr(given[0], target)(*given[1:], **named))
            else:
                function = _at(block, target) if kind == "module" else target
                results.append(function(*given, **named))
        return [results[number] for _, number in self.formula.slots]


def _at(owner: Any, path: Path) -> Any:
    for name in path:
        owner = getattr(owner, name)
    return owner


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """An argument with ``function`` applied to what it is made of."""
    if isinstance(value, (Result, fx.Node)):
        return function(value)
    if isinstance(value, (tuple, list)):
        parts = [_map(part, function) for part in value]
        if hasattr(value, "_fields"):
            return type(value)(*parts)
        return tuple(parts) if isinstance(value, tuple) else parts
    if isinstance(value, dict):
        return {key: _map(part, function) for key, part in value.items()}
    if isinstance(value, slice):
        return slice(*[_map(part, function) for part in (value.start, value.stop, value.step)])
    return value


def per_channel(value: Any, channels: int) -> Tensor:
    """What is added to, or multiplied with, (N, C, H, W) for each image and channel: (N, C), or
    (C,) where it is the same for all images.

    Raises:
        UnfitError: it is of another shape than (N, C, 1, 1) or (C, 1, 1).
    """
    of_channels = isinstance(value, Tensor) and value.shape[-3:] == (channels, 1, 1)
    if of_channels and value.dim() in (3, 4):
        one = value.dim() == 3 or value.shape[0] == 1
        reshaped: Tensor = value.reshape(channels if one else (value.shape[0], channels))
        return reshaped
    shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    raise UnfitError(f"expected (N, {channels}, 1, 1) for each image and channel, got {shape}")


def like(value: Any, weight: Tensor) -> Tensor:
    """A computed weight of the shape and device of the one whose place it takes.

    Raises:
        UnfitError: it is of another.
    """
    if isinstance(value, Tensor) and value.shape == weight.shape and value.device == weight.device:
        return value
    raise UnfitError("a computed weight of another shape than its convolution's")


def bias_like(value: Any, weight: Tensor) -> Tensor:
    """A computed bias of as many channels as a convolution's weight has.

    Raises:
        UnfitError: it is of another shape or device.
    """
    fits = isinstance(value, Tensor) and value.shape == weight.shape[:1]
    if fits and value.device == weight.device:
        tensor: Tensor = value
        return tensor
    raise UnfitError("a computed bias of another shape than its convolution's")


def scaled(value: Tensor | None, scale: Tensor) -> Tensor:
    """A norm's weight or bias, None for 1, behind which stands a scale."""
    return scale if value is None else value * scale


def scaled_bias(bias: Tensor | None, scale: Tensor) -> Tensor:
    """The same of a bias, None for 0."""
    return torch.zeros_like(scale) if bias is None else bias * scale


def shifted(bias: Tensor | None, shift: Tensor) -> Tensor:
    """A bias, None for 0, behind which stands a shift."""
    return shift if bias is None else bias + shift


class Builder:
    """Makes a formula of nodes of a graph, and of what is done with them."""

    def __init__(self, graph: fx.Graph, wanted: Iterable[fx.Node]) -> None:
        self.steps: list[Step] = []
        self.slots: list[tuple[Slot, int]] = []
        self._numbers: dict[fx.Node, int] = {}
        used = ancestors(wanted)
        for node in graph.nodes:
            if node in used:
                self._numbers[node] = self._add_node(node)

    def add(self, function: Callable[..., Any], *args: Any) -> Result:
        """A step that calls a function."""
        return self._append(Step("function", function, args))

    def attribute(self, path: Path) -> Result:
        """A step that reads an attribute of the block."""
        return self._append(Step("attribute", path))

    def of(self, node: fx.Node) -> Result:
        """A node's result."""
        return Result(self._numbers[node])

    def formula(self, slots: Sequence[tuple[Slot, Result]]) -> Formula | None:
        """The formula that fills these slots, if there are any."""
        filled = tuple([(slot, result.number) for slot, result in slots])
        return Formula(tuple(self.steps), filled) if filled else None

    def _append(self, step: Step) -> Result:
        self.steps.append(step)
        return Result(len(self.steps) - 1)

    def _add_node(self, node: fx.Node) -> int:
        if node.op == "placeholder":
            return self._append(Step("second")).number
        if node.op == "get_attr":
            return self.attribute(tuple(str(node.target).split("."))).number
        kind = node.op.removeprefix("call_")
        target = tuple(str(node.target).split(".")) if kind == "module" else node.target
        args = tuple([_map(arg, self._result_of) for arg in node.args])
        kwargs = tuple([(name, _map(arg, self._result_of)) for name, arg in node.kwargs.items()])
        return self._append(Step(kind, target, args, kwargs)).number

    def _result_of(self, node: Any) -> Result:
        return self.of(node)


def ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes, and all that they are computed from."""
    found: set[fx.Node] = set()
    left = list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += node.all_input_nodes
    return found
