"""Where a recognised block's children are, and whether they still are what was recognised.

A trace fixes what Python decided on the way. Whatever attribute of its modules a forward read is
therefore written down as a guard, what else it read in a ``Watch``, and ``modules_of`` looks at
both, the hooks and the children again at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from ..core.checks import SHADOWS, hooked, why_not
from ..core.modules import Computed, Pad, UnitModules, act_of
from ..core.norms import groups_of
from ..core.spec import Shortcut
from ..kernels.operands import Act
from .formula import Formula, Path
from .frozen import SIMPLE, Frozen, difference, is_same
from .observer import INTERNAL
from .reads import lookup
from .second import Second
from .watch import Watch, changed_when_compiled


class Container(NamedTuple):
    """A module that holds others: its class, its children's paths and its own parameters' names."""

    path: Path
    kind: type
    children: tuple[Path, ...]
    parameters: tuple[str, ...]


class UnitPlan(NamedTuple):
    """Where a block's children are, in the order of the computation; paths are relative to it.

    norms, convs: one each per repetition. norm_types, conv_types (the projection's last): None, or
    a subclass with a forward of its own, which was found to compute what its base does, and an
    activation or a weight besides. acts: per repetition a module's path, or the activation that was
    called as a function. projection: its path, if any. pads: as in ``UnitModules``. inert: modules
    that pass their input on (identity, dropout that is off).
    containers: the block and the modules between it and these, whose calls are bypassed. others:
    all other descendants (path, type; NoneType for a child that is None). guards: (path,
    attribute, value) of the attributes that the forward read. watch: what else it read.
    otherwise: why the block is no unit in the other mode (training, evaluation), or empty.
    aliases: paths of one module, of which the first stands for the others. formula: what computes
    tensors that are no attributes. second: the second input of the calls
    that it is for, None where the forward takes none. end: what is done with the sum, a function
    and a number.
    """

    norms: tuple[Path, ...]
    norm_types: tuple[type | None, ...]
    convs: tuple[Path, ...]
    acts: tuple[Path | Act, ...]
    shortcut: Shortcut
    projection: Path | None
    add_in_place: bool
    pads: tuple[Pad, ...]
    inert: tuple[Path, ...]
    containers: tuple[Container, ...]
    others: tuple[tuple[Path, type], ...]
    guards: tuple[tuple[Path, str, Frozen], ...]
    watch: Watch
    otherwise: str = ""
    conv_types: tuple[type | None, ...] = ()
    aliases: tuple[tuple[Path, Path], ...] = ()
    formula: Formula | None = None
    second: Second | None = None
    end: tuple[Callable[[Any, Any], Any], float] | None = None

    def finish(self, out: Tensor) -> Tensor:
        """A block's output from its chain's."""
        if self.end is None:
            return out
        function, number = self.end
        result: Tensor = function(out, number)
        return result


def child_at(module: nn.Module, path: Path) -> Any:
    """The descendant at ``path``, or None where there is none."""
    for name in path:
        module = getattr(module, name, None)  # type: ignore[assignment]
    return module


def _has_parameters(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module's own parameters are those named.

    In a replica of ``nn.DataParallel`` they are plain tensors, unless they are None.
    """
    if tuple(module._parameters) == names:
        return True
    former = module.__dict__.get("_former_parameters")
    return former is not None and {*former, *module._parameters} == set(names)


def modules_of(block: nn.Module, plan: UnitPlan, guarded: bool = True) -> UnitModules | str:
    """The block's children as they are now, or why they must run one by one.

    guarded: whether what its forward read must be as it was too.
    """
    # Every child once, container by container: a call of ``child_at`` for each costs as much again.
    at: dict[Path, Any] = {(): block}
    for path, kind, children, parameters in plan.containers:
        module = at[path]
        if path and type(module) is not kind:
            return f"{dotted(path)} was replaced by {type(module).__name__}"
        inner = module._modules
        if len(inner) != len(children) or not _has_parameters(module, parameters):
            return f"{dotted(path)} has other children than when the block was fused"
        if path and hooked(module):
            return f"a hook on {dotted(path)}"
        for child in children:
            if child[-1] not in inner:
                return f"{dotted(child)} is gone"
            at[child] = inner[child[-1]]
    if guarded:
        moved = _moved(block, plan, at)
        if moved:
            return moved
    for path, kind in plan.others:
        if type(at[path]) is not kind:
            return f"{dotted(path)} was replaced by {type(at[path]).__name__}"
    for first, other in plan.aliases:
        if child_at(block, other) is not child_at(block, first):
            return f"{dotted(other)} was {dotted(first)} when the block was fused"
    for path in plan.inert:
        module = at[path] if path in at else child_at(block, path)
        reason = _why_active(module)
        if reason is not None:
            return f"{dotted(path)}: {reason}"
    act: Act | None = None
    for where in plan.acts:
        here = where
        if not isinstance(here, Act):
            module = at[here] if here in at else child_at(block, here)
            if not isinstance(module, nn.Module):
                return f"{dotted(here)} is gone"
            if hooked(module):
                return f"a hook on {dotted(here)}"
            found = act_of(module)
            if found is None:
                return f"activation {type(module).__name__} is not one that kernels know"
            here = found
        if act is not None and here != act:
            return f"activations differ: {act.kind} and {here.kind}"
        act = here
    assert act is not None
    if plan.projection is not None and at[plan.projection] is None:
        return f"{dotted(plan.projection)} is gone"
    unit = UnitModules(
        tuple([at[path] for path in plan.norms]),
        tuple([at[path] for path in plan.convs]),
        act,
        plan.shortcut,
        None if plan.projection is None else at[plan.projection],
        plan.add_in_place,
        plan.pads,
        Computed() if plan.formula is None else plan.formula.bind(block),
    )
    reason = why_not(unit, plan.norm_types, plan.conv_types)
    if reason is None and 1 in (unit.convs[0].in_channels, unit.convs[-1].out_channels):
        # The layout of eager's result then follows from strides that say nothing.
        return "its input or output has one channel, which lies in either layout"
    return reason or unit


def _moved(block: nn.Module, plan: UnitPlan, at: dict[Path, Any]) -> str:
    """What of that which the block's forward read is not as it was; empty for nothing."""
    for path, name, frozen in plan.guards:
        module = at[path] if path in at else child_at(block, path)
        now = lookup(module, name)
        if not is_same(frozen, now):
            if name == "training" and plan.otherwise:
                return plan.otherwise
            return difference(frozen, now, dotted((*path, name)))
    if torch.compiler.is_compiling():
        return changed_when_compiled(plan.watch.number)
    return plan.watch.changed()


# Types of which another has equal values.
_CONFUSABLE = (bool, int, float, complex)


class Standing:
    """Whether what a block's forward read is as it was, where its attributes are equal to it.

    What is left to see: other contents of the same objects, equal values of another type, and all
    that is not the block's own.
    """

    def __init__(self, block: nn.Module, plans: Sequence[UnitPlan]) -> None:
        self.watch = plans[0].watch  # of all
        self.gets: list[Any] = []
        self.names: list[str] = []
        self.values: list[Any] = []
        self.deep: list[Frozen] = []
        for path, name, frozen in [guard for plan in plans for guard in plan.guards]:
            value = frozen.value
            if frozen.parts is not None:
                self.deep.append(frozen)
            elif type(value) in _CONFUSABLE:
                attributes = getattr(child_at(block, path), "__dict__", {})
                if name in attributes:
                    self.gets.append(attributes.get)
                    self.names.append(name)
                    self.values.append(attributes[name])

    def __call__(self) -> bool:
        """See above."""
        for get, name, value in zip(self.gets, self.names, self.values):
            if get(name) is not value:
                return False
        for frozen in self.deep:
            if not is_same(frozen, frozen.value):
                return False
        return self.watch.holds()


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


def describe_unit(block: nn.Module, plans: Sequence[UnitPlan]) -> str:
    """In words what a block's plans are: "basic, projection from raw"."""
    plan = plans[0]
    kernels = [child_at(block, path).kernel_size for path in plan.convs]
    k = len(kernels)
    bottleneck = k == 3 and kernels[0] == kernels[2] == (1, 1)
    name = "basic" if k == 2 else "bottleneck" if bottleneck else f"{k} convolutions"
    words = [name, plan.shortcut.words]
    grouped = [groups_of(child_at(block, path)) > 0 for path in plan.norms]
    if any(grouped):
        words.append("group norms" if all(grouped) else "group and batch norms")
    for each in plans:
        words += () if each.formula is None else each.formula.words
    reads = [each.second for each in plans if each.second and each.second.given]
    without = any(each.second is not None and not each.second.given for each in plans)
    if reads:
        words.append(f"with {'or without ' * without}{reads[0].name}")
    return ", ".join(dict.fromkeys(words))


def signature(module: nn.Module) -> Any:
    """Equal for modules that compute the same: classes, plain attributes, children, parameters.

    Whatever else a module holds goes in by identity, so that only like blocks are alike.
    """
    parts: list[Any] = []
    for name, child in module.named_modules(remove_duplicate=False):
        values = []
        for key, value in vars(child).items():
            if key in INTERNAL:
                continue
            values.append((key, _exactly(value)))
        tensors = [
            (key, None if tensor is None else tensor.dim())
            for group in (child._parameters, child._buffers)
            for key, tensor in group.items()
        ]
        none = tuple(key for key, value in child._modules.items() if value is None)
        shadows = tuple([name for name in SHADOWS if name in vars(child)])
        parts.append((name, type(child), tuple(values), tuple(tensors), none, shadows))
    # A module that is called in two places is not two modules that are alike.
    numbers: dict[int, int] = {}
    for _, child in module.named_modules(remove_duplicate=False):
        numbers.setdefault(id(child), len(numbers))
    same = tuple(numbers[id(c)] for _, c in module.named_modules(remove_duplicate=False))
    return tuple(parts), same


def _exactly(value: Any) -> Any:
    """Equal for values that no forward tells apart; whatever is not simple, by its identity."""
    kind = type(value)
    if kind in SIMPLE:
        return kind, repr(value)
    return (kind, *map(_exactly, value)) if kind is tuple else (kind, id(value))


def is_leaf(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        own = type(module)
        return own.forward is nn.Conv2d.forward and own._conv_forward is nn.Conv2d._conv_forward
    if isinstance(module, (_BatchNorm, _ConvNd, _DropoutNd, nn.InstanceNorm2d)):
        return True
    return type(module).__module__.startswith("torch.nn.") and not isinstance(
        module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def dotted(path: Path) -> str:
    return ".".join(path) or "the block"
