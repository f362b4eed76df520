"""Mutations of the children, and of how they are called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models import conv3
from tests.support.mutations.base import CHANNELS, B, Mutation, assign, on


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


class OtherNameOfAChild(B):
    def setup(self) -> None:
        self.also = self.conv1

    def inner(self, x: Tensor) -> Tensor:
        return self.also(F.relu(self.bn1(x)))


class KindOfAChild(B):
    def setup(self) -> None:
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        h = self.outer(self.inner(x))
        return x + h if isinstance(self.act, nn.ReLU) else x + 2 * h


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


def double_input(conv: nn.Conv2d) -> Callable[..., Tensor]:
    return lambda input, weight, bias: F.conv2d(2 * input, weight, bias, padding=1)


def _replace_conv_forward(block: Any, _: Any) -> None:
    block.conv1._conv_forward = double_input(block.conv1)


def _replace_norms_check(block: Any, _: Any) -> None:
    def check(input: Tensor) -> None:
        input.mul_(1)
        raise ValueError("no input is right")

    block.bn1._check_input_dim = check


def _change_bases(block: Any, _: Any) -> None:
    kind = next(c for c in type(block).__mro__ if c.__name__ == "Changing")
    kind.__bases__ = (OtherBase, BasesChange)


def _append_layer(block: Any, _: Any) -> None:
    block.extra.append(nn.Tanh())


MUTATIONS: dict[str, Mutation] = {
    "convolution-of-its-own": Mutation(OwnConv, _replace_conv_forward, True, "conv"),
    "convolutions-forward": Mutation(B, _replace_conv_forward, True, "conv"),
    "norms-check": Mutation(B, _replace_norms_check, True, "norm|bn1"),
    "forward-of-a-convolutions-class": Mutation(
        OwnConv, on(Standard, "forward", lambda self, x: 2 * F.conv2d(x, self.weight, padding=1)),
        True, "conv|forward"
    ),
    "convolution-with-a-scale": Mutation(ConvWithAScale, assign("conv1.scale", 3.0), True, "conv"),
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
    "other-name-of-a-child": Mutation(
        OtherNameOfAChild, assign("also", conv3(CHANNELS, CHANNELS)), True, "also was conv1"
    ),
    "kind-of-a-child": Mutation(KindOfAChild, assign("act", nn.SiLU()), True, "act"),
}  # fmt: skip
