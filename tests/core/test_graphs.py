"""A training step on the Triton kernels captured in a CUDA graph: replayed, the same bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import Stage
from resnetv2.names import MEMORY_MODES
from tests.support.yardstick import DEVICE, images, needs_triton, randomise

pytestmark = [
    needs_triton,
    pytest.mark.skipif(
        DEVICE.type != "cuda", reason="a CUDA graph is captured on a GPU, there is none"
    ),
]


def stage_of(kind: type[nn.Module], mode: str) -> nn.Module:
    blocks = kind(16, 32, 2), kind(32, 32), kind(32, 32)
    stage = randomise(Stage(*blocks, backend="triton", memory=mode))
    return stage.to(DEVICE, memory_format=torch.channels_last)


def gradients(stage: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and of every parameter."""
    out = stage(x)
    return [out, *torch.autograd.grad(out, (x, *stage.parameters()), g)]


@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("kind", [PreActBlock, BottleneckPreActBlock])
def test_a_replayed_step_has_the_bits_of_a_launched_one(kind: type[nn.Module], mode: str) -> None:
    """Twice, on inputs that the graph was not captured with; running statistics move too."""
    stage = stage_of(kind, mode)
    x = images((4, 16, 8, 8)).requires_grad_()
    g = images((4, 32, 4, 4), 1)
    # Kernels are compiled, and what is made once is made, outside of the capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            gradients(stage, x, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(stage, x, g)
    launched = copy.deepcopy(stage)
    for seed in (2, 4):
        other, other_g = images(x.shape, seed), images(g.shape, seed + 1)
        with torch.no_grad():
            x.copy_(other)
            g.copy_(other_g)
        graph.replay()
        expected = gradients(launched, other.requires_grad_(), other_g)
        for mine, theirs in zip(captured, expected, strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(stage.buffers(), launched.buffers(), strict=True):
            assert torch.equal(mine, theirs)
