"""What a trace says of a block, tried: the block's own step against its plan's, in float64."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import UnfitError
from ..core.modules import UnitModules
from ..core.norms import channels_of
from ..core.reading import Reading
from ..core.run import run_chain
from .formula import Path
from .frozen import Freezer, Frozen, difference, is_same
from .reads import lookup
from .reasons import NotAUnitError
from .trace import (
    keep_groups,
    make_local,
    no_modes,
    random_states,
    restore,
    same_states,
    unhook,
)
from .unit_plan import Container, UnitPlan, child_at, dotted, is_leaf, modules_of

# Of images for a trial; some blocks take only even sizes, or squares.
_TRIAL_SIZES = ((8, 6), (16, 16), (7, 7))


def structure(module: nn.Module, plan: UnitPlan) -> dict[str, Any]:
    """The containers of a block, its descendants that a plan does not read at every call, and the
    names of one module."""
    read = {*plan.norms, *plan.convs, *plan.inert, plan.projection, *plan.acts}
    called = () if plan.formula is None else plan.formula.called
    containers: list[Container] = []
    others: list[tuple[Path, type]] = []

    def visit(child: nn.Module | None, path: Path) -> None:
        if path and (child is None or is_leaf(child) or path in called):
            if path not in read:
                others.append((path, type(child)))
            return
        assert child is not None
        children = tuple((*path, name) for name in child._modules)
        containers.append(Container(path, type(child), children, tuple(child._parameters)))
        for name, grandchild in child._modules.items():
            visit(grandchild, (*path, name))

    visit(module, ())
    aliases: list[tuple[Path, Path]] = []
    first: dict[int, Path] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        path = tuple(name.split("."))
        if first.setdefault(id(child), path) != path:
            aliases.append((first[id(child)], path))
    return {
        "containers": tuple(containers), "others": tuple(others), "aliases": tuple(aliases)
    }  # fmt: skip


class _Trial:
    """Copies of a module with random parameters, and steps of them.

    In float64, so that rounding hides no difference, and in float32 under autocast, which leaves
    float64 alone. Random parameters, so that no zero hides one. On a CPU.
    """

    def __init__(self, module: nn.Module, plan: UnitPlan, training: bool) -> None:
        self.module, self.plan, self.training = module, plan, training
        self.generator = torch.Generator().manual_seed(0)
        self.values: dict[int, Tensor] = {}
        for tensor in (*module.parameters(), *module.buffers()):
            value = torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
            if tensor.is_floating_point():
                value = self._random(torch.rand, tensor.shape) + 0.5
            if tensor.dim() > 1:
                value = value - 1.0  # signs in weights, so that activations see both
            self.values[id(tensor)] = value

    def _random(self, draw: Any, shape: Any) -> Tensor:
        drawn: Tensor = draw(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn

    def copy(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A twin in ``dtype``."""
        memo: dict[int, Any] = {}
        for parameter in self.module.parameters():
            value = self.values[id(parameter)].to(dtype, copy=True)
            memo[id(parameter)] = nn.Parameter(value)
        for buffer in self.module.buffers():
            value = self.values[id(buffer)]
            memo[id(buffer)] = value.to(
                dtype if value.is_floating_point() else value.dtype, copy=True
            )
        keep_groups(self.module, memo)
        twin = copy.deepcopy(self.module, memo)
        for child in twin.modules():
            child.training = self.training
            unhook(child)
        make_local(twin)
        return twin

    def images(self, channels: int, height: int, width: int) -> Tensor:
        return self._random(torch.randn, (2, channels, height, width))

    def seconds(self) -> list[Tensor | None]:
        """Second inputs, of which one should be of the shape that the block takes."""
        plan = self.plan
        if plan.second is None or not plan.second.given:
            return [None]
        paths = () if plan.formula is None else plan.formula.called
        called = [m for path in paths for m in child_at(self.module, path).modules()]
        features = [m.in_features for m in called if isinstance(m, nn.Linear)]
        features += [child_at(self.module, path).out_channels for path in plan.convs]
        maps = [m.in_channels for m in called if isinstance(m, nn.Conv2d)] + features
        shapes = [(2, n) for n in features] + [(2, n, 1, 1) for n in maps]
        return [self._random(torch.randn, shape) for shape in dict.fromkeys(shapes)]

    def own(self, twin: nn.Module, x: Tensor, second: Tensor | None) -> list[Any]:
        """Output, buffers and gradients of a twin's own forward."""
        x, inputs = _inputs(x, second)
        required = self.plan.second is not None and self.plan.second.required
        out = twin(*inputs) if second is not None or not required else twin(x, None)
        return _step(twin, out, inputs)

    def fused(self, twin: nn.Module, x: Tensor, second: Tensor | None) -> list[Any]:
        """The same of the chain that its plan gives."""
        unit = modules_of(twin, self.plan, guarded=False)
        assert isinstance(unit, UnitModules)
        x, inputs = _inputs(x, second)
        given = inputs[1] if len(inputs) > 1 else None
        out = run_chain([Reading(unit)], x, backend="aten", second=given)
        return _step(twin, self.plan.finish(out), inputs)


