"""Dataflows that few models have: a norm twice, shared results, branches, checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.fuse_models.parts import OfTuples
from tests.support.fuse_models.plain import Basic, branch, conv1, conv3


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
