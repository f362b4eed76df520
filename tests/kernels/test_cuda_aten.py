"""ATen's engine under the contract of ATen's CUDA kernels (tests/support/cuda_aten.py).

Promise: what CUDA's kernels leave out or lay out differently changes no result. The fake computes
with the CPU's kernels, so a step under it has the bits of the same step without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import Stage
from resnetv2.core import chain, checks, modules, run
from resnetv2.kernels import reference
from resnetv2.kernels.operands import running_stats
from tests.support import cuda_aten
from tests.support.yardstick import images, needs_triton, randomise, step, with_backend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="ATen's CUDA kernels are there"),
]


def _without_weight(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.weight = None  # type: ignore[assignment]
    return norm


def _without_affine(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, affine=False)


UNITS: dict[str, Callable[..., nn.Module]] = {
    "basic": lambda **o: Stage(PreActBlock(4, 6, 2, **o), PreActBlock(6, 6, **o)),
    "bottleneck": lambda **o: Stage(
        BottleneckPreActBlock(4, 8, 2, **o), BottleneckPreActBlock(8, 8, bias=True, **o)
    ),
    "raw": lambda **o: PreActBlock(4, 6, shortcut="raw", act="silu", **o),
    "no-affine": lambda **o: PreActBlock(4, 4, norm=_without_affine, act="gelu", **o),
    "no-weight": lambda **o: PreActBlock(4, 4, norm=_without_weight, act="leaky_relu", **o),
}
KINDS = ("train", "frozen", "float64", "bf16", "synced", "without-cudnn")


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", UNITS)
def test_steps_have_the_same_bits(name, kind, channels_last, monkeypatch):
    """A step of each unit: norms of the batch, frozen ones, over ranks, in other dtypes."""
    module = with_backend(randomise(UNITS[name]()), "aten").train(kind != "frozen")
    dtype = torch.float64 if kind == "float64" else torch.float32
    module = module.to(dtype)
    if channels_last:
        module = module.to(memory_format=torch.channels_last)
    if kind == "synced":
        synchronise(monkeypatch)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", kind != "without-cudnn")
    x = images((3, 4, 7, 6), 1, dtype, channels_last=channels_last)
    autocast = torch.bfloat16 if kind == "bf16" else None
    buffers = {key: value.clone() for key, value in module.state_dict().items()}
    expected = step(module, x, autocast=autocast)
    module.load_state_dict(buffers)
    with cuda_aten.as_on_cuda():
        found = step(module, x, autocast=autocast)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
        assert found[key].stride() == value.stride(), key


def synchronise(monkeypatch: pytest.MonkeyPatch) -> None:
    """All norms in training are synchronised over two ranks that hold the same images."""

    def group_number(norm: nn.Module) -> int:
        return int(norm.training)

    def gather_over(number: int) -> Callable[[Tensor], Tensor]:
        return lambda values: torch.stack((values, values))

    for module in (modules, checks, run):
        monkeypatch.setattr(module, "group_number", group_number)
    monkeypatch.setattr(chain, "gather_over", gather_over)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize("weight", [True, False], ids=["weight", "no-weight"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
def test_norm_backward(training, weight, channels_last):
    """Against autograd: all that a norm's backward gives is there, with and without a weight."""
    h, q = (images((4, 5, 3, 3), s, torch.float64, channels_last) for s in (1, 2))
    gamma = torch.rand(5, dtype=torch.float64) + 0.5 if weight else None
    mean, var = reference.batch_moments(h)
    stats = running_stats(mean, var, gamma, None, 1e-5)
    ones, zeros = torch.ones(5).double(), torch.zeros(5).double()
    leaves = [t.clone().requires_grad_() for t in (h, ones, zeros)]
    normal = (leaves[0] - mean.view(1, -1, 1, 1)) * stats[2].view(1, -1, 1, 1)
    if training:
        normal = torch.nn.functional.batch_norm(leaves[0], None, None, training=True, eps=1e-5)
    scale = ones if gamma is None else gamma
    u = normal * (leaves[1] * scale).view(1, -1, 1, 1) + leaves[2].view(1, -1, 1, 1)
    dx, dscale, dbias = torch.autograd.grad(u, leaves, q)
    with cuda_aten.as_on_cuda():
        found = reference.norm_backward(q.clone(), h, stats, gamma, training)
    for mine, truth in zip(found, (dx, dscale / scale, dbias), strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-10, atol=1e-10)


def test_large_tensors_keep_their_layout(monkeypatch):
    """From 2**31 elements on, CUDA's gradient of a norm's input is NCHW."""
    h, q = (images((2, 3, 4, 4), s) for s in (1, 2))
    stats = running_stats(*reference.batch_moments(h), None, None, 1e-5)
    monkeypatch.setattr(cuda_aten, "LARGE", h.numel())
    with cuda_aten.as_on_cuda():
        g, _, _ = reference.norm_backward(q, h, stats, None, True)
    assert g.is_contiguous(memory_format=torch.channels_last)


@needs_triton
def test_kernels_read_what_aten_convolves(monkeypatch):
    """A convolution that the kernels leave to ATen comes to them in channels_last all the same."""
    block = with_backend(randomise(PreActBlock(4, 6)), "triton")
    block.conv1.dilation = block.conv1.padding = (2, 2)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)
    x = images((2, 4, 5, 5))
    buffers = {key: value.clone() for key, value in block.state_dict().items()}
    expected = step(block, x)
    block.load_state_dict(buffers)
    with cuda_aten.as_on_cuda():
        found: dict[str, Any] = step(block, x)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