def _inputs(x: Tensor, second: Tensor | None) -> tuple[Tensor, list[Tensor]]:
    """Fresh inputs of a step, and x among them."""
    inputs = [t.clone().requires_grad_() for t in (x, second) if t is not None]
    return inputs[0], inputs


def _step(twin: nn.Module, out: Any, inputs: list[Tensor]) -> list[Any]:
    if not isinstance(out, Tensor):
        raise NotAUnitError(f"returns a {type(out).__name__}, not one tensor", True)
    generator = torch.Generator().manual_seed(1)
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64, device="cpu")
    wanted = [*inputs, *twin.parameters()]
    found = torch.autograd.grad(out, wanted, g.to(out.dtype), allow_unused=True)
    return [out.detach(), *twin.buffers(), *found]


def try_out(module: nn.Module, plan: UnitPlan, training: bool) -> None:
    """Run a copy's own forward and its plan on trial inputs; raise unless they are the same.

    A trace cannot see what Python decided on the type of its input, nor what its code changed.
    """
    trial = _Trial(module, plan, training)
    unit = modules_of(trial.copy(), plan, guarded=False)
    if isinstance(unit, str):
        return  # nothing would run fused now: there is nothing to compare
    channels = channels_of(unit.norms[0])
    states = random_states()
    failure: Exception | None = None
    try:
        with no_modes(), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            for size, second in itertools.product(_TRIAL_SIZES, trial.seconds()):
                twin, x = trial.copy(), trial.images(channels, *size)
                before = _read_in(twin, plan)
                try:
                    expected = trial.own(twin, x, second)
                    found = trial.fused(trial.copy(), x, second)
                except NotAUnitError:
                    raise
                except Exception as error:
                    failure = failure or error
                    continue
                for (path, name, now), frozen in zip(_values_in(twin, plan), before):
                    if not is_same(frozen, now):
                        what = difference(frozen, now, dotted((*path, name))).split(",")[0]
                        raise NotAUnitError(f"its forward changes what it reads: {what}", True)
                reason = plan.watch.changed()
                if reason:
                    raise NotAUnitError(f"its forward changes what it reads: {reason}", True)
                _refuse_draws(states)
                _compare(found, expected, 1e-6)
                break
            else:
                line = (str(failure).strip() or type(failure).__name__).splitlines()[0]
                fails = "" if isinstance(failure, UnfitError) else "its forward fails on a trial: "
                raise NotAUnitError(f"{fails}{line}", True)
            half, its = x.float(), None if second is None else second.float()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                theirs = trial.own(trial.copy(torch.float32), half, its)
                mine = trial.fused(trial.copy(torch.float32), half, its)
            # Some gradients are sums that come to nothing but rounding.
            _compare(mine, theirs, 0.1, max(_norm(each) for each in theirs[1:]))
        _refuse_draws(states)
    finally:
        restore(states)


def _refuse_draws(states: Any) -> None:
    if not same_states(states, random_states()):
        raise NotAUnitError("draws random numbers", True)


def _values_in(twin: nn.Module, plan: UnitPlan) -> list[tuple[Path, str, Any]]:
    return [(path, name, lookup(child_at(twin, path), name)) for path, name, _ in plan.guards]


def _read_in(twin: nn.Module, plan: UnitPlan) -> list[Frozen]:
    """What the guards of a plan read, in a copy."""
    inside = {id(child) for child in twin.modules()}
    freezer = Freezer(inside, lambda _: None, lambda _: None)
    frozen = []
    for (path, name, value), (_, _, guard) in zip(_values_in(twin, plan), plan.guards):
        kept = guard.same == "tensor"
        frozen.append(guard if kept else freezer.freeze(value, dotted((*path, name))))
    return frozen


def _norm(value: Tensor | None) -> float:
    return 0.0 if value is None else float(value.double().norm())


def _compare(found: list[Any], expected: list[Any], tolerance: float, scale: float = 1e-3) -> None:
    """By the norm of the difference; gradients that are missing must be so in both."""
    for a, b in zip(found, expected):
        if a is None or b is None:
            same = a is b
        else:
            same = a.shape == b.shape and a.dtype == b.dtype
            same = same and _norm(a.double() - b.double()) <= tolerance * max(_norm(b), scale)
        if not same:
            raise NotAUnitError("its forward computes something else than its trace", True)
