"""What is measured: one residual unit, a stage or a whole network, with its inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocks import Stage
from ..models import BLOCKS, PreActResNet, standard_net

STEP = "forward+backward"  # a training step, but for the optimizer's
MODES = ("forward", STEP)


class Case(NamedTuple):
    """A workload. ``depth`` 0 is a single unit of ``channels`` in and out at ``size`` squared
    pixels, or a stage of ``units`` of them; otherwise a CIFAR network of so many layers, or the
    standard net ``model``. ``dtype``: autocast's, fp32 for none. norm, act: a unit's.

    modes: what is timed: forward (in training, keeping what its backward needs) or both.
    """

    name: str
    block: str
    batch: int
    depth: int = 0
    channels: int = 3
    out_channels: int = 10
    stride: int = 1
    size: int = 32
    dtype: str = "fp32"
    modes: tuple[str, ...] = (STEP,)
    units: int = 1
    model: str = ""
    norm: str = "batch"
    act: str = "relu"

    @property
    def layers(self) -> int:
        """Convolutions, and for a network its classifier."""
        return self.depth or self.units * (2 if self.block == "basic" else 3)

    @property
    def narrowest(self) -> int:
        """Elements of the smallest tensor that is activated."""
        if self.model:
            return _narrowest(self)
        if self.depth:
            return self.batch * 64 * (self.size // 4) ** 2
        width = self.out_channels // (1 if self.block == "basic" else 4)
        return self.batch * width * (self.size // self.stride) ** 2

    def build(self, *, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
        """The module with the same weights every time, in channels_last. options: memory, backend.

        dtype: of the parameters.
        """
        torch.manual_seed(0)
        if self.depth:
            if self.model:
                module: nn.Module = standard_net(self.model).build(self.out_channels, **options)
            else:
                module = PreActResNet.from_depth(self.depth, self.block, **options)
            units = [unit for stage in module.stages for unit in stage]  # type: ignore[union-attr]
            for unit in units:
                # As each unit adds less, rounding is not magnified from unit to unit: with the
                # paper's weights, float32 gradients of 1,001 layers are two thirds noise, eager's
                # too, and could not be told from wrong ones.
                conv = unit.conv3 if self.block == "bottleneck" else unit.conv2
                conv.weight.detach().mul_(len(units) ** -0.5)
        else:
            block: Any = BLOCKS[self.block]
            kinds: dict[str, Any] = {"norm": self.norm, "act": self.act}
            first = block(self.channels, self.out_channels, self.stride, **kinds)
            others = (
                block(self.out_channels, self.out_channels, **kinds) for _ in range(self.units - 1)
            )
            module = Stage(first, *others, **options)
            for conv in module.modules():
                if isinstance(conv, nn.Conv2d):
                    # The paper's: PyTorch's own shrinks activations until rounding dominates.
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            # A stage leaves the children to blocks where it is eager; they have to know as well.
            for unit in module:
                unit.backend = module.backend  # type: ignore[assignment]
        module = module.to(device(), dtype)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Images and labels, or for a unit its input and the gradient of its output."""
        generator = torch.Generator().manual_seed(1)

        def draw(*shape: int) -> Tensor:
            values = torch.randn(*shape, generator=generator).to(device(), dtype)
            return values.contiguous(memory_format=torch.channels_last)

        x = draw(self.batch, self.channels, self.size, self.size)
        if self.depth:
            return x, (torch.arange(self.batch) % 10).to(x.device)
        size = -(-self.size // self.stride)
        return x.requires_grad_(), draw(self.batch, self.out_channels, size, size)

    def loss(self, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        """What backward is called on, and with which gradient."""
        if self.depth:
            return F.cross_entropy(out, target), None
        return out, target.to(out.dtype)


def _narrowest(case: Case) -> int:
    """Elements of the smallest tensor that a standard net's norms read, by a forward without
    memory."""
    sizes: list[int] = []
    with torch.device("meta"):
        net = standard_net(case.model).build(backend="eager")
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
        net(torch.empty(case.batch, case.channels, case.size, case.size))
    return min(sizes)


def device() -> torch.device:
    """Where everything is measured: the GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def network(block: str, depth: int, batch: int, dtype: str) -> Case:
    """A CIFAR ResNet v2 of ``depth`` layers."""
    return Case(f"{block} ResNet-{depth}, batch {batch}", block, batch, depth, dtype=dtype)


def unit(
    name: str,
    block: str,
    channels: int,
    size: int,
    batch: int,
    dtype: str,
    entry: int = 0,
    **kinds: Any,
) -> Case:
    """One unit; ``entry`` is the number of channels that its stage begins with (then stride 2).

    kinds: norm and act.
    """
    stride = 2 if entry else 1
    shape = f"{entry or channels}>{channels}" if entry else f"{channels}"
    return Case(
        f"{name}: {shape} channels, {size}x{size}, batch {batch}",
        block,
        batch,
        channels=entry or channels,
        out_channels=channels,
        stride=stride,
        size=size,
        dtype=dtype,
        modes=MODES,
        **kinds,
    )
