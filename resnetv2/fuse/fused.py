"""The classes that ``fuse`` gives to recognised blocks, and to Sequentials of them."""

from __future__ import annotations

import contextlib
import copyreg
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.checks import UnfitError, accepts, globally_hooked, hooked
from ..core.modules import ChainUnit, UnitModules
from ..core.reading import Reading, begin_epoch, read
from ..core.run import run_blocks, run_chain
from ..names import EAGER
from .auto import FUSION
from .dataflow import read_unit
from .reasons import NotAUnitError
from .second import inputs_of
from .unit_plan import Standing, UnitPlan, modules_of


class Fusion(NamedTuple):
    """What ``fuse`` leaves in a block: how to read it, and how its chains run.

    original: the class to give back. plans: empty for a Sequential.
    """

    original: type[nn.Module]
    plans: tuple[UnitPlan, ...]
    memory: str
    backend: str


def fusion_of(module: nn.Module) -> Fusion:
    fusion = module.__dict__[FUSION]
    assert isinstance(fusion, Fusion)
    return fusion


class Fused:
    """What the fused classes share: pickling by the original class."""

    def __init_subclass__(cls, **_: Any) -> None:
        """What a block's class does with its subclasses is not for the fused one."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class was made at run time and cannot be imported, but can be made again.
        # Older protocols than 2 name the class in another way, and can store this one.
        made = super().__reduce_ex__(max(int(protocol), 2))
        if made[0] is copyreg.__newobj__ and made[1][0] is type(self):  # type: ignore[attr-defined]
            mixin, original = type(self).__bases__
            return (_rebuild, (mixin, original, *made[1][1:]), *made[2:])
        return made


class FusedUnit(Fused, ChainUnit):
    """Mixed into the class of a recognised block."""

    def chain_unit(self) -> UnitModules | str:
        """The block's children as a unit of a chain, or why it must be called."""
        assert isinstance(self, nn.Module)
        if not joins_chains(self):
            return "more goes in than x, or comes out than the sum"
        return self.unit_modules()

    def unit_modules(self) -> UnitModules | str:
        """The block's children as a unit where it has one input, or why its forward must run."""
        assert isinstance(self, nn.Module)
        return _unit_of(self, given=False)

    def unit_of_two(self) -> UnitModules | str:
        """The same where it has a second input."""
        assert isinstance(self, nn.Module)
        return _unit_of(self, given=True)

    def standing(self) -> Standing:
        """What else the block's own forward reads."""
        assert isinstance(self, nn.Module)
        return Standing(self, fusion_of(self).plans)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's function, fused where its children and the inputs allow."""
        fusion = fusion_of(self)  # type: ignore[arg-type]
        plan = fusion.plans[0]
        inputs = inputs_of(plan.second, args, kwargs)
        if inputs is not None and _are_alike(*inputs):
            x, second = inputs
            begin_epoch()
            reading = read(self, "inside" if second is None else "with a second input")
            if isinstance(reading, Reading) and accepts(reading.unit, x):
                with contextlib.suppress(UnfitError):
                    out = run_chain(
                        [reading], x, backend=fusion.backend, memory=fusion.memory, second=second
                    )
                    return plan.finish(out)
        return super().forward(*args, **kwargs)  # type: ignore[misc]


# Functions, not methods: the fused class must not hide what the block's own has under their names.
def joins_chains(block: nn.Module) -> bool:
    """Whether a block can run in a chain with others: x alone goes in, and the sum comes out."""
    plan = fusion_of(block).plans[0]
    return plan.end is None and (plan.second is None or not plan.second.required)


def first_unit(block: nn.Module) -> UnitModules | str:
    """A block as a unit with the inputs that it was recognised with first, or why it is none."""
    second = fusion_of(block).plans[0].second
    return _unit_of(block, given=second is not None and second.given)


def _unit_of(block: nn.Module, given: bool) -> UnitModules | str:
    """A block as a unit of calls with a second input or without, or why it must run itself."""
    fusion = fusion_of(block)
    if fusion.backend == EAGER:
        return 'backend is "eager"'
    if not torch.compiler.is_compiling():
        _recognise_anew(block, fusion)
    reasons = []
    for plan in fusion.plans:
        if (plan.second is not None and plan.second.given) != given:
            continue
        unit = modules_of(block, plan)
        if isinstance(unit, UnitModules):
            return unit
        reasons.append(unit)
    if not reasons:
        return "it is no unit with such inputs"
    # Of two plans one is for training, the other for evaluation; what stands in the way of
    # the one for the present mode is the reason.
    return next((r for r in reasons if not r.startswith("training is")), reasons[0])


