"""``fuse(model)``: pre-activation blocks that somebody else wrote, run as fused chains.

A block is recognised by its dataflow (``dataflow``), and only its class changes, to a subclass
whose forward reads the block's children at every call and runs them as a chain (``run``).
Parameters, buffers and children stay the objects that they were. Where the children are not what
was recognised any more (a hook, another child, another attribute) the block's own forward runs.
"""

from __future__ import annotations

import contextlib
import copyreg
import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..blocks import PreActUnit
from ..core.checks import UnfitError, accepts, globally_hooked, hooked
from ..core.modules import ChainUnit, UnitModules
from ..core.norms import NORMS
from ..core.reading import Reading, begin_epoch, read
from ..core.run import run_blocks, run_chain
from ..names import AUTO, BACKENDS, EAGER
from .auto import FUSION, AutoMemory, auto_memory, check_memory, remove_auto_memory
from .computed import computed_by, measured_note
from .dataflow import MOST_NORMS, read_unit
from .reasons import NotAUnitError
from .report import BlockReport, Report
from .second import inputs_of
from .unit_plan import Standing, UnitPlan, describe_unit, modules_of, signature

# Larger modules are stages or models, whose children are looked at instead.
_MOST_MODULES = 128


class Fusion(NamedTuple):
    """What ``fuse`` leaves in a block: how to read it, and how its chains run.

    original: the class to give back. plans: empty for a Sequential.
    """

    original: type[nn.Module]
    plans: tuple[UnitPlan, ...]
    memory: str
    backend: str


def _fusion(module: nn.Module) -> Fusion:
    fusion = module.__dict__[FUSION]
    assert isinstance(fusion, Fusion)
    return fusion


class _Fused:
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


class FusedUnit(_Fused, ChainUnit):
    """Mixed into the class of a recognised block."""

    def chain_unit(self) -> UnitModules | str:
        """The block's children as a unit of a chain, or why it must be called."""
        assert isinstance(self, nn.Module)
        plan = _fusion(self).plans[0]
        if plan.end is not None:
            return "what is done with its sum is no part of a chain"
        if plan.second is not None and plan.second.required:
            return f"it takes {plan.second.name}"
        return self.unit_modules()

    def unit_modules(self) -> UnitModules | str:
        """The block's children as a unit where it has one input, or why its forward must run."""
        return self._unit(given=False)

    def unit_of_two(self) -> UnitModules | str:
        """The same where it has a second input."""
        return self._unit(given=True)

    def first_unit(self) -> UnitModules | str:
        """The same with the inputs that the block was recognised with first."""
        second = _fusion(self).plans[0].second  # type: ignore[arg-type]
        return self._unit(given=second is not None and second.given)

    def _unit(self, given: bool) -> UnitModules | str:
        assert isinstance(self, nn.Module)
        fusion = _fusion(self)
        if fusion.backend == EAGER:
            return 'backend is "eager"'
        if not torch.compiler.is_compiling():
            _recognise_anew(self, fusion)
        reasons = []
        for plan in fusion.plans:
            if (plan.second is not None and plan.second.given) != given:
                continue
            unit = modules_of(self, plan)
            if isinstance(unit, UnitModules):
                return unit
            reasons.append(unit)
        # Of two plans one is for training, the other for evaluation; what stands in the way of
        # the one for the present mode is the reason.
        reasons.append("it is no unit with such inputs")
        return next((r for r in reasons if not r.startswith("training is")), reasons[0])

    def standing(self) -> Standing:
        """What else the block's own forward reads."""
        assert isinstance(self, nn.Module)
        return Standing(self, _fusion(self).plans)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's function, fused where its children and the inputs allow."""
        fusion = _fusion(self)  # type: ignore[arg-type]
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


def _are_alike(x: Any, second: Any) -> bool:
    """Whether a second input is None, or no more than a tensor where x is not either."""
    plain = (Tensor, nn.Parameter)
    return second is None or type(second) is type(x) or (type(x) in plain and type(second) in plain)


class FusedSequential(_Fused):
    """Mixed into an ``nn.Sequential`` of blocks: consecutive units run as one chain."""

    def forward(self, input: Any) -> Any:
        """input through every child; see ``run_blocks``."""
        fusion = _fusion(self)  # type: ignore[arg-type]
        if not _is_plain_sequence(fusion.original):
            return super().forward(input)  # type: ignore[misc]
        return run_blocks(_flat(self), input, backend=fusion.backend, memory=fusion.memory)  # type: ignore[arg-type]

    def __getitem__(self, idx: Any) -> Any:
        """A child, or a slice that runs as this does."""
        part = super().__getitem__(idx)  # type: ignore[misc]
        if isinstance(idx, slice):
            part.__dict__[FUSION] = _fusion(self)  # type: ignore[arg-type]
        return part


