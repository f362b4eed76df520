"""Pre-activation blocks as people write them: two or three norms and convolutions by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
