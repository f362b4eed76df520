"""Blocks of parts: norms that activate, sequences, squeeze-excitation, stochastic depth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.fuse_models.plain import Basic, conv1, conv3


class NormAct(nn.BatchNorm2d):
    """Norm and activation in one module that is a norm, by F.batch_norm and its own ``act``."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True) if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise ValueError(f"expected 4D input (got {x.ndim}D input)")
        factor = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        in_training = self.training or (self.running_mean is None and self.running_var is None)
        keeps = not self.training or self.track_running_stats
        x = F.batch_norm(
            x,
            self.running_mean if keeps else None,
            self.running_var if keeps else None,
            self.weight,
            self.bias,
            in_training,
            factor,
            self.eps,
        )
        return self.act(x)


class NormThenAct(nn.Module):
    """Norm and activation as the children of one module."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.activ(self.bn(x))


def norm_act_sequence(channels: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU())


class OfNormActs(nn.Module):
    """``norm_act(channels)`` in front of each of three convolutions, then perhaps a branch end."""

    def __init__(
        self,
        norm_act: Callable[[int], nn.Module],
        channels: int,
        width: int,
        out: int,
        end: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.downsample = None if channels == out else conv1(channels, out)
        self.norm1, self.conv1 = norm_act(channels), conv1(channels, width)
        self.norm2, self.conv2 = norm_act(width), conv3(width, width)
        self.norm3, self.conv3 = norm_act(width), conv1(width, out)
        self.drop_path = nn.Identity() if end is None else end

    def forward(self, x: Tensor) -> Tensor:
        x_preact = self.norm1(x)
        shortcut = x
        if self.downsample is not None:
            shortcut = self.downsample(x_preact)
        x = self.conv1(x_preact)
        x = self.conv2(self.norm2(x))
        x = self.conv3(self.norm3(x))
        x = self.drop_path(x)
        return x + shortcut


class PreLayer(nn.Module):
    """bn -> activ -> conv in one module, which can return the activated input too."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, both: bool) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.activ = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        self.both = both

    def forward(self, x: Tensor) -> Any:
        x = self.activ(self.bn(x))
        if self.both:
            pre = x
        x = self.conv(x)
        return (x, pre) if self.both else x


class PreBody(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        if bottleneck:
            self.conv1 = PreLayer(channels, out // 4, 1, stride, True)
            self.conv2 = PreLayer(out // 4, out // 4, 3, 1, False)
            self.conv3 = PreLayer(out // 4, out, 1, 1, False)
        else:
            self.conv1 = PreLayer(channels, out, 3, stride, True)
            self.conv2 = PreLayer(out, out, 3, 1, False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, pre = self.conv1(x)
        for name, layer in self.named_children():
            if name != "conv1":
                x = layer(x)
        return x, pre


class OfTuples(nn.Module):
    """The branch is a child that returns (F(x), act(bn1(x)))."""

    def __init__(self, channels: int, out: int, stride: int = 1, bottleneck: bool = False) -> None:
        super().__init__()
        self.resize_identity = channels != out or stride != 1
        self.body = PreBody(channels, out, stride, bottleneck)
        if self.resize_identity:
            self.identity_conv = conv1(channels, out, stride)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x, pre = self.body(x)
        if self.resize_identity:
            identity = self.identity_conv(pre)
        x = x + identity
        return x


class ThrownAwayNorm(nn.Module):
    """conv1 reads x; bn1 is computed and thrown away, and its running statistics still move."""

    def __init__(self, channels: int, out: int, stride: int = 1, activated: bool = True) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.relu = nn.ReLU()
        self.activated = activated
        self.down = conv1(channels, out, stride) if channels != out or stride != 1 else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.down is None else self.down(x)
        out = self.bn1(x)
        if self.activated:
            out = self.relu(out)
        out = self.conv1(x)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv2(out)
        out += residual
        return out


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = conv1(channels, 2, bias=True), conv1(2, channels, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        w = F.adaptive_avg_pool2d(x, 1)
        w = torch.sigmoid(self.fc2(F.relu(self.fc1(w))))
        return x * w


class DropPath(nn.Module):
    """Stochastic depth, by sample."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.p == 0.0 or not self.training:
            return x
        keep = 1 - self.p
        return x * x.new_empty((x.shape[0], 1, 1, 1)).bernoulli_(keep).div_(keep)


class BatchDepth(nn.Module):
    """Stochastic depth of a whole batch: a python branch on a random number, training only."""

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.branch = Basic(channels, channels)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if self.training and float(torch.rand(())) < self.p:
            return x
        return self.branch(x)


class SurvivalScaled(nn.Module):
    """Training adds F(x), evaluation survival * F(x): another dataflow in each mode."""

    def __init__(self, channels: int, survival: float = 0.5) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.survival = survival

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        if not self.training:
            out = out * self.survival
        return x + out


class EndsWith(nn.Module):
    """F(x) ends with a module of the caller's, the shortcut is one."""

    def __init__(
        self,
        channels: int,
        out: int,
        stride: int = 1,
        end: nn.Module | None = None,
        shortcut: nn.Module | None = None,
        shortcut_reads: str = "raw",
    ) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.act = nn.ReLU()
        self.end = nn.Sequential() if end is None else end
        self.shortcut = nn.Sequential() if shortcut is None else shortcut
        self.shortcut_reads = shortcut_reads

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(self.bn1(x))
        out = self.conv2(self.act(self.bn2(self.conv1(z))))
        return self.end(out) + self.shortcut(z if self.shortcut_reads == "preact" else x)
