"""``B``, the plain unit, with one thing changed at a time that alters its function: at once, in the
other mode, or after a later assignment.

Each must end fused and equal to eager, in outputs and gradients, or left alone with a true reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import itertools
import os
import random
import time
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support import fuse_options
from tests.support.fuse_models import conv3

CHANNELS = 6


class B(nn.Module):
    """x + conv2(relu(bn2(conv1(relu(bn1(x))))))."""

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.setup()

    def setup(self) -> None:
        """What a subclass adds."""

    def inner(self, x: Tensor) -> Tensor:
        return self.conv1(F.relu(self.bn1(x)))

    def outer(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(h)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


# Wrong at once, or in the other mode.


class ModeOfAChild(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.dropout(self.inner(x), 0.5, self.bn1.training))


class ModeByAProperty(B):
    @property
    def drops(self) -> bool:
        return self.bn2.training

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.drops:
            h = F.dropout(h, 0.5)
        return x + self.outer(h)


class AlwaysDrops(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.dropout(self.inner(x), 0.5))


class LambdaOverSelf(B):
    def setup(self) -> None:
        self.slope = 0.1
        self.act = lambda h: F.leaky_relu(h, self.slope)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class MethodOfSelf(LambdaOverSelf):
    def setup(self) -> None:
        self.slope = 0.1
        self.act = self.leaky

    def leaky(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x) if isinstance(x, Tensor) and type(x) is Tensor else x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class ReversedGradient(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + Reversal.apply(self.outer(self.inner(x)))


class ReversedShortcut(B):
    def forward(self, x: Tensor) -> Tensor:
        return Reversal.apply(x) + self.outer(self.inner(x))


class GradientOfItsOwn(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(StraightThrough.apply(self.bn1(x)))
        return x + self.conv2(StraightThrough.apply(self.bn2(h)))


class Detached(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x.detach()))


class HookedGradient(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return x + self.outer(h)


class HelperWithoutGradient(B):
    @torch.no_grad()
    def frozen(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.frozen(x))


class SwitchesGradients(B):
    def forward(self, x: Tensor) -> Tensor:
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        h = self.inner(x)
        torch.set_grad_enabled(before)
        return x + self.outer(h)


class OwnAutocast(B):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x + self.outer(self.inner(x))


class NoAutocast(B):
    @torch.autocast("cpu", enabled=False)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x.float()))


class AsksForGradients(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.is_grad_enabled() else x


class AsksForAutocast(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x if torch.is_autocast_enabled("cpu") else x + h


class AsksForTheDefaultDtype(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.get_default_dtype() == torch.float32 else x


class AsksForABackend(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.backends.mkldnn.enabled else x


class Checkpointing(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(checkpoint(self.inner, x, use_reentrant=False))


class ScaledWeight(B):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(x))
        return x + self.outer(F.conv2d(h, 0.5 * self.conv1.weight, padding=1))


class LayerScale(B):
    def setup(self) -> None:
        self.gamma = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.outer(self.inner(x))


class DtypeOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
            return x + 2 * h
        return x + h


class TypeOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if type(x) is Tensor and x.dtype == torch.float32 else x + h


class GradientOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if x.requires_grad else x + h


class HeightOfTheInput(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if x.shape[-1] > 7 else x


class DtypeOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if next(self.parameters()).dtype == torch.float32 else x + 2 * h


class GradientOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.conv1.weight.requires_grad else x


class ValueOfAParameter(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.bn1._parameters["weight"].shape[0] < 7 else x + 2 * h


# Stale after a later assignment: state on the block.


class ChildAttribute(B):
    def setup(self) -> None:
        self.conv1.slope = 0.1

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.leaky_relu(self.bn1(x), self.conv1.slope))
        return x + self.conv2(F.leaky_relu(self.bn2(h), self.conv1.slope))


class Optional(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        scale = getattr(self, "scale", None)
        return x + (h if scale is None else scale * h)


class IfPresent(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if hasattr(self, "scale"):
            h = self.scale * h
        return x + h


class IfItRaises(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        with contextlib.suppress(AttributeError):
            h = h * self.scale
        return x + h


class OptionalOnAChild(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * self.bn2.scale if hasattr(self.bn2, "scale") else x + h


class InADictionary(B):
    def setup(self) -> None:
        self.options = {"scale": False}

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.options["scale"] else x + h


class InAList(B):
    def setup(self) -> None:
        self.flags = [False, True]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.flags[0] else x + h


class InASet(B):
    def setup(self) -> None:
        self.options: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if "double" in self.options else x + h


class InADeque(B):
    def setup(self) -> None:
        self.options: deque[int] = deque([1, 2])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if self.options[0] > 1 else x + h


@dataclasses.dataclass
class Depths:
    scale: int = 1


@dataclasses.dataclass
class Settings:
    depths: Depths = dataclasses.field(default_factory=Depths)


class Slotted:
    __slots__ = ("scale",)

    def __init__(self) -> None:
        self.scale = 1


class Computed:
    """Its attributes come from a dictionary, as many configurations' do."""

    def __init__(self) -> None:
        self.values = {"scale": 1}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["values"][name]
        except KeyError:
            raise AttributeError(name) from None


