"""What is measured: one residual unit, or a whole network, with its inputs."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage
from resnetv2.models import IMAGE_SIZES, standard_net

BLOCKS = {"basic": PreActBlock, "bottleneck": BottleneckPreActBlock}
MODES = ("forward", "forward+backward")


class Case(NamedTuple):
    """A workload. ``depth`` 0 is a single unit of ``channels`` in and out at ``size`` squared
    pixels, or a stage of ``units`` of them; otherwise a CIFAR network of so many layers, or the
    standard net ``model``. ``dtype``: autocast's, fp32 for none.

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
    modes: tuple[str, ...] = ("forward+backward",)
    units: int = 1
    model: str = ""

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
            units = [unit for stage in module.stages for unit in stage]
            for unit in units:
                # As each unit adds less, rounding is not magnified from unit to unit: with the
                # paper's weights, float32 gradients of 1,001 layers are two thirds noise, eager's
                # too, and could not be told from wrong ones.
                conv = unit.conv3 if self.block == "bottleneck" else unit.conv2
                conv.weight.detach().mul_(len(units) ** -0.5)
        else:
            block = BLOCKS[self.block]
            first = block(self.channels, self.out_channels, self.stride)
            others = (block(self.out_channels, self.out_channels) for _ in range(self.units - 1))
            module = Stage(first, *others, **options)
            for conv in module.modules():
                if isinstance(conv, nn.Conv2d):
                    # The paper's: PyTorch's own shrinks activations until rounding dominates.
                    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            # A stage leaves the children to blocks where it is eager; they have to know as well.
            for unit in module:
                unit.backend = module.backend
        return module.to(device(), dtype, memory_format=torch.channels_last)

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


def standard(name: str, batch: int, dtype: str) -> Case:
    """A standard net by its name, on images of the size that it is made for.

    Raises:
        ValueError: there is no such net.
    """
    net = standard_net(name)
    title, size = f"{name}, batch {batch}", IMAGE_SIZES[net.stem]
    return Case(title, net.block, batch, net.depth, size=size, dtype=dtype, model=name)


def network_of(name: str) -> tuple[str, int, int]:
    """(block, depth, batch) from the name of a network's case.

    Raises:
        ValueError: another name.
    """
    found = re.fullmatch(r"(\w+) ResNet-(\d+), batch (\d+)", name)
    if found is None:
        raise ValueError(f"expected a network's case, got {name!r}")
    return found[1], int(found[2]), int(found[3])


def unit(
    name: str, block: str, channels: int, size: int, batch: int, dtype: str, entry: int = 0
) -> Case:
    """One unit; ``entry`` is the number of channels that its stage begins with (then stride 2)."""
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
    )


def unit_cases(full: bool, cuda: bool) -> list[Case]:
    """Units of CIFAR ResNets, Wide ResNet-28-10 and ImageNet ResNet-50 v2 (suite "unit")."""
    dtype = "bf16" if cuda else "fp32"
    cifar, wide, large = (128, 128, 64) if cuda else (64, 4, 4)
    result = [
        unit("CIFAR basic", "basic", 16, 32, cifar, dtype),
        unit("CIFAR bottleneck", "bottleneck", 64, 32, cifar // (1 if cuda else 2), dtype),
        unit("Wide ResNet-28-10", "basic", 160, 32, wide, dtype),
        unit("ResNet-50", "bottleneck", 256, 56, large, dtype),
    ]
    if full:
        for stage in (1, 2):
            size = 32 >> stage
            result += [
                unit("CIFAR basic", "basic", 16 << stage, size, cifar, dtype),
                unit("CIFAR bottleneck", "bottleneck", 64 << stage, size, cifar, dtype),
                unit("Wide ResNet-28-10", "basic", 160 << stage, size, wide, dtype),
            ]
        result += [
            unit("CIFAR bottleneck", "bottleneck", 128, 32, cifar, dtype, entry=64),
            unit("Wide ResNet-28-10", "basic", 320, 32, wide, dtype, entry=160),
        ]
        for stage in (1, 2, 3):
            result.append(unit("ResNet-50", "bottleneck", 256 << stage, 56 >> stage, large, dtype))
        result.append(unit("ResNet-50", "bottleneck", 512, 56, large, dtype, entry=256))
    return result


def depth_cases(full: bool, cuda: bool) -> list[Case]:
    """A training step against depth and against batch size (suite "depth")."""
    dtype = "bf16" if cuda else "fp32"
    batch = 128 if cuda else 16
    result = [network("basic", depth, batch, dtype) for depth in (20, 56, 110)]
    result.append(network("bottleneck", 164, batch, dtype))
    result.append(network("bottleneck", 1001, 128 if cuda else 16 if full else 8, dtype))
    others = (32, 512) if cuda else (4, 64)
    result += [network("basic", 20, size, dtype) for size in others]
    if full:
        result += [network("bottleneck", 164, size, dtype) for size in others]
        result.append(network("bottleneck", 10001, 128 if cuda else 4, dtype))
    return result


def accuracy_cases(full: bool, cuda: bool) -> list[Case]:
    """Workloads whose gradients are held against float64 (suite "accuracy")."""
    dtype = "bf16" if cuda else "fp32"
    units = unit_cases(full, cuda)
    batch = 128 if cuda else 16
    result = [units[1], units[2], network("basic", 20, batch, dtype)]
    result.append(network("bottleneck", 164, batch, dtype))
    if full:
        result.append(network("bottleneck", 1001, batch, dtype))
    return result


def host_cases(full: bool, cuda: bool) -> list[Case]:
    """Stages and a network whose time is the host's (suite "host"): images are tiny.

    On a CPU eager's kernels run in the time that is measured.
    """
    result = []
    for dtype in ("bf16", "fp32"):
        for block, channels in (("basic", 16), ("bottleneck", 64)):
            result.append(
                Case(
                    f"{block} unit, {dtype}",
                    block,
                    2,
                    channels=channels,
                    out_channels=channels,
                    size=2,
                    dtype=dtype,
                    units=36,
                )
            )
    whole = network("bottleneck", 1001, 2, "bf16")
    return [*result, whole._replace(name=f"{whole.name}, bf16", size=8)]


def model_cases(names: list[str], cuda: bool) -> list[Case]:
    """The standard nets of ``--model`` (suite "models")."""
    batch, dtype = (64, "bf16") if cuda else (4, "fp32")
    return [standard(name, batch, dtype) for name in names]


def kernel_cases(full: bool, cuda: bool) -> list[Case]:
    """Units whose kernels are measured one by one (suite "kernel")."""
    units = unit_cases(full, cuda)
    return units if full else [units[1], units[2]]
