"""``nn.DataParallel``: replicas of modules, whose parameters are no parameters but plain tensors.

Promise: replicas run fused, in threads side by side, give the original's parameters the gradients
that eager replicas give them, and the first one moves the original's running statistics.
``torch.nn.parallel.replicate`` makes them; only its copies between GPUs are copies on one device
here: views of one flat tensor, whose elements need not be aligned, as NCCL's are.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet, explain, fuse
from resnetv2.blocks import Stage
from tests.support.fuse_models.grouped import AllByHand, GroupNormed
from tests.support.yardstick import (
    DEVICE,
    eager_twin,
    images,
    interpreted,
    needs_triton,
    randomise,
)

pytestmark = pytest.mark.usefixtures("one_thread")

replicate = importlib.import_module("torch.nn.parallel.replicate")


class Foreign(nn.Module):
    """A block that somebody else wrote, with a parameter of its own that it does not read."""

    def __init__(self, channels: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.register_parameter("offset", None)
        self.gain = nn.Parameter(torch.ones(1))
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.project = nn.Conv2d(channels, width, 1, stride) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        z = torch.relu(self.norm1(x))
        shortcut = x if self.project is None else self.project(z)
        return self.conv2(torch.relu(self.norm2(self.conv1(z)))) + shortcut


def model(memory: str) -> nn.Module:
    return PreActResNet(PreActBlock, [1, 2], widths=[4, 8], memory=memory, backend="aten")


def with_stem(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), *blocks)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "block": lambda: with_stem(PreActBlock(4, 6, 2, backend="aten")),
    "bottleneck": lambda: with_stem(BottleneckPreActBlock(4, 8, backend="aten")),
    "triton": lambda: with_stem(PreActBlock(4, 4, backend="triton")),
    "stage": lambda: with_stem(
        Stage(PreActBlock(4, 6), PreActBlock(6, 6), backend="aten", memory="invert")
    ),
    "model": lambda: model("segment"),
    "foreign": lambda: with_stem(Foreign(4, 6, 2)),
    "foreign-computed": lambda: with_stem(AllByHand(4), GroupNormed(4), GroupNormed(4, norm="gb")),
    "foreign-chain": lambda: with_stem(Foreign(4, 6), Foreign(6, 6)),
}


def replicas(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """Two replicas as ``nn.DataParallel`` makes them."""

    def broadcast(
        tensors: Sequence[Tensor], devices: Sequence[int], detach: bool
    ) -> list[list[Tensor]]:
        if not tensors:
            return []
        if detach:  # buffers: the first replica has the original's own
            return [list(tensors), [t.clone() for t in tensors]]
        copies = []
        for _ in devices:
            flat = torch.cat([torch.zeros(1, device=DEVICE), *(t.reshape(-1) for t in tensors)])
            parts = flat[1:].split([t.numel() for t in tensors])
            copies.append([part.view(t.shape) for part, t in zip(parts, tensors)])
        return copies

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", broadcast)
    monkeypatch.setattr(replicate, "_get_device_index", lambda device, optional: device)
    return replicate.replicate(module, [0, 1])


def side_by_side(modules: list[nn.Module], inputs: Sequence[Tensor], threads: int) -> list[Tensor]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda module, x: module(x), modules, inputs))


def is_chain(tensor: Tensor) -> bool:
    """Whether the operator is among the functions that made a tensor."""
    functions: list[Any] = [tensor.grad_fn]
    while functions:
        function = functions.pop()
        if "PartFunction" in type(function).__name__:
            return True
        functions += [parent for parent, _ in function.next_functions if parent is not None]
    return False


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=needs_triton) if n == "triton" else n for n in MODULES]
)
def test_replicas(name, monkeypatch):
    module = randomise(MODULES[name]()).to(DEVICE)
    eager = eager_twin(module)
    if name.startswith("foreign"):
        fuse(module, backend="aten")
        assert all(row.fused for row in explain(module).blocks)
    halves = images((6, 3, 8, 7)).chunk(2)
    # Triton's interpreter knows no threads.
    threads = 1 if interpreted(name) else 2
    outs = side_by_side(replicas(module, monkeypatch), halves, threads)
    assert all(map(is_chain, outs))
    expected = [each(x) for each, x in zip(replicas(eager, monkeypatch), halves)]
    assert not any(map(is_chain, expected))
    g = images(outs[0].shape, 1)
    torch.autograd.backward(outs, [g, 2 * g])
    torch.autograd.backward(expected, [g, 2 * g])
    for (key, mine), theirs in zip(module.named_parameters(), eager.parameters()):
        if theirs.grad is None:
            assert mine.grad is None, key
            continue
        scale = float(theirs.grad.abs().max())
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4 * scale)
    for mine, theirs in zip(module.buffers(), eager.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(outs, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
