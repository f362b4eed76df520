"""What a block computes out of its parameters and second input alone, as steps for every call.

A standardised weight, or an embedding that is added behind a convolution or scales a norm, is no
attribute that a chain could read. Its part of the graph becomes a ``Formula``, which runs the
block's own modules and the functions that its code called, differentiably, and fills the slots of
``UnitModules.computed``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..core.checks import UnfitError
from ..core.modules import Computed
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
    """Steps in the order of the block's code, the slots that they fill, and with which results."""

    steps: tuple[Step, ...]
    slots: tuple[Slot, ...]
    results: tuple[int, ...]

    @property
    def called(self) -> tuple[Path, ...]:
        """The modules that are called, whatever is hooked on them."""
        found = [step.target for step in self.steps if step.kind == "module"]
        return tuple(dict.fromkeys(found))

    @property
    def words(self) -> tuple[str, ...]:
        """What ``explain`` says of weights that are computed."""
        weights = any(kind != "norms" and name == "weight" for kind, _, name in self.slots)
        return ("computed weights",) if weights else ()

    def bind(self, block: nn.Module) -> Computed:
        """What computes the slots of a block."""
        # A kept reading does not keep its block alive.
        return Computed(self.slots, functools.partial(self.run, weakref.ref(block)))

    def run(self, block: weakref.ref[nn.Module], second: Tensor | None) -> list[Tensor]:
        """The tensors of a block's slots; its modules are called once, as by its own forward.

        Raises:
            UnfitError: what is computed does not fit its slot. Whatever the block's code raises.
        """
        owner = block()
        assert owner is not None
        results: list[Any] = []

        def resolve(value: Any) -> Any:
            return results[value.number] if isinstance(value, Result) else value

        for kind, target, args, kwargs in self.steps:
            if kind == "second":
                results.append(second)
                continue
            if kind == "attribute":
                results.append(_at(owner, target))
                continue
            given = [_map(arg, resolve) for arg in args]
            named = {name: _map(arg, resolve) for name, arg in kwargs}
            if kind == "method":
                results.append(getattr(given[0], target)(*given[1:], **named))
            else:
                function = _at(owner, target) if kind == "module" else target
                results.append(function(*given, **named))
        return [results[number] for number in self.results]


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
        if not slots:
            return None
        results = tuple([result.number for _, result in slots])
        return Formula(tuple(self.steps), tuple([slot for slot, _ in slots]), results)

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