def _is_plain_sequence(kind: type[nn.Module]) -> bool:
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
        fused = isinstance(child, FusedSequential) and _is_plain_sequence(_fusion(child).original)
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


class _Finding(NamedTuple):
    path: str
    module: nn.Module
    plans: tuple[UnitPlan, ...]
    reason: str


def _survey(model: nn.Module) -> list[_Finding]:
    """The model's blocks, recognised ones and such as resemble one; innermost first.

    Blocks that are alike share one trace.
    """
    findings: list[_Finding] = []
    seen: set[int] = set()
    known: dict[Any, tuple[UnitPlan, ...] | NotAUnitError] = {}

    def visit(module: nn.Module, path: str) -> bool:
        """Whether there is a block in the module, or the module is one."""
        if id(module) in seen:
            return False
        seen.add(id(module))
        if isinstance(module, (FusedUnit, PreActUnit)):
            findings.append(_Finding(path, module, (), ""))
            return True
        before = len(findings)
        inside = [
            visit(child, f"{path}.{name}" if path else name)
            for name, child in module.named_children()
        ]
        if any(inside) or not _plausible(module):
            return any(inside)
        if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            findings.append(_Finding(path, module, (), "its parameters are not initialised yet"))
            return False
        key = signature(module)
        if key not in known:
            try:
                known[key] = read_unit(module)
            except NotAUnitError as reason:
                known[key] = reason
        result = known[key]
        if isinstance(result, NotAUnitError):
            if result.resembles and len(findings) == before:
                findings.append(_Finding(path, module, (), str(result)))
            return False
        findings.append(_Finding(path, module, result, ""))
        return True

    visit(model, "")
    return findings


def _plausible(module: nn.Module) -> bool:
    """Whether a module is small enough for a block and has what one is made of."""
    kind = type(module)
    if isinstance(module, (torch.jit.ScriptModule, nn.ModuleList, nn.ModuleDict)):
        return False
    if kind.__call__ is not nn.Module.__call__ or not callable(getattr(kind, "forward", None)):
        return False
    inner = list(module.modules())[: _MOST_MODULES + 1]
    norms = sum(isinstance(m, NORMS) for m in inner)
    convs = sum(isinstance(m, nn.Conv2d) for m in inner)
    return convs > 0 and norms <= MOST_NORMS and 1 < len(inner) <= _MOST_MODULES


def fuse(
    model: nn.Module,
    *,
    memory: str = "recompute",
    budget: str | int | None = None,
    backend: str = AUTO,
) -> nn.Module:
    """Run the pre-activation blocks of ``model`` fused, in place, and return it.

    A block is a module whose forward computes k times norm -> act -> conv and adds a shortcut
    (He et al. 2016, equation (3)), however it is written; ``explain`` lists them. Consecutive
    blocks in an ``nn.Sequential`` run as one chain. Blocks and stages of this library are fused
    already and keep their own settings. Parameters, buffers, children and
    ``state_dict`` stay as they are. Modules keep what they compute: what cannot be fused, at
    recognition or at a call, runs as it did. ``unfuse`` takes it back.

    With memory "auto" the model takes the fastest mode whose training step, parameters, gradients
    and momentum included, fits the budget. It chooses as the first step begins, and again at inputs
    of another shape, from a forward and backward on tensors without memory; ``explain`` then says
    which mode and its predicted peak.

    Args:
        model: any module. memory: what is kept for the backward: recompute, invert, invert_h1,
            segment or auto (resnetv2/README.md, "Memory modes"). budget: of memory "auto", bytes
            or "8GiB"; on a GPU its free memory if None. backend: "auto", "triton" (GPU), "aten",
            or "eager" for the blocks' own forwards.

    Warns:
        UserWarning: no pre-activation block was found; the model is unchanged.

    Raises:
        TypeError: not a module. ValueError: an unknown memory mode or backend, a budget that is no
            number of bytes, or without memory "auto". The model's call: BudgetError, if no mode
            fits; ValueError, if its forward cannot run without values.
    """
    _check_module(model)
    check_memory(memory, budget)
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    automatic = memory == AUTO
    memory = "recompute" if automatic else memory
    remove_auto_memory(model)
    found = False
    for finding in _survey(model):
        module = finding.module
        if isinstance(module, FusedUnit):
            module.__dict__[FUSION] = _fusion(module)._replace(memory=memory, backend=backend)
        elif finding.plans:
            _swap(module, FusedUnit, Fusion(type(module), finding.plans, memory, backend))
        found = found or not finding.reason
    if not found:
        warnings.warn(
            f"no pre-activation block was found in {type(model).__name__}; nothing was changed "
            "(explain(model) lists what resembles one, and the reasons)",
            stacklevel=2,
        )
        return model
    for module in _sequences(model):
        if isinstance(module, FusedSequential):
            module.__dict__[FUSION] = _fusion(module)._replace(memory=memory, backend=backend)
        else:
            _swap(module, FusedSequential, Fusion(type(module), (), memory, backend))
    if automatic:
        choose = AutoMemory(budget)
        model.register_forward_pre_hook(choose, prepend=True, with_kwargs=True)
    return model


