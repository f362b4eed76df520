"""Minimal models of the pre-activation dataflows that people write, for the tests of ``fuse``.

No class here imitates another's code: what matters is the dataflow, and names and style vary on
purpose (children bn1, norm1, batchnorm_0, residual.0, body.conv1.bn; functional, in-place and
shared activations; ``x + out``, ``out += x``, ``torch.add``). ``FAMILIES`` are computed fused or
not, always with eager's results; ``NEGATIVES`` must be left alone altogether.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Layer = Callable[..., nn.Module]


def conv3(in_channels: int, out_channels: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    options.setdefault("bias", False)
    return nn.Conv2d(in_channels, out_channels, 3, stride, 1, **options)


def conv1(in_channels: int, out_channels: int, stride: int = 1, **options: Any) -> nn.Conv2d:
    options.setdefault("bias", False)
    return nn.Conv2d(in_channels, out_channels, 1, stride, **options)


class Basic(nn.Module):
    """Functional ReLU; the projection, an attribute only where needed, reads act(bn1(x))."""

    def __init__(
        self,
        in_planes: int,
        planes: int,
        stride: int = 1,
        bias: bool = False,
        norm: Layer = nn.BatchNorm2d,
        **conv_options: Any,
    ) -> None:
        super().__init__()
        self.bn1 = norm(in_planes)
        self.conv1 = conv3(in_planes, planes, stride, bias=bias, **conv_options)
        self.bn2 = norm(planes)
        self.conv2 = conv3(planes, planes, bias=bias, **conv_options)
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(conv1(in_planes, planes, stride, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv1(out)
        out = self.conv2(F.relu(self.bn2(out)))
        out += shortcut
        return out


class Bottleneck(nn.Module):
    """One in-place ReLU module called three times; ``downsample`` is None or a convolution."""

    def __init__(
        self, inplanes: int, planes: int, stride: int = 1, first: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        out = 4 * planes
        self.norm1 = nn.BatchNorm2d(inplanes)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = conv1(inplanes, planes, first)
        self.norm2 = nn.BatchNorm2d(planes)
        self.conv2 = conv3(planes, planes, stride, groups=groups)
        self.norm3 = nn.BatchNorm2d(planes)
        self.conv3 = conv1(planes, out)
        changes = stride * first != 1 or inplanes != out
        self.downsample = conv1(inplanes, out, stride * first) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.norm1(x)
        out = self.relu(out)
        if self.downsample is not None:
            residual = self.downsample(out)
        out = self.relu(self.norm2(self.conv1(out)))
        out = self.relu(self.norm3(self.conv2(out)))
        return self.conv3(out) + residual


class Wide(nn.Module):
    """Python flags decide between branches; ``activate_first`` projects act(bn1(x)), else x."""

    def __init__(
        self,
        in_planes: int,
        out_planes: int,
        stride: int,
        drop_rate: float = 0.0,
        activate_first: bool = True,
    ) -> None:
        super().__init__()
        self.norm_a, self.act_a = nn.BatchNorm2d(in_planes), nn.ReLU(inplace=True)
        self.conv_a = conv3(in_planes, out_planes, stride)
        self.norm_b, self.act_b = nn.BatchNorm2d(out_planes), nn.ReLU(inplace=True)
        self.conv_b = conv3(out_planes, out_planes)
        self.droprate = drop_rate
        self.equal_in_out = in_planes == out_planes
        self.activate_first = activate_first
        self.projection = None if self.equal_in_out else conv1(in_planes, out_planes, stride)

    def forward(self, x: Tensor) -> Tensor:
        if not self.equal_in_out and self.activate_first:
            x = self.act_a(self.norm_a(x))
        else:
            out = self.act_a(self.norm_a(x))
        read = x if not self.equal_in_out and self.activate_first else out
        out = self.act_b(self.norm_b(self.conv_a(read)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, training=self.training)
        out = self.conv_b(out)
        return torch.add(x if self.equal_in_out else self.projection(x), out)


class RawSequence(nn.Module):
    """The residual branch is one nn.Sequential of nine; the shortcut reads x."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        out = 4 * width
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv1(channels, width, stride),
            nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv3(width, width),
            nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv1(width, out),
        )  # fmt: skip
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv1(channels, out, stride))

    def forward(self, x: Tensor) -> Tensor:
        res = self.residual(x)
        shortcut = self.shortcut(x)
        return res + shortcut


