"""``fuse(model)``: pre-activation blocks that somebody else wrote, run as fused chains.

A block is recognised by its dataflow (``dataflow``), and only its class changes, to a subclass
whose forward reads the block's children at every call and runs them as a chain (``run``).
Parameters, buffers and children stay the objects that they were. Where the children are not what
was recognised any more (a hook, another child, another attribute) the block's own forward runs.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..blocks import PreActUnit
from ..core.modules import ChainUnit, UnitModules
from ..core.norms import NORMS
from ..names import AUTO, BACKENDS
from .auto import FUSION, AutoMemory, auto_memory, check_memory, remove_auto_memory
from .dataflow import MOST_NORMS, read_unit
from .fused import (
    Fused,
    FusedSequential,
    FusedUnit,
    Fusion,
    first_unit,
    fusion_of,
    is_plain_sequence,
    joins_chains,
    swap,
)
from .implementations import computed_by, measured_note
from .reasons import NotAUnitError
from .report import BlockReport, Report
from .unit_plan import UnitPlan, describe_unit, signature

# Larger modules are stages or models, whose children are looked at instead.
_MOST_MODULES = 128


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
            module.__dict__[FUSION] = fusion_of(module)._replace(memory=memory, backend=backend)
        elif finding.plans:
            swap(module, FusedUnit, Fusion(type(module), finding.plans, memory, backend))
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
            module.__dict__[FUSION] = fusion_of(module)._replace(memory=memory, backend=backend)
        else:
            swap(module, FusedSequential, Fusion(type(module), (), memory, backend))
    if automatic:
        choose = AutoMemory(budget)
        model.register_forward_pre_hook(choose, prepend=True, with_kwargs=True)
    return model


def _sequences(model: nn.Module) -> list[nn.Module]:
    """The Sequentials that hold two consecutive units or more, and those inside of these."""

    def is_sequence(module: nn.Module) -> bool:
        return isinstance(module, FusedSequential) or is_plain_sequence(type(module))

    def flat(module: nn.Module) -> Iterator[nn.Module]:
        for child in module._modules.values():
            if child is not None:
                yield from flat(child) if is_sequence(child) else [child]

    found: dict[int, nn.Module] = {}
    for module in model.modules():
        if not is_sequence(module):
            continue
        units = [
            joins_chains(child) if isinstance(child, FusedUnit) else isinstance(child, ChainUnit)
            for child in flat(module)
        ]
        if any(a and b for a, b in itertools.pairwise(units)):
            for inner in module.modules():
                if is_sequence(inner) and any(isinstance(c, ChainUnit) for c in flat(inner)):
                    found[id(inner)] = inner
    return list(found.values())


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused block and Sequential of ``model`` its own class again, and return it.

    Raises:
        TypeError: not a module.
    """
    _check_module(model)
    for module in model.modules():
        remove_auto_memory(module)
        if isinstance(module, Fused):
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
            kind = describe_unit(module, fusion_of(module).plans)
            name = fusion_of(module).original.__name__
            reason, by = _state(first_unit(module), fusion_of(module).backend)
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
