"""The cases of each suite."""

from __future__ import annotations

import re

from resnetv2.measuring.cases import Case, network, unit
from resnetv2.models import IMAGE_SIZES, standard_net


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


def unit_cases(full: bool, cuda: bool) -> list[Case]:
    """Units of CIFAR ResNets, Wide ResNet-28-10 and ImageNet ResNet-50 v2 (suite "unit")."""
    dtype = "bf16" if cuda else "fp32"
    cifar, wide, large = (128, 128, 64) if cuda else (64, 4, 4)
    result = [
        unit("CIFAR basic", "basic", 16, 32, cifar, dtype),
        unit("CIFAR bottleneck", "bottleneck", 64, 32, cifar // (1 if cuda else 2), dtype),
        unit("Wide ResNet-28-10", "basic", 160, 32, wide, dtype),
        unit("ResNet-50", "bottleneck", 256, 56, large, dtype),
        unit("Diffusion, group norm", "basic", 128, 32, wide, dtype, norm="group:32", act="silu"),
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