class IdentityFromPreact(nn.Module):
    """x is rebound to act(norm(x)) before the paths part."""

    def __init__(self, channels: int, in_place: bool = False) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(channels)
        self.conv_0 = conv3(channels, channels)
        self.batchnorm_1 = nn.BatchNorm2d(channels)
        self.conv_1 = conv3(channels, channels)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batchnorm_0(x))
        out = self.conv_1(torch.relu(self.batchnorm_1(self.conv_0(x))))
        return out.add_(x) if self.in_place else x.add(out)


class StrideOnConv2(nn.Module):
    """A basic block that shrinks in its second convolution; a 3x3 shortcut if asked for."""

    def __init__(self, channels: int, out: int, shortcut_kernel: int = 1) -> None:
        super().__init__()
        self.bn_a, self.bn_b = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv_a, self.conv_b = conv3(channels, channels), conv3(channels, out, 2)
        self.c_sc = nn.Conv2d(
            channels, out, shortcut_kernel, 2, shortcut_kernel // 2, bias=shortcut_kernel > 1
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn_a(x).relu_()
        shortcut = self.c_sc(h)
        h = self.conv_b(self.bn_b(self.conv_a(h)).relu())
        return h + shortcut


class WithAct(nn.Module):
    """Any activation, a module, between any convolutions."""

    def __init__(self, act: Callable[[], nn.Module], in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.n0 = nn.BatchNorm2d(in_channels, eps=1e-3, momentum=0.01)
        self.act = act()
        self.c0 = conv3(in_channels, out_channels, bias=True)
        self.n1 = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.01)
        self.c1 = conv3(out_channels, out_channels, bias=True)
        self.skip = nn.Identity() if in_channels == out_channels else conv1(in_channels, 8)

    def forward(self, input: Tensor) -> Tensor:
        return self.skip(input) + self.c1(self.act(self.n1(self.c0(self.act(self.n0(input))))))


class FunctionalLeaky(nn.Module):
    """F.leaky_relu with a slope kept as an attribute."""

    def __init__(self, channels: int, slope: float = 0.1) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        out = F.leaky_relu(self.bn1(x), self.slope)
        out = self.conv1(out)
        out = F.leaky_relu(self.bn2(out), negative_slope=self.slope, inplace=True)
        return x + self.conv2(out)


class Dropping(nn.Module):
    """nn.Dropout after the second activation, or before the second norm."""

    def __init__(self, channels: int, p: float, before_norm: bool = False) -> None:
        super().__init__()
        middle: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        middle.insert(0 if before_norm else 2, nn.Dropout(p))
        self.branch = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv3(channels, channels),
            *middle, conv3(channels, channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class FunctionalDropping(nn.Module):
    """F.dropout that takes its mode from self.training, unguarded."""

    def __init__(self, channels: int, p: float) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x), inplace=True))
        h = F.dropout(F.relu(self.bn2(h), True), self.p, self.training)
        return x + self.conv2(h)


class OneSidedConvs(nn.Module):
    """3x1 and 1x3 convolutions, padded along one side only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n1, self.n2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.tall = nn.Conv2d(channels, channels, (3, 1), padding=(1, 0))
        self.flat = nn.Conv2d(channels, channels, (1, 3), padding=(0, 1), bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(F.relu(self.n2(self.tall(F.relu(self.n1(x)))))) + x


class PaddedBefore(nn.Module):
    """Zeros on the right and bottom alone, as TensorFlow's SAME pads a strided convolution."""

    def __init__(self, channels: int, out: int, module: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(out)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if module else None
        self.c1 = nn.Conv2d(channels, out, 3, 2, bias=False)
        self.c2 = conv3(out, out)
        self.skip = conv1(channels, out, 2)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.n1(x))
        padded = F.pad(z, (0, 1, 0, 1)) if self.pad is None else self.pad(z)
        h = self.c1(padded)
        sides = h.shape[2:]
        return self.c2(F.relu(self.n2(h))) + self.skip(z)[:, :, : sides[0], : sides[1]]


