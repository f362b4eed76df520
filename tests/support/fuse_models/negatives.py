"""Blocks that must be left alone altogether."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models.plain import Basic, WithAct, branch, conv1, conv3
from tests.support.fuse_models.unusual import (
    Float32Convolution,
    FrozenShortcut,
    PartlyFloat32,
    TwoActivations,
)


class PostActivation(Basic):
    """``Basic``'s children and state_dict, the first ResNet's dataflow (norms of equal width)."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        out += shortcut
        return F.relu(out)


class PostActivationSum(Basic):
    """The same without the last ReLU: it ends with a norm in front of the addition."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x


class NoFirstReLU(nn.Module):
    """Norm, conv, norm, ReLU, conv, norm: PyramidNet's, with zero channels appended to x."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.bn1(x))
        out = self.conv2(self.relu(self.bn2(out)))
        out = self.bn3(out)
        short = x
        if out.shape[1] != x.shape[1]:
            short = F.pad(x, (0, 0, 0, 0, 0, out.shape[1] - x.shape[1]))
        return out + short


class SquarePlus(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (x + torch.sqrt(x * x + 4))


class MishFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.tanh(F.softplus(x))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        t = torch.tanh(F.softplus(x))
        return g * (t + x * torch.sigmoid(x) * (1 - t * t))


class OwnMish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return MishFunction.apply(x)


class TanhBlock(TwoActivations):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.tanh(self.bn2(self.conv1(torch.tanh(self.bn1(x))))))


class ReLUSubclass(nn.ReLU):
    """Is an nn.ReLU by type and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) - 0.1


class Scaled(TwoActivations):
    """x + 0.1 F(x), said in the way of ``how``."""

    def __init__(self, channels: int, how: str) -> None:
        super().__init__(channels)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        if self.how == "product":
            return x + 0.1 * out
        if self.how == "alpha":
            return torch.add(x, out, alpha=0.1)
        if self.how == "in-place alpha":
            return out.add_(x, alpha=0.5)
        if self.how == "difference":
            return x - out
        return torch.maximum(x, out)


class Dense(nn.Module):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), conv1(channels, 4 * growth)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), conv3(4 * growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(out)))], 1)


class NoNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv3(channels, channels), conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class NormAfterReLU(TwoActivations):
    """ReLU -> norm -> conv."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(F.relu(self.conv1(self.bn1(F.relu(x))))))


NEGATIVES: dict[str, Callable[[], nn.Module]] = {
    "post-activation": lambda: PostActivation(8, 8),
    "post-activation-without-last-relu": lambda: PostActivationSum(8, 8),
    "no-first-relu": lambda: NoFirstReLU(8, 8),
    "no-first-relu-padded-shortcut": lambda: NoFirstReLU(8, 12),
    "no-grad-shortcut": lambda: FrozenShortcut(8, 12),
    "autocast-off-for-a-part": lambda: PartlyFloat32(8),
    "autocast-off": lambda: Float32Convolution(8),
    "tanh": lambda: TanhBlock(8),
    "module-activation": lambda: WithAct(SquarePlus, 8, 8),
    "autograd-function": lambda: WithAct(OwnMish, 8, 8),
    "mish": lambda: WithAct(nn.Mish, 8, 8),
    "relu6": lambda: WithAct(nn.ReLU6, 8, 8),
    "prelu": lambda: WithAct(nn.PReLU, 8, 8),
    "gelu-tanh": lambda: WithAct(lambda: nn.GELU("tanh"), 8, 8),
    "subclass-of-relu": lambda: WithAct(ReLUSubclass, 8, 8),
    **{
        f"scaled-{how.replace(' ', '-')}": lambda how=how: Scaled(8, how)
        for how in ("product", "alpha", "in-place alpha", "difference", "maximum")
    },
    "concatenation": lambda: Dense(8, 4),
    "no-addition": lambda: branch(8),
    "no-norm": lambda: NoNorm(8),
    "relu-before-norm": lambda: NormAfterReLU(8),
}
