"""Children are read afresh at every call, and cost little where nothing has changed.

``read(block)`` is ``block.chain_unit()``. What it found is kept with a copy of everything that it
may have looked at: the attributes of the block and of every module in it, their children,
parameters, buffers and hooks. At the next call these are compared, which takes a few microseconds.
"""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from .checks import UnfitError, hooked
from .modules import ChainUnit, UnitModules
from .spec import Unit, slots
from .sync import SyncBatchNorm

_epoch = [1]


def current_epoch() -> int:
    """The number of the stretch of time in which no code but this library's has run."""
    return _epoch[0]


def begin_epoch() -> None:
    """Whatever readings depend on besides their blocks may have changed."""
    if not torch.compiler.is_compiling():  # a graph is guarded by what it has read
        _epoch[0] += 1


class Reading:
    """A unit's modules at one moment.

    Attributes:
        unit: the modules. record: what they make up. tensors: in the order of ``spec.slots``.
        computed: places among them whose tensor is computed at every call.
    """

    def __init__(self, unit: UnitModules) -> None:
        self.unit = unit
        self.record: Unit = unit.record()
        self.tensors: list[Tensor] = unit.tensors(self.record)
        places = {slot: place for place, slot in enumerate(slots(self.record))}
        self.computed = [places[slot] for slot in unit.computed.slots]

    def filled(self, second: Tensor | None, images: int) -> list[Tensor]:
        """The tensors of a call for so many images; second: the block's second input.

        Raises:
            UnfitError: what is computed is for other images, or of a dtype that eager would
                promote or refuse.
        """
        tensors = list(self.tensors)
        weight = self.unit.convs[0].weight
        mixes = torch.is_autocast_enabled(weight.device.type)
        for place, tensor in zip(self.computed, self.unit.computed.run(second), strict=True):
            tensors[place] = tensor
            if tensor.dim() == 2 and tensor.shape[0] != images:
                raise UnfitError(f"tensors for {tensor.shape[0]} images beside {images}")
            if tensor.dtype == torch.float64 if mixes else tensor.dtype != weight.dtype:
                raise UnfitError(f"a computed tensor of {tensor.dtype} beside {weight.dtype}")
        return tensors


class KeptReading(Reading):
    """A reading that can tell whether it still holds.

    plans: what ``run`` has prepared for chains that begin with it.
    """

    def __init__(self, block: nn.Module, unit: UnitModules) -> None:
        super().__init__(unit)
        self.plans: dict[Any, Any] = {}
        # The block does not keep itself alive.
        modules = list(block.modules())
        self._block = weakref.ref(block)
        self._stands = block.standing() if isinstance(block, ChainUnit) else None
        self._inner = modules[1:]
        self._types = list(map(type, modules))
        self._attributes = [dict(vars(module)) for module in modules]
        self._held = _held(modules)

    def holds(self) -> bool:
        """Whether all is as it was."""
        block = self._block()
        if block is None:
            return False
        modules = [block, *self._inner]
        try:
            same = list(map(vars, modules)) == self._attributes
        except (RuntimeError, TypeError, ValueError):  # an array among them has changed
            return False
        if not same or list(map(type, modules)) != self._types:
            return False
        held = _held(modules)
        if len(held) != len(self._held) or not all(map(is_, held, self._held)):
            return False
        return self._stands is None or self._stands()


def _held(modules: list[nn.Module]) -> list[Any]:
    """The content of modules' dictionaries: children, parameters, buffers, and hooks."""
    return [
        value
        for m in modules
        for part in (m._modules, m._parameters, m._buffers)
        for value in part.values()
    ] + [
        hook
        for m in modules
        for hooks in (
            m._forward_hooks,
            m._forward_pre_hooks,
            m._backward_hooks,
            m._backward_pre_hooks,
        )
        if hooks
        for hook in hooks.values()
    ]


# By how a block is read: as a unit of a chain that takes the place of its call, as a unit where its
# own forward asks, as the class's own forward's children, or as the unit that it is with a second
# input.
_METHODS = {
    "in a chain": "chain_unit",
    "by itself": "chain_unit",
    "inside": "unit_modules",
    "with a second input": "unit_of_two",
}
_readings: dict[str, weakref.WeakKeyDictionary[nn.Module, KeptReading]] = {
    way: weakref.WeakKeyDictionary() for way in _METHODS
}


def read(block: ChainUnit, way: str = "by itself") -> Reading | str:
    """The block's children as a unit, or why it must be called.

    way: "in a chain", which takes the place of the block's call, hooks on it included; "by itself",
    where its forward asks; "inside", where a forward that may be a subclass's does.
    """
    assert isinstance(block, nn.Module)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        known = _readings[way].get(block)
        if known is not None and known.holds():
            return known
    if way == "in a chain" and hooked(block):
        return "a hook on the block"
    unit = getattr(block, _METHODS[way])()
    if isinstance(unit, str):
        return unit
    if compiling or any(isinstance(n, (SyncBatchNorm, nn.SyncBatchNorm)) for n in unit.norms):
        # The ranks that norms synchronise over depend on the process groups of the moment.
        return Reading(unit)
    reading = KeptReading(block, unit)
    _readings[way][block] = reading
    return reading