class PaddedBoth(nn.Module):
    """Asymmetric padding whose residual keeps the size, by F.pad or a module."""

    def __init__(self, channels: int, module: bool) -> None:
        super().__init__()
        self.n1, self.n2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.c1 = nn.Conv2d(channels, channels, 2, bias=False)
        self.c2 = conv3(channels, channels)
        self.pad = nn.ZeroPad2d((1, 0, 0, 1)) if module else None

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.n1(x))
        z = F.pad(z, (1, 0, 0, 1)) if self.pad is None else self.pad(z)
        return x + self.c2(F.relu(self.n2(self.c1(z))))


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


class Residual(nn.Module):
    """x + fn(x), whatever fn is."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


def branch(channels: int, depth: int = 2, **options: Any) -> nn.Sequential:
    """``depth`` times norm -> ReLU -> 3x3 convolution."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.BatchNorm2d(channels), nn.ReLU(), conv3(channels, channels, **options)]
    return nn.Sequential(*layers)


class Checking(nn.Module):
    """Checks of its input that stop a naive trace, and options with defaults."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.bn1, self.conv1 = nn.BatchNorm2d(in_channels), conv3(in_channels, in_channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(in_channels), conv3(in_channels, in_channels)

    def forward(self, x: Tensor, scale: float | None = None, double: bool = False) -> Tensor:
        assert x.dim() == 4
        if x.shape[1] != self.in_channels:
            raise ValueError(f"expected {self.in_channels} channels, got {x.shape[1]}")
        out = self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())
        if scale is not None:
            out = out * scale
        return x + (2 * out if double else out)


class InAList(nn.Module):
    """Blocks in a ModuleList, run by a loop."""

    def __init__(self, channels: int, count: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Basic(channels, channels) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class OneNormTwice(nn.Module):
    """Both convolutions share one norm, whose statistics move twice a step."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv1, self.conv2 = conv3(channels, channels), conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn(self.conv1(F.relu(self.bn(x))))))


class OneConvTwice(nn.Module):
    """Both repetitions share one convolution, whose gradient is a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv = conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(self.bn2(self.conv(F.relu(self.bn1(x))))))


class AliasedInPlace(nn.Module):
    """An in-place ReLU also changes what the shortcut, written before it, reads."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.relu, self.skip = nn.ReLU(inplace=True), conv1(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        pre = self.bn1(x)
        out = self.relu(pre)
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + self.skip(pre)


class ShortcutReadsNorm(nn.Module):
    """The shortcut reads bn1(x), before the activation."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.skip = conv1(channels, out) if channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pre = self.bn1(x)
        shortcut = self.skip(pre)
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(pre))))) + shortcut


class AddsIntoX(nn.Module):
    """``x += F(x)`` writes to the block's own input, which works without gradients only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = branch(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.f(x)
        x += out
        return x


class TwoActivations(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, channels)
        self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class FrozenShortcut(nn.Module):
    """Gradients are off for a part of the forward, which no graph shows."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.projection = conv1(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shortcut = self.projection(x)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class PartlyFloat32(TwoActivations):
    """Autocast is off for a part of the forward."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        with torch.autocast(x.device.type, enabled=False):
            h = self.conv2(F.relu(self.bn2(h.float())))
        return x + h


class Float32Convolution(TwoActivations):
    """The same without a cast in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return x + self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))


class NoSecondActivation(TwoActivations):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(F.relu(self.bn1(x)))))


class ThreePaths(TwoActivations):
    """x + F(x) + G(x)."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        return x + h + self.conv2(F.relu(self.bn2(h)))


class MiddleReadTwice(TwoActivations):
    """h1 leaves the block as well."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv1(F.relu(self.bn1(x)))
        return x + self.conv2(F.relu(self.bn2(h))), h


class FirstOf(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        out, h = self.block(x)
        return out * h.mean()


class Remembering(TwoActivations):
    """Counts its calls and keeps what it saw last."""

    calls = 0
    last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.conv1(F.relu(self.bn1(x)))
        self.last = h
        return x + self.conv2(F.relu(self.bn2(h)))


class Listing(TwoActivations):
    """Appends to a list of its own, which a trace of the module itself would leave a proxy in."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.bn1(x)))
        self.seen.append(h.detach())
        return x + self.conv2(F.relu(self.bn2(h)))