def _swap(module: nn.Module, mixin: type, fusion: Fusion) -> None:
    kind = _fused_class(mixin, fusion.original)
    module.__dict__[FUSION] = fusion
    module.__class__ = kind


def _sequences(model: nn.Module) -> list[nn.Module]:
    """The Sequentials that hold two consecutive units or more, and those inside of these."""

    def is_sequence(module: nn.Module) -> bool:
        return isinstance(module, FusedSequential) or _is_plain_sequence(type(module))

    def flat(module: nn.Module) -> Iterator[nn.Module]:
        for child in module._modules.values():
            if child is not None:
                yield from flat(child) if is_sequence(child) else [child]

    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if not is_sequence(module):
            continue
        units = [_joins_chains(child) for child in flat(module)]
        if any(a and b for a, b in itertools.pairwise(units)):
            for inner in module.modules():
                if is_sequence(inner) and any(isinstance(c, ChainUnit) for c in flat(inner)):
                    found[id(inner)] = inner
    return list(found.values())


def _joins_chains(module: nn.Module) -> bool:
    """Whether a module can run in a chain with others: not where more than x goes in, or its sum is
    not what comes out."""
    if not isinstance(module, FusedUnit):
        return isinstance(module, ChainUnit)
    plan = _fusion(module).plans[0]  # type: ignore[arg-type]
    return plan.end is None and (plan.second is None or not plan.second.required)


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused block and Sequential of ``model`` its own class again, and return it.

    Raises:
        TypeError: not a module.
    """
    _check_module(model)
    for module in model.modules():
        remove_auto_memory(module)
        if isinstance(module, _Fused):
            module.__class__ = module.__dict__.pop(FUSION).original
    return model


def explain(model: nn.Module) -> Report:
    """Which blocks of ``model`` run fused, as what, and why the others do not; changes nothing.

    Listed are pre-activation blocks, fused or not, and modules that resemble one: they add a
    shortcut, and have convolutions.

    Raises:
        TypeError: not a module.
    """
    _check_module(model)
    rows = []
    for path, module, plans, reason in _survey(model):
        kind = by = ""
        if isinstance(module, FusedUnit):
            kind = describe_unit(module, _fusion(module).plans)
            name = _fusion(module).original.__name__
            reason, by = _state(module.first_unit(), _fusion(module).backend)
        elif isinstance(module, PreActUnit):
            name = type(module).__name__
            kind = type(module).__name__
            reason, by = _state(module.chain_unit(), module.backend)
        else:
            name = type(module).__name__
            if plans:
                kind = describe_unit(module, plans)
                reason = "can be fused: call fuse(model)"
        rows.append(BlockReport(path, name, not reason, kind, reason, by))
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    rows.sort(key=lambda row: order[row.path])
    outer = [name for name, m in model.named_modules() if isinstance(m, FusedSequential)]
    chains = [
        p for p in outer if not any(p != q and (not q or p.startswith(q + ".")) for q in outer)
    ]
    choice = auto_memory(model)
    measured = ""
    if any(row.by for row in rows):
        weight = next(model.parameters())
        measured = measured_note(weight.device, any("*" in row.by for row in rows))
    memory = choice.describe() if choice else ""
    return Report(tuple(rows), tuple(chains), memory, measured)


def _state(unit: UnitModules | str, backend: str) -> tuple[str, str]:
    """Why a block does not run fused, and what computes it if it does."""
    return (unit, "") if isinstance(unit, str) else ("", computed_by(unit, backend))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


__all__: Sequence[str] = ("BlockReport", "Report", "explain", "fuse", "unfuse")