def _are_alike(x: Any, second: Any) -> bool:
    """Whether a second input is None, or no more than a tensor where x is not either."""
    plain = (Tensor, nn.Parameter)
    return second is None or type(second) is type(x) or (type(x) in plain and type(second) in plain)


class FusedSequential(Fused):
    """Mixed into an ``nn.Sequential`` of blocks: consecutive units run as one chain."""

    def forward(self, input: Any) -> Any:
        """input through every child; see ``run_blocks``."""
        fusion = fusion_of(self)  # type: ignore[arg-type]
        if not is_plain_sequence(fusion.original):
            return super().forward(input)  # type: ignore[misc]
        return run_blocks(_flat(self), input, backend=fusion.backend, memory=fusion.memory)  # type: ignore[arg-type]

    def __getitem__(self, idx: Any) -> Any:
        """A child, or a slice that runs as this does."""
        part = super().__getitem__(idx)  # type: ignore[misc]
        if isinstance(idx, slice):
            part.__dict__[FUSION] = fusion_of(self)  # type: ignore[arg-type]
        return part


def is_plain_sequence(kind: type[nn.Module]) -> bool:
    """Whether a class runs its children one after the other, as ``nn.Sequential``."""
    return (
        issubclass(kind, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and kind.__iter__ is nn.Sequential.__iter__
        and kind.__call__ is nn.Module.__call__
    )


def _flat(sequence: nn.Module) -> Iterator[nn.Module]:
    """A Sequential's children, and in place of a fused Sequential among them its own."""
    called = not torch.compiler.is_compiling() and globally_hooked()
    # Not ``children()``, which names a module once that is called in two places.
    for child in sequence._modules.values():
        assert child is not None
        fused = isinstance(child, FusedSequential) and is_plain_sequence(fusion_of(child).original)
        if fused and not called and not hooked(child):
            yield from _flat(child)
        else:
            yield child


def _recognise_anew(block: nn.Module, fusion: Fusion) -> None:
    """Let a block that was loaded from a file find the code and the state that it reads here."""
    unknown = [plan for plan in fusion.plans if not plan.watch.known and not plan.watch.lost]
    if not unknown or torch._C._functorch.peek_interpreter_stack() is not None:
        return
    kind = type(block)
    try:
        block.__class__ = fusion.original
        del block.__dict__[FUSION]
        plans = read_unit(block)
        watch = unknown[0].watch
        same = [plan._replace(watch=watch) for plan in plans] == [*fusion.plans]
        reason = "" if same else "its forward is another than when it was saved: fuse it anew"
    except NotAUnitError as error:
        reason = str(error)
    finally:
        block.__dict__[FUSION] = fusion
        block.__class__ = kind
    for plan in unknown:
        if reason:
            plan.watch.lost = reason
        elif not plan.watch.known:
            plan.watch.fill(plans[0].watch.entries)


def _fused_class(mixin: type, original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``original`` with the mixin; always the same one.

    It is found among the original's subclasses, so that no table keeps either alive. Initialisers
    look for "Conv" and "BatchNorm" in class names, so these are left out.
    """
    for existing in original.__subclasses__():
        if existing.__bases__ == (mixin, original):
            return existing
    name = "Fused" + original.__name__.replace("Conv", "").replace("BatchNorm", "")
    namespace = {"__module__": original.__module__, "__doc__": original.__doc__}
    metaclass: Any = type(original)
    made: type[nn.Module] = metaclass(name, (mixin, original), namespace)
    return made


def _rebuild(mixin: type, original: type[nn.Module], *args: Any) -> nn.Module:
    kind = _fused_class(mixin, original)
    return kind.__new__(kind, *args)  # type: ignore[misc]


def swap(module: nn.Module, mixin: type, fusion: Fusion) -> None:
    kind = _fused_class(mixin, fusion.original)
    module.__dict__[FUSION] = fusion
    module.__class__ = kind