class Branching(TwoActivations):
    """A branch on the data."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        if x.mean() > 0:
            return x + out
        return x - out


class Resizing(nn.Module):
    """A generator's block: both paths are enlarged."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.skip = conv1(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.interpolate(F.relu(self.bn1(x)), scale_factor=2))
        h = self.conv2(F.relu(self.bn2(h)))
        return h + F.interpolate(self.skip(x), scale_factor=2)


class Checkpointed(nn.Module):
    """Recomputes its branch by torch.utils.checkpoint (without norms that move, in evaluation)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.f = branch(channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + checkpoint(self.f, x, use_reentrant=False)


class HandmadeSwish(TwoActivations):
    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(x)
        h = self.bn2(self.conv1(h * torch.sigmoid(h)))
        return x + self.conv2(h * h.sigmoid())


class PlainNet(nn.Module):
    """Stem, stages of ``block(in, out, stride)`` as nn.Sequentials, norm, pooling, classifier."""

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module] = Basic,
        layers: tuple[int, ...] = (2, 2),
        widths: tuple[int, ...] = (4, 8),
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.conv1 = conv3(3, widths[0])
        channels = widths[0]
        stages = []
        for i, (count, width) in enumerate(zip(layers, widths)):
            blocks = []
            for j in range(count):
                blocks.append(block(channels, width, 2 if i and not j else 1))
                channels = width
            stages.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn(self.layers(self.conv1(x))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def tuple_block(channels: int, out: int, stride: int) -> nn.Module:
    return OfTuples(channels, out, stride, bottleneck=True)


# What must be left alone.


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


class StandardisedConv2d(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        var, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, correction=0)
        w = (w - mean) / torch.sqrt(var + 1e-10)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class GroupNormed(nn.Module):
    def __init__(self, channels: int, conv: Layer = StandardisedConv2d, norm: str = "gn") -> None:
        super().__init__()

        def layer() -> nn.Module:
            return nn.GroupNorm(2, channels) if norm == "gn" else nn.BatchNorm2d(channels)

        self.gn1, self.conv1 = layer(), conv(channels, channels, 3, padding=1, bias=False)
        self.gn2, self.conv2 = layer(), conv(channels, channels, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.gn1(x)))
        return self.conv2(self.relu(self.gn2(out))) + x


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


@dataclass(frozen=True)
class Family:
    """One dataflow.

    build: makes the model. shape: of its input. units: how many blocks ``fuse`` must fuse, None
    where leaving the block alone is as right. kind: words that ``explain`` must say of them.
    modes: in which of training and evaluation it is compared.
    """

    build: Callable[[], nn.Module]
    units: int | None = 1
    kind: tuple[str, ...] = ()
    shape: tuple[int, ...] = (3, 8, 7, 6)
    modes: tuple[str, ...] = ("train", "eval")


BASIC = ("basic",)
NECK = ("bottleneck",)
IDENTITY = ("identity",)
PREACT = ("projection", "preact")
RAW = ("projection", "raw")

FAMILIES: dict[str, Family] = {
    "identity": Family(lambda: Basic(8, 8), 1, BASIC + IDENTITY),
    "projection-from-preact": Family(lambda: Basic(8, 12, 2), 1, BASIC + PREACT),
    "projection-from-preact-flags": Family(lambda: Wide(8, 12, 2), 1, BASIC + PREACT),
    "projection-from-raw-flags": Family(
        lambda: Wide(8, 12, 2, activate_first=False), 1, BASIC + RAW
    ),
    "identity-flags": Family(lambda: Wide(8, 8, 1), 1, BASIC + IDENTITY),
    "projection-from-raw-sequence": Family(lambda: RawSequence(8, 3, 1), 1, NECK + RAW),
    "stride-on-first-1x1-raw": Family(lambda: RawSequence(8, 3, 2), 1, NECK + RAW),
    "identity-empty-sequence": Family(lambda: RawSequence(8, 2), 1, NECK + IDENTITY),
    "identity-from-preact": Family(lambda: IdentityFromPreact(8), 1, (*BASIC, *IDENTITY, "preact")),
    "identity-from-preact-in-place": Family(lambda: IdentityFromPreact(8, True), 1, IDENTITY),
    "stride-on-conv2": Family(lambda: StrideOnConv2(8, 6), 1, BASIC + PREACT),
    "shortcut-3x3": Family(lambda: StrideOnConv2(8, 6, 3), 1, BASIC + PREACT),
    "one-relu-three-times": Family(lambda: Bottleneck(8, 2), 1, NECK + IDENTITY),
    "bottleneck-stride-on-3x3": Family(lambda: Bottleneck(8, 3, 2), 1, NECK + PREACT),
    "bottleneck-stride-on-1x1": Family(lambda: Bottleneck(8, 3, 1, first=2), 1, NECK + PREACT),
    "bottleneck-groups": Family(lambda: Bottleneck(8, 4, 1, groups=2), 1, NECK + PREACT),
    "basic-groups": Family(lambda: Basic(8, 8, groups=4)),
    "bias": Family(lambda: Basic(8, 8, bias=True)),
    "bias-projection": Family(lambda: Basic(8, 12, 2, bias=True), 1, PREACT),
    "leaky-relu": Family(lambda: WithAct(lambda: nn.LeakyReLU(0.1, inplace=True), 8, 8)),
    "leaky-relu-functional": Family(lambda: FunctionalLeaky(8)),
    "silu": Family(lambda: WithAct(lambda: nn.SiLU(inplace=True), 8, 8)),
    "silu-projection-raw": Family(lambda: WithAct(nn.SiLU, 6, 8), 1, RAW, (3, 6, 7, 6)),
    "gelu": Family(lambda: WithAct(nn.GELU, 8, 8)),
    "dropout-0": Family(lambda: Dropping(8, 0.0)),
    "dropout-0-functional": Family(lambda: FunctionalDropping(8, 0.0)),
    "dropout-0-flags": Family(lambda: Wide(8, 8, 1, 0.0)),
    "dropout-0.3": Family(lambda: Dropping(8, 0.3), None),
    "dropout-0.3-before-norm": Family(lambda: Dropping(8, 0.3, True), None),
    "dropout-0.3-functional": Family(lambda: FunctionalDropping(8, 0.3), None),
    "dropout-0.3-flags-projection": Family(lambda: Wide(8, 12, 2, 0.3), None),
    "one-sided-convolutions": Family(lambda: OneSidedConvs(8)),
    "asymmetric-padding": Family(lambda: PaddedBoth(8, False), None),
    "asymmetric-padding-module": Family(lambda: PaddedBoth(8, True), None),
    "asymmetric-padding-strided": Family(lambda: PaddedBefore(8, 6, False), None),
    "asymmetric-padding-strided-module": Family(lambda: PaddedBefore(8, 6, True), None),
    "norm-is-norm-and-act": Family(lambda: OfNormActs(NormAct, 8, 2, 8), 1, NECK + IDENTITY),
    "norm-is-norm-and-act-projection": Family(
        lambda: OfNormActs(NormAct, 8, 3, 12), 1, NECK + PREACT
    ),
    "norm-is-norm-and-silu": Family(
        lambda: OfNormActs(lambda c: NormAct(c, nn.SiLU(inplace=True)), 8, 3, 8)
    ),
    "norm-and-act-module": Family(lambda: OfNormActs(NormThenAct, 8, 3, 12), 1, NECK + PREACT),
    "norm-and-act-sequence": Family(lambda: OfNormActs(norm_act_sequence, 8, 3, 8), 1, NECK),
    "tuples": Family(lambda: OfTuples(8, 8), 1, BASIC + IDENTITY),
    "tuples-bottleneck-strided": Family(lambda: OfTuples(8, 12, 2, True), 1, NECK + PREACT),
    "thrown-away-norm": Family(lambda: ThrownAwayNorm(8, 8), None),
    "thrown-away-norm-not-activated": Family(lambda: ThrownAwayNorm(8, 8, 1, False), None),
    "thrown-away-norm-projection": Family(lambda: ThrownAwayNorm(8, 12, 2), None),
    "affine-false": Family(lambda: Basic(8, 12, 2, norm=lambda c: nn.BatchNorm2d(c, affine=False))),
    "momentum-none": Family(lambda: Basic(8, 8, norm=lambda c: nn.BatchNorm2d(c, momentum=None))),
    "no-running-stats": Family(
        lambda: Basic(8, 8, norm=lambda c: nn.BatchNorm2d(c, track_running_stats=False))
    ),
    "dilated": Family(lambda: Residual(nn.Sequential(
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
        nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
    ))),
    "residual-of-sequence": Family(lambda: Residual(branch(8)), 1, BASIC + IDENTITY),
    "one-repetition": Family(lambda: Residual(branch(8, 1)), 1, IDENTITY),
    "four-repetitions": Family(lambda: Residual(branch(8, 4)), 1, IDENTITY),
    "checks-of-shape": Family(lambda: Checking(8), 1, BASIC + IDENTITY),
    "module-list": Family(lambda: InAList(8), 2),
    "one-norm-twice": Family(lambda: OneNormTwice(8), None),
    "one-convolution-twice": Family(lambda: OneConvTwice(8), None),
    "in-place-relu-under-an-alias": Family(lambda: AliasedInPlace(8, 6), None),
    "shortcut-reads-norm": Family(lambda: ShortcutReadsNorm(8, 8), None),
    "shortcut-reads-norm-projection": Family(lambda: ShortcutReadsNorm(8, 6), None),
    "two-activations": Family(lambda: TwoActivations(8), None),
    "no-second-activation": Family(lambda: NoSecondActivation(8), None),
    "three-paths": Family(lambda: ThreePaths(8), None),
    "middle-read-twice": Family(lambda: FirstOf(MiddleReadTwice(8)), None),
    "squeeze-excitation": Family(lambda: EndsWith(8, 8, 1, SqueezeExcite(8)), None),
    "squeeze-excitation-projection": Family(
        lambda: EndsWith(8, 6, 2, SqueezeExcite(6), conv1(8, 6, 2), "preact"), None
    ),
    "stochastic-depth": Family(lambda: OfNormActs(NormAct, 8, 3, 8, DropPath(0.4)), None),
    "stochastic-depth-0": Family(lambda: OfNormActs(NormAct, 8, 3, 8, DropPath(0.0)), None),
    "stochastic-depth-of-a-batch": Family(lambda: BatchDepth(8, 0.5), None),
    "survival-in-evaluation": Family(lambda: SurvivalScaled(8), None),
    "average-pooled-shortcut": Family(
        lambda: EndsWith(8, 6, 2, None, nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), conv1(8, 6)), "preact"),  # noqa: E501
        None,
    ),
    "normed-shortcut": Family(
        lambda: EndsWith(8, 6, 2, None, nn.Sequential(conv1(8, 6, 2), nn.BatchNorm2d(6))), None
    ),
    "reflecting-convolutions": Family(
        lambda: Residual(branch(8, padding_mode="reflect")), None
    ),
    "branch-on-data": Family(lambda: Branching(8), None),
    "enlarging": Family(lambda: Resizing(8, 6), None),
    "checkpointed": Family(lambda: Checkpointed(8), None, modes=("eval",)),
    "swish-by-hand": Family(lambda: HandmadeSwish(8), None),
}  # fmt: skip

NEGATIVES: dict[str, Callable[[], nn.Module]] = {
    "post-activation": lambda: PostActivation(8, 8),
    "post-activation-without-last-relu": lambda: PostActivationSum(8, 8),
    "no-first-relu": lambda: NoFirstReLU(8, 8),
    "no-first-relu-padded-shortcut": lambda: NoFirstReLU(8, 12),
    "group-norm-weight-standardisation": lambda: GroupNormed(8),
    "group-norm": lambda: GroupNormed(8, nn.Conv2d),
    "weight-standardisation": lambda: GroupNormed(8, norm="bn"),
    "instance-norm": lambda: Basic(8, 8, norm=nn.InstanceNorm2d),
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
