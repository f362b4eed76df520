"""Mutations of group norms, and of tensors that a block computes for its convolutions and norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.mutations.base import CHANNELS, B, Mutation, assign, on


class G(B):
    """The plain unit with group norms, and a weight that is computed."""

    def setup(self) -> None:
        self.bn1, self.bn2 = nn.GroupNorm(2, CHANNELS), nn.GroupNorm(3, CHANNELS)
        self.gain, self.counted = 0.5, True
        self.more()

    def more(self) -> None:
        """What a subclass adds."""

    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight - self.conv1.weight.mean() * self.gain

    def normed(self, x: Tensor) -> Tensor:
        return self.bn1(x)

    def inner(self, x: Tensor) -> Tensor:
        h = F.relu(self.normed(x))
        return F.conv2d(h, self.weight(h), padding=1)


class WeightOfItsInput(G):
    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight * h.mean()


class RandomWeight(G):
    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight + 0.1 * torch.randn_like(self.conv1.weight)


class WeightCounts(G):
    """It changes a buffer, on which it depends."""

    def more(self) -> None:
        self.register_buffer("steps", torch.zeros(()))

    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight * self.steps.add_(1)


class WeightWritesItself(G):
    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight.detach().mul_(0.5)


class TiedWeights(G):
    """A trace knows a tensor by one of its names."""

    def more(self) -> None:
        self.kernel = self.conv1.weight

    def weight(self, h: Tensor) -> Tensor:
        return 0.5 * self.kernel


class NoWeightOfAConvolution(G):
    def more(self) -> None:
        self.kernel = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3))

    def weight(self, h: Tensor) -> Tensor:
        return 0.1 * self.kernel


class OtherStride(G):
    def more(self) -> None:
        self.conv1.stride = (2, 2)


class WithoutItsBias(G):
    def more(self) -> None:
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


class OtherShape(G):
    """A weight that is broadcast from one of another shape."""

    def more(self) -> None:
        self.conv1 = nn.Conv2d(CHANNELS, CHANNELS, 1, padding=1, bias=False)

    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight.expand(-1, -1, 3, 3)


class GroupNormTwice(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class OwnForward(G):
    def more(self) -> None:
        self.bn1 = GroupNormTwice(2, CHANNELS)


class OtherEps(G):
    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.bn1.weight, self.bn1.bias, 0.1)


class OtherTensors(G):
    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, 1 + self.bn1.weight, self.bn1.bias, self.bn1.eps)


class OtherNumberOfGroups(G):
    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 3, self.bn1.weight, self.bn1.bias, self.bn1.eps)


class CrossedTensors(G):
    def normed(self, x: Tensor) -> Tensor:
        return F.group_norm(x, 2, self.bn1.weight, self.bn2.bias, self.bn1.eps)


class RunningInstanceNorm(G):
    def more(self) -> None:
        self.bn1 = nn.InstanceNorm2d(CHANNELS, track_running_stats=True)


class ShiftOfPixels(G):
    """What is added differs from pixel to pixel."""

    def more(self) -> None:
        self.place = nn.Parameter(torch.randn(1, CHANNELS, 5, 6))

    def outer(self, h: Tensor) -> Tensor:
        return super().outer(h + self.place)


class ShiftOfAll(G):
    """What is added is one number for all channels."""

    def more(self) -> None:
        self.place = nn.Parameter(torch.randn(1))

    def outer(self, h: Tensor) -> Tensor:
        return super().outer(h + self.place)


class ShiftReadBefore(G):
    """Behind the shift stands what was in front of it."""

    def more(self) -> None:
        self.place = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        return x + self.outer(h + self.place) + h


class ScaledBatchNorm(G):
    def more(self) -> None:
        self.bn2 = nn.BatchNorm2d(CHANNELS)
        self.scale = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def outer(self, h: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(h) * self.scale))


class ScaledInPlace(G):
    """The norm's result under two names, one of which is read later."""

    def more(self) -> None:
        self.scale = nn.Parameter(torch.randn(CHANNELS, 1, 1))

    def outer(self, h: Tensor) -> Tensor:
        out = self.bn2(h)
        same = out
        same *= self.scale
        return self.conv2(F.relu(out))