class Configured(B):
    def __init__(self, config: Any) -> None:
        self_config = config
        super().__init__()
        self.config = self_config

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.config.scale == 1 else x + self.config.scale * h


class Nested(Configured):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.config.depths.scale == 1 else x + self.config.depths.scale * h


class ByAPropertyOfADictionary(B):
    def setup(self) -> None:
        self._options = {"scale": 1}

    @property
    def scale(self) -> int:
        return self._options["scale"]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class Activation(enum.Enum):
    RELU = "relu"
    SILU = "silu"


class ByAnEnum(B):
    def setup(self) -> None:
        self.kind = Activation.RELU

    def forward(self, x: Tensor) -> Tensor:
        act = F.relu if self.kind is Activation.RELU else F.silu
        return x + self.conv2(act(self.bn2(self.conv1(act(self.bn1(x))))))


class Pair(NamedTuple):
    scale: int
    shift: int


class ByATuple(B):
    def setup(self) -> None:
        self.pair = Pair(1, 0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.pair.scale == 1 else x + self.pair.scale * h


class TrueOrOne(B):
    def setup(self) -> None:
        self.scale: Any = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale is True else x + 2 * h


class Partial(B):
    def setup(self) -> None:
        self.act = functools.partial(F.leaky_relu, negative_slope=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class InAPlainList(B):
    """The list is what runs; its modules are registered as well."""

    def setup(self) -> None:
        self.order = [self.bn1, nn.Identity(), self.conv1]
        self.act = nn.ReLU()
        self.order[1] = self.act

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.order:
            h = layer(h)
        return x + self.conv2(self.act(self.bn2(h)))


class Unregistered(B):
    def setup(self) -> None:
        self.hidden = (conv3(CHANNELS, CHANNELS),)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.hidden[0](F.relu(self.bn2(self.inner(x))))


class PlainTensor(B):
    def setup(self) -> None:
        self.scale = torch.tensor(1.0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if float(self.scale) == 1 else x + 2 * h


class TensorInAList(PlainTensor):
    def setup(self) -> None:
        self.scales = [torch.tensor(1.0)]

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scales[0].item() == 1 else x + 2 * h


class OfNumpy(B):
    def setup(self) -> None:
        self.scale = np.array([1.0])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale[0] == 1 else x + 2 * h


class Parent(nn.Module):
    """The block asks the model that it is in, which it holds in a list."""

    def __init__(self, block: type[B]) -> None:
        super().__init__()
        self.scale = 1
        self.block = block()
        self.block.parents = [self]

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class AsksItsParent(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.parents[0].scale == 1 else x + self.parents[0].scale * h


class WeakParent(Parent):
    def __init__(self, block: type[B]) -> None:
        super().__init__(block)
        self.block.parents = [weakref.ref(self)]

    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError


class AsksItsParentWeakly(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.parents[0]().scale == 1 else x + 2 * h


class OwnGetattr(B):
    def setup(self) -> None:
        self.options = {"scale": 1}

    def __getattr__(self, name: str) -> Any:
        if name == "scale":
            return self.__dict__["options"][name]
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class ReadsItsDictionary(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if "scale" not in self.__dict__ else x + 2 * h


class ReadsVars(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * vars(self).get("scale", 1) if vars(self).get("scale") else x + h


# Stale after a later assignment: state of classes, globals, closures, functions.


class OfTheClass(B):
    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.scale == 1 else x + self.scale * h


class OfABase(OfTheClass):
    pass


class OfTheType(B):
    scale = 1

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if type(self).scale == 1 else x + 2 * h


class OfDunderClass(OfTheType):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.__class__.scale == 1 else x + 2 * h


class OptionsClass:
    scale = 1


class OfAnotherClass(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if OptionsClass.scale == 1 else x + OptionsClass.scale * h


class OnTheClassLater(Optional):
    pass


class MethodReplaced(B):
    def scaled(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scaled(self.outer(self.inner(x)))


class ForwardReplaced(B):
    pass


class StaticMethod(B):
    @staticmethod
    def act(h: Tensor) -> Tensor:
        return F.relu(h)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class BaseOfSuper(B):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class SuperForward(BaseOfSuper):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


SCALE = 1
OPTIONS = {"scale": 1}
STATE = types.SimpleNamespace(scale=1)
COUNTS = {"calls": 0}
LOG: list[Any] = []
ACTS = {"relu": F.relu, "silu": F.silu}
CONTEXT: ContextVar[int] = ContextVar("CONTEXT", default=1)


def helper(h: Tensor) -> Tensor:
    return h


def replaced_helper(h: Tensor) -> Tensor:
    return 2 * h


class OfAGlobal(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if SCALE == 1 else x + SCALE * h


class OfAGlobalDictionary(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if OPTIONS["scale"] == 1 else x + OPTIONS["scale"] * h


class OfAGlobalObject(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if STATE.scale == 1 else x + STATE.scale * h


class OfAnotherModule(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if fuse_options.SCALE == 1 else x + fuse_options.SCALE * h


class OfAnotherModulesFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if fuse_options.scale() == 1 else x + 2 * h


class InAComprehension(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if sum(OPTIONS["scale"] for _ in range(2)) == 2 else x + 2 * h


class OfATable(B):
    def setup(self) -> None:
        self.name = "relu"

    def forward(self, x: Tensor) -> Tensor:
        act = ACTS[self.name]
        return x + self.conv2(act(self.bn2(self.conv1(act(self.bn1(x))))))


class GlobalFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + helper(self.outer(self.inner(x)))


def recoded(h: Tensor) -> Tensor:
    return h


class CodeOfAFunction(B):
    def forward(self, x: Tensor) -> Tensor:
        return x + recoded(self.outer(self.inner(x)))


def closing_over(scale: int) -> tuple[type[B], Callable[[int], None]]:
    def change(value: int) -> None:
        nonlocal scale
        scale = value

    class Closing(B):
        def forward(self, x: Tensor) -> Tensor:
            h = self.outer(self.inner(x))
            return x + h if scale == 1 else x + scale * h

    return Closing, change


Closing, change_closure = closing_over(1)


def decorated(options: dict[str, int]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(self: Any, x: Tensor) -> Tensor:
            out = function(self, x)
            return out if options["scale"] == 1 else options["scale"] * out

        return wrapper

    return decorate


DECORATION = {"scale": 1}


class Decorated(B):
    @decorated(DECORATION)
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x))


class DefaultArgument(B):
    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if scale == 1 else x + scale * h


class KeywordDefault(B):
    def forward(self, x: Tensor, *, scale: int = 1) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if scale == 1 else x + scale * h


class MutableDefault(B):
    def forward(self, x: Tensor, options: dict[str, int] = {"scale": 1}) -> Tensor:  # noqa: B006
        h = self.outer(self.inner(x))
        return x + h if options["scale"] == 1 else x + options["scale"] * h


@functools.cache
def cached_scale() -> int:
    return OPTIONS["scale"]


class Cached(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if cached_scale() == 1 else x + 2 * h


class Context(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if CONTEXT.get() == 1 else x + 2 * h


class Environment(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + 2 * h if os.environ.get("DOUBLE_THE_BRANCH") else x + h


class ImportsInside(B):
    def forward(self, x: Tensor) -> Tensor:
        from tests.support.fuse_options import SCALE

        h = self.outer(self.inner(x))
        return x + h if SCALE == 1 else x + 2 * h


class Evaluates(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if eval("OPTIONS['scale']") == 1 else x + 2 * h


# State that moves by itself, and effects.


class Draws(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if random.random() < 0.5 else x


class DrawsWithNumpy(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if np.random.rand() < 0.5 else x  # noqa: NPY002


class OwnGenerator(B):
    def setup(self) -> None:
        self.generator = torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if torch.rand((), generator=self.generator) < 0.5 else x


class OwnRandom(B):
    def setup(self) -> None:
        self.random = random.Random(3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if self.random.random() < 0.5 else x


class Cycles(B):
    def setup(self) -> None:
        self.cycle = itertools.cycle([1, 2, 3])

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if next(self.cycle) < 2 else x


class CountsItsCalls(B):
    def setup(self) -> None:
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.outer(self.inner(x))
        return x + h if self.calls < 3 else x


class CountsInADictionary(B):
    def setup(self) -> None:
        self.counts = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        self.counts["calls"] += 1
        h = self.outer(self.inner(x))
        return x + h if self.counts["calls"] % 2 else x


class CountsGlobally(B):
    def forward(self, x: Tensor) -> Tensor:
        COUNTS["calls"] += 1
        return x + self.outer(self.inner(x))


class CountsInAnObject(Configured):
    def forward(self, x: Tensor) -> Tensor:
        self.config.scale += 1
        return x + self.outer(self.inner(x))


class Logs(B):
    def forward(self, x: Tensor) -> Tensor:
        LOG.append(len(LOG))
        return x + self.outer(self.inner(x))


class AssignsAGlobal(B):
    def forward(self, x: Tensor) -> Tensor:
        global LAST
        LAST = 1
        return x + self.outer(self.inner(x))


LAST = 0


class Clock(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if time.time() > 0 else x


class Steps(B):
    """A generator kept between calls."""

    def setup(self) -> None:
        def numbers() -> Iterator[int]:
            yield from itertools.count()

        self.numbers = numbers

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        if not hasattr(self, "running"):
            self.running = self.numbers()
        return x + h if next(self.running) % 2 == 0 else x


# The children.


class Standard(nn.Conv2d):
    """A convolution without a forward of its own."""


class OwnConv(B):
    def setup(self) -> None:
        self.conv1 = Standard(CHANNELS, CHANNELS, 3, padding=1, bias=False)


class ScaledConv(nn.Conv2d):
    scale = 1.0

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, self.scale * weight, bias)


class ConvWithAScale(B):
    def setup(self) -> None:
        self.conv1 = ScaledConv(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.conv1.scale = 2.0


class OwnNorm(nn.BatchNorm2d):
    slope = 0.1

    def forward(self, input: Tensor) -> Tensor:
        out = F.batch_norm(
            input, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, self.momentum, self.eps,
        )  # fmt: skip
        return F.leaky_relu(out, self.slope)


class NormWithASlope(B):
    def setup(self) -> None:
        self.bn1, self.bn2 = OwnNorm(CHANNELS), OwnNorm(CHANNELS)
        for norm in (self.bn1, self.bn2):
            norm.num_batches_tracked = None

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x))))


class CallOfItsOwn(nn.Sequential):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class BranchThatDoubles(B):
    def setup(self) -> None:
        self.branch = CallOfItsOwn(self.bn1, nn.ReLU(), self.conv1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.branch(x))


class LengthOfAList(B):
    def setup(self) -> None:
        self.extra = nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        for layer in self.extra:
            h = layer(h)
        return x + self.outer(h)


class KindOfAChild(B):
    def setup(self) -> None:
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if isinstance(self.act, nn.ReLU) else x + 2 * h


class InPlaceSum(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        h[:, :1] = 0
        return x + h


class Squeezed(B):
    def setup(self) -> None:
        self.gate = nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h * self.gate(h.mean((2, 3), keepdim=True)).sigmoid()


class MarksItsOutput(B):
    def forward(self, x: Tensor) -> Tensor:
        out = x + self.outer(self.inner(x))
        out.scale = 2
        return out


class ReadsAMark(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if getattr(x, "scale", None) is None else x + 2 * h


class ShrinksSometimes(B):
    """Whether the branch keeps the size decides, and that is the convolution's stride."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if h.shape != x.shape:
            h = F.interpolate(h, x.shape[2:])
        return x + self.outer(h)


class AsksForChannels(B):
    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if x.shape[1] == CHANNELS else 2 * h


class ScheduledNorm(nn.BatchNorm2d):
    steps = 0

    @property
    def momentum(self) -> float:
        return 0.1 if self.steps < 2 else 0.9

    @momentum.setter
    def momentum(self, value: float) -> None:
        pass


class MomentumBySchedule(B):
    def setup(self) -> None:
        self.bn1 = ScheduledNorm(CHANNELS)


class OtherBase(nn.Module):
    def outer(self, h: Tensor) -> Tensor:
        return 2 * self.conv2(F.relu(self.bn2(h)))


class OneBase(nn.Module):
    def outer(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(h)))


class BasesChange(OneBase):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.bn1, self.conv1 = nn.BatchNorm2d(CHANNELS), conv3(CHANNELS, CHANNELS)
        self.bn2, self.conv2 = nn.BatchNorm2d(CHANNELS), conv3(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.conv1(F.relu(self.bn1(x))))


class Swish:
    """An object that is called, with a factor of its own."""

    def __init__(self) -> None:
        self.slope = 0.1

    def __call__(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope)


class CallsAnObject(B):
    def setup(self) -> None:
        self.act = Swish()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.bn2(self.conv1(self.act(self.bn1(x))))))


class Backwards(nn.Sequential):
    """Its children in the other order."""

    def __iter__(self) -> Iterator[nn.Module]:
        return reversed(list(self._modules.values()))


class Contiguous(B):
    def forward(self, x: Tensor) -> Tensor:
        return (x + self.outer(self.inner(x))).contiguous()


Later = Callable[[nn.Module, pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One block.

    build: makes it. later: what is assigned to it after ``fuse`` (to the unfused twin alike), or to
    what is global. fused: whether it must run fused before that; None where either is right.
    reason: a pattern of the words that ``explain`` must say where it does not run fused.
    """

    build: Callable[[], nn.Module]
    later: Later | None = None
    fused: bool | None = None
    reason: str = r"\w"


def assign(name: str, value: Any) -> Later:
    """Of an attribute, by its dotted path from the block."""
    owners, _, last = name.rpartition(".")

    def later(block: nn.Module, _: pytest.MonkeyPatch) -> None:
        owner: Any = block
        for part in owners.split(".") if owners else ():
            owner = getattr(owner, part)
        setattr(owner, last, value)

    return later


def on(owner: Any, name: str, value: Any) -> Later:
    """Of an attribute of something global."""
    return lambda _, patch: patch.setattr(owner, name, value, raising=False)


def here(name: str, value: Any) -> Later:
    """Of a global of this module."""
    return lambda _, patch: patch.setitem(globals(), name, value)


def item(name: str, key: Any, value: Any) -> Later:
    """Of an item of a container that the block has."""

    def later(block: nn.Module, _: pytest.MonkeyPatch) -> None:
        getattr(block, name)[key] = value

    return later


def doubled(self: Any, x: Tensor) -> Tensor:
    return x + 2 * self.outer(self.inner(x))


def double_input(conv: nn.Conv2d) -> Callable[..., Tensor]:
    return lambda input, weight, bias: F.conv2d(2 * input, weight, bias, padding=1)


def _replace_conv_forward(block: Any, _: Any) -> None:
    block.conv1._conv_forward = double_input(block.conv1)


def _replace_norms_check(block: Any, _: Any) -> None:
    def check(input: Tensor) -> None:
        input.mul_(1)
        raise ValueError("no input is right")

    block.bn1._check_input_dim = check


def _register_scale(block: Any, _: Any) -> None:
    block.register_buffer("scale", torch.tensor(2.0))


def _change_code(block: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(recoded, "__code__", replaced_helper.__code__)


def _change_closure(block: Any, patch: pytest.MonkeyPatch) -> None:
    change_closure(2)


def _change_bases(block: Any, _: Any) -> None:
    kind = next(c for c in type(block).__mro__ if c.__name__ == "Changing")
    kind.__bases__ = (OtherBase, BasesChange)


def _environment(block: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("DOUBLE_THE_BRANCH", "1")


def _other_layer(block: Any, _: Any) -> None:
    block.order[1] = nn.Identity()


def _append_layer(block: Any, _: Any) -> None:
    block.extra.append(nn.Tanh())


DIFFERS = r"is .* when the block was fused|was replaced|changed|has other children"
SCALED = r"scale.*(when the block was fused|changed)"

MUTATIONS: dict[str, Mutation] = {
    # At once, or in the other mode.
    "mode-of-a-child": Mutation(ModeOfAChild, None, None, "dropout"),
    "mode-by-a-property": Mutation(ModeByAProperty, None, None, "dropout"),
    "always-drops": Mutation(AlwaysDrops, None, False, "dropout"),
    "lambda-over-self": Mutation(LambdaOverSelf, assign("slope", 0.5), False, "lambda"),
    "method-of-self": Mutation(MethodOfSelf, assign("slope", 0.5), True, "slope"),
    "gradient-reversed": Mutation(ReversedGradient, None, False, "autograd.Function|Reversal"),
    "gradient-reversed-shortcut": Mutation(ReversedShortcut, None, False, "autograd.Function"),
    "gradient-straight-through": Mutation(GradientOfItsOwn, None, False, "autograd.Function"),
    "gradient-detached": Mutation(Detached, None, False, "detach"),
    "gradient-hooked": Mutation(HookedGradient, None, False),
    "no-grad-helper": Mutation(HelperWithoutGradient, None, False, "grad"),
    "set-grad-enabled": Mutation(SwitchesGradients, None, False, "grad"),
    "autocast-of-its-own": Mutation(OwnAutocast, None, False, "autocast"),
    "autocast-off-by-decorator": Mutation(NoAutocast, None, False, "float|autocast"),
    "asks-for-gradients": Mutation(AsksForGradients, None, False, "is_grad_enabled"),
    "asks-for-autocast": Mutation(AsksForAutocast, None, False, "is_autocast_enabled"),
    "asks-for-default-dtype": Mutation(AsksForTheDefaultDtype, None, False, "get_default_dtype"),
    "asks-for-a-backend": Mutation(AsksForABackend, None, False, "backends|enabled|mkldnn"),
    "checkpointed": Mutation(Checkpointing, None, False, "checkpoint"),
    "scaled-weight": Mutation(ScaledWeight, None, False),
    "layer-scale": Mutation(LayerScale, None, False, "gamma|mul|\\*|product"),
    "dtype-of-the-input": Mutation(DtypeOfTheInput, None, False, "dtype"),
    "type-of-the-input": Mutation(TypeOfTheInput, None, False, "type"),
    "gradient-of-the-input": Mutation(GradientOfTheInput, None, False, "requires_grad|input"),
    "height-of-the-input": Mutation(HeightOfTheInput, None, False, "size|shape"),
    "dtype-of-a-parameter": Mutation(DtypeOfAParameter, None, False, "parameters"),
    "gradient-of-a-parameter": Mutation(GradientOfAParameter, None, False, "requires_grad|weight"),
    "value-of-a-parameter": Mutation(ValueOfAParameter, None, False, "_parameters"),
    "squeeze-excitation": Mutation(Squeezed, None, False, "mean|sigmoid|product|mul"),
    "writes-an-item": Mutation(InPlaceSum, None, False),
    # State of the block and of what it holds.
    "child-attribute": Mutation(ChildAttribute, assign("conv1.slope", 0.5), True, "conv1.slope"),
    "optional": Mutation(Optional, assign("scale", 2.0), True, "scale"),
    "optional-parameter": Mutation(
        Optional,
        lambda b, _: setattr(b, "scale", nn.Parameter(torch.tensor(2.0))),
        True,
        "scale|children",
    ),
    "optional-buffer": Mutation(Optional, _register_scale, True, "scale"),
    "optional-on-the-class": Mutation(OnTheClassLater, on(OnTheClassLater, "scale", 2.0), True,
                                      "scale"),
    "if-present": Mutation(IfPresent, assign("scale", 2.0), True, "scale"),
    "if-it-raises": Mutation(IfItRaises, assign("scale", 2.0), None, "scale|suppress|with|context"),
    "optional-on-a-child": Mutation(OptionalOnAChild, assign("bn2.scale", 2.0), True, "scale"),
    "dictionary": Mutation(InADictionary, item("options", "scale", True), True, "options"),
    "dictionary-replaced": Mutation(InADictionary, assign("options", {"scale": True}), True,
                                    "options"),
    "list": Mutation(InAList, item("flags", 0, True), True, "flags"),
    "set": Mutation(InASet, lambda b, _: b.options.add("double"), True, "options"),
    "deque": Mutation(InADeque, lambda b, _: b.options.popleft(), True, "options"),
    "namespace": Mutation(
        lambda: Configured(types.SimpleNamespace(scale=1)), assign("config.scale", 2), True,
        "config"
    ),
    "dataclass": Mutation(lambda: Configured(Depths()), assign("config.scale", 2), True, "config"),
    "slots": Mutation(lambda: Configured(Slotted()), assign("config.scale", 2), True, "config"),
    "getattr-of-a-configuration": Mutation(
        lambda: Configured(Computed()), lambda b, _: b.config.values.update(scale=2), None, "config"
    ),
    "class-of-a-configuration": Mutation(
        lambda: Configured(OptionsClass()), on(OptionsClass, "scale", 2), True, "scale"
    ),
    "configuration-is-a-class": Mutation(
        lambda: Configured(OptionsClass), on(OptionsClass, "scale", 2), True, "scale"
    ),
    "nested-dataclass": Mutation(
        lambda: Nested(Settings()), assign("config.depths.scale", 2), True, "config"
    ),
    "property-of-a-dictionary": Mutation(
        ByAPropertyOfADictionary, item("_options", "scale", 2), True, "_options"
    ),
    "enum": Mutation(ByAnEnum, assign("kind", Activation.SILU), True, "kind"),
    "named-tuple": Mutation(ByATuple, assign("pair", Pair(2, 0)), True, "pair"),
    "true-or-one": Mutation(TrueOrOne, assign("scale", 1), True, "scale"),
    "partial": Mutation(
        Partial, lambda b, _: b.act.keywords.update(negative_slope=0.5), None, "act"
    ),
    "modules-in-a-list": Mutation(InAPlainList, _other_layer, None, "order"),
    "unregistered": Mutation(Unregistered, None, None, "hidden|installed|registered"),
    "plain-tensor": Mutation(PlainTensor, lambda b, _: b.scale.fill_(2), False, "scale"),
    "tensor-in-a-list": Mutation(
        TensorInAList, lambda b, _: b.scales[0].fill_(2), False, "scales|item"
    ),
    "numpy-array": Mutation(OfNumpy, lambda b, _: b.scale.fill(2), False, "scale"),
    "parent": Mutation(lambda: Parent(AsksItsParent), assign("scale", 2), None, "parents|scale"),
    "weak-parent": Mutation(
        lambda: WeakParent(AsksItsParentWeakly), assign("scale", 2), False, "parents|weak"
    ),
    "getattr-of-its-own": Mutation(OwnGetattr, item("options", "scale", 2), None, "options|dict"),
    "reads-its-dictionary": Mutation(ReadsItsDictionary, assign("scale", 2), None, "__dict__"),
    "reads-vars": Mutation(ReadsVars, assign("scale", 2), None, "vars|__dict__"),
    # State of classes, globals, closures and functions.
    "class-attribute": Mutation(OfTheClass, on(OfTheClass, "scale", 2), True, "scale"),
    "class-attribute-shadowed": Mutation(OfTheClass, assign("scale", 2), True, "scale"),
    "attribute-of-a-base": Mutation(OfABase, on(OfTheClass, "scale", 2), True, "scale"),
    "attribute-in-front-of-a-base": Mutation(OfABase, on(OfABase, "scale", 2), True, "scale"),
    "type-of-self": Mutation(OfTheType, on(OfTheType, "scale", 2), None, "scale|type"),
    "class-of-self": Mutation(OfDunderClass, on(OfDunderClass, "scale", 2), True, "scale"),
    "another-class": Mutation(OfAnotherClass, on(OptionsClass, "scale", 2), True, "scale"),
    "method-replaced": Mutation(
        MethodReplaced, on(MethodReplaced, "scaled", lambda self, h: 2 * h), True, "scaled"
    ),
    "method-on-the-block": Mutation(
        MethodReplaced, assign("scaled", replaced_helper), True, "scaled"
    ),
    "forward-replaced": Mutation(
        ForwardReplaced, on(ForwardReplaced, "forward", doubled), True, "forward"
    ),
    "forward-of-a-base-replaced": Mutation(SuperForward, on(BaseOfSuper, "forward", doubled), True,
                                           "forward"),
    "method-of-a-base-replaced": Mutation(
        B, on(B, "outer", lambda self, h: 2 * self.conv2(F.relu(self.bn2(h)))), True, "outer"
    ),
    "static-method": Mutation(
        StaticMethod, on(StaticMethod, "act", staticmethod(torch.tanh)), True, "act"
    ),
    "global": Mutation(OfAGlobal, here("SCALE", 2), True, "SCALE"),
    "global-dictionary": Mutation(
        OfAGlobalDictionary, lambda _, p: p.setitem(OPTIONS, "scale", 2), True, "OPTIONS"
    ),
    "global-object": Mutation(OfAGlobalObject, on(STATE, "scale", 2), True, "STATE"),
    "global-of-another-module": Mutation(
        OfAnotherModule, on(fuse_options, "SCALE", 2), True, "SCALE"
    ),
    "global-of-another-modules-function": Mutation(
        OfAnotherModulesFunction, on(fuse_options, "SCALE", 2), True, "SCALE"
    ),
    "global-in-a-comprehension": Mutation(
        InAComprehension, lambda _, p: p.setitem(OPTIONS, "scale", 2), True, "OPTIONS"
    ),
    "table-of-functions": Mutation(
        OfATable, lambda _, p: p.setitem(ACTS, "relu", F.silu), True, "ACTS"
    ),
    "global-function": Mutation(GlobalFunction, here("helper", replaced_helper), True, "helper"),
    "code-of-a-function": Mutation(CodeOfAFunction, _change_code, True, "recoded"),
    "closure": Mutation(Closing, _change_closure, True, "scale"),
    "closure-of-a-decorator": Mutation(
        Decorated, lambda _, p: p.setitem(DECORATION, "scale", 2), True, "options"
    ),
    "default-argument": Mutation(
        DefaultArgument, on(DefaultArgument.forward, "__defaults__", (2,)), True, "forward"
    ),
    "keyword-default": Mutation(
        KeywordDefault, on(KeywordDefault.forward, "__kwdefaults__", {"scale": 2}), True, "forward"
    ),
    "mutable-default": Mutation(
        MutableDefault,
        lambda _, p: p.setitem(MutableDefault.forward.__defaults__[0], "scale", 2),
        True,
        "forward",
    ),
    "cached-function": Mutation(
        Cached, lambda *_: cached_scale.cache_clear(), False, "cached_scale"
    ),
    "context-variable": Mutation(Context, None, False, "ContextVar"),
    "environment": Mutation(Environment, _environment, None, "environ|imports|get"),
    "import-inside": Mutation(ImportsInside, on(fuse_options, "SCALE", 2), None, "import|SCALE"),
    "eval": Mutation(Evaluates, lambda _, p: p.setitem(OPTIONS, "scale", 2), False, "eval"),
    # State that moves by itself, and effects.
    "random": Mutation(Draws, None, False, "random"),
    "numpy-random": Mutation(DrawsWithNumpy, None, False, "rand"),
    "generator": Mutation(OwnGenerator, None, False, "rand|generator"),
    "random-of-its-own": Mutation(OwnRandom, None, False, "random"),
    "cycle": Mutation(Cycles, None, False, "cycle|next"),
    "counts-its-calls": Mutation(CountsItsCalls, None, False, "calls|attributes"),
    "counts-in-a-dictionary": Mutation(CountsInADictionary, None, False, "counts"),
    "counts-globally": Mutation(CountsGlobally, None, False, "COUNTS"),
    "counts-in-an-object": Mutation(lambda: CountsInAnObject(Depths()), None, False, "config"),
    "logs": Mutation(Logs, None, False, "LOG"),
    "assigns-a-global": Mutation(AssignsAGlobal, None, False, "LAST"),
    "clock": Mutation(Clock, None, False, "time"),
    "generator-function": Mutation(Steps, None, False, "running|attributes|next|numbers"),
    # The children.
    "convolution-of-its-own": Mutation(OwnConv, _replace_conv_forward, True, "conv"),
    "convolutions-forward": Mutation(B, _replace_conv_forward, True, "conv"),
    "norms-check": Mutation(B, _replace_norms_check, True, "norm|bn1"),
    "forward-of-a-convolutions-class": Mutation(
        OwnConv, on(Standard, "forward", lambda self, x: 2 * F.conv2d(x, self.weight, padding=1)),
        True, "conv|forward"
    ),
    "convolution-with-a-scale": Mutation(ConvWithAScale, assign("conv1.scale", 3.0), False, "conv"),
    "slope-of-a-norms-class": Mutation(
        NormWithASlope, on(OwnNorm, "slope", 0.5), None, "slope|run"
    ),
    "call-of-its-own": Mutation(BranchThatDoubles, None, False),
    "module-list-grows": Mutation(LengthOfAList, _append_layer, True, "extra"),
    "marks-its-output": Mutation(MarksItsOutput, None, False, "scale"),
    "reads-a-mark": Mutation(ReadsAMark, None, False, "scale|mul"),
    "shrinks-sometimes": Mutation(ShrinksSometimes, assign("conv1.stride", (2, 2)), True, "stride"),
    "asks-for-channels": Mutation(AsksForChannels, None, True),
    "momentum-by-schedule": Mutation(
        MomentumBySchedule, lambda b, _: setattr(b.bn1, "steps", 5), False, "momentum"
    ),
    "momentum-of-a-norms-class": Mutation(
        B, lambda b, _: setattr(b.bn1, "momentum", 0.9), True, "momentum"
    ),
    "bases-change": Mutation(
        lambda: type("Changing", (BasesChange,), {})(), _change_bases, True, "bases"
    ),
    "object-that-is-called": Mutation(CallsAnObject, assign("act.slope", 0.5), True, "slope"),
    "object-whose-class-changes": Mutation(
        CallsAnObject, on(Swish, "__call__", lambda self, h: torch.tanh(h)), True, "__call__"
    ),
    "sequence-backwards": Mutation(lambda: Backwards(B(), B(), B())),
    "contiguous": Mutation(Contiguous, None, False, "contiguous"),
    "relu-patched": Mutation(B, on(F, "relu", F.silu), True, "relu"),
    "kind-of-a-child": Mutation(KindOfAChild, assign("act", nn.SiLU()), True, "act"),
}  # fmt: skip