class Normalises(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.norm()


class ByAModule(G):
    def more(self) -> None:
        self.normalises = Normalises()

    def weight(self, h: Tensor) -> Tensor:
        return self.normalises(self.conv1.weight)


class ByAConvolutionToo(G):
    """A convolution of the unit also computes another's weight."""

    def more(self) -> None:
        self.conv2 = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)

    def weight(self, h: Tensor) -> Tensor:
        return self.conv1.weight + self.conv2(self.conv1.weight)


class Unused(G):
    """A module with an effect of its own is called for nothing."""

    def more(self) -> None:
        self.monitor = nn.BatchNorm2d(CHANNELS)

    def weight(self, h: Tensor) -> Tensor:
        self.monitor(self.conv1.weight)
        return self.conv1.weight


class DividedSum(G):
    def more(self) -> None:
        self.factor = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.factor


class DividedBranch(G):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x)) / 2


def _batch_norm(block: nn.Module, _: pytest.MonkeyPatch) -> None:
    block.bn2 = nn.BatchNorm2d(CHANNELS)


MUTATIONS: dict[str, Mutation] = {
    "computed-weight": Mutation(G, assign("gain", 2.0), True, "gain"),
    "computed-weight-of-another-type": Mutation(G, assign("conv1", nn.Conv2d(
        CHANNELS, CHANNELS, 3, padding=1, bias=True)), True, "bias|None"),
    "computed-weight-patched": Mutation(G, on(G, "weight", lambda self, h: self.conv1.weight),
                                        True, "weight"),
    "computed-weight-of-x": Mutation(WeightOfItsInput, None, False, "depends on the input|mean"),
    "computed-weight-random": Mutation(RandomWeight, None, False, "random"),
    "computed-weight-counts": Mutation(WeightCounts, None, False, "in place"),
    "computed-weight-in-place": Mutation(WeightWritesItself, None, False, "in place"),
    "computed-weight-tied": Mutation(TiedWeights, None, False, "another name"),
    "computed-weight-of-no-convolution": Mutation(NoWeightOfAConvolution, None, False, "no Conv2d"),
    "computed-weight-other-stride": Mutation(OtherStride, None, False, "stride"),
    "computed-weight-without-bias": Mutation(WithoutItsBias, None, False, "bias"),
    "computed-weight-of-another-shape": Mutation(OtherShape, None, False, "shape"),
    "computed-weight-stride-later": Mutation(G, assign("conv1.stride", (2, 2)), True, "stride"),
    "computed-by-a-module": Mutation(
        ByAModule, assign("normalises", nn.Identity()), True, "normalises was replaced"),
    "computed-by-a-convolution-too": Mutation(ByAConvolutionToo, None, False, "conv2"),
    "computed-for-nothing": Mutation(Unused, None, False, "not used"),
    "group-norm-of-its-own": Mutation(OwnForward, None, False, "mul"),
    "group-norm-other-eps": Mutation(OtherEps, None, False, "group_norm"),
    "group-norm-eps-later": Mutation(G, assign("bn1.eps", 0.5), True),
    "group-norm-groups-later": Mutation(G, assign("bn1.num_groups", 6), True),
    "group-norm-other-tensors": Mutation(OtherTensors, None, False, "group_norm"),
    "group-norm-other-groups": Mutation(OtherNumberOfGroups, None, False, "group_norm"),
    "group-norm-crossed-tensors": Mutation(CrossedTensors, None, False, "group_norm"),
    "group-norm-of-another-type": Mutation(G, _batch_norm, True, "bn2|norm"),
    "instance-norm-running": Mutation(RunningInstanceNorm, None, False, "InstanceNorm2d"),
    "shift-of-pixels": Mutation(ShiftOfPixels, None, False, "fails on a trial"),
    "shift-of-all": Mutation(ShiftOfAll, None, False, "expected"),
    "shift-read-before": Mutation(ShiftReadBefore, None, False, r"\w"),
    "scaled-batch-norm": Mutation(ScaledBatchNorm, None, False, "mul with the tensor scale"),
    "scaled-in-place": Mutation(ScaledInPlace, None, None, r"\w"),
    "divided-sum": Mutation(DividedSum, assign("factor", 3.0), True, "factor"),
    "divided-branch": Mutation(DividedBranch, None, False, "truediv"),
}  # fmt: skip
