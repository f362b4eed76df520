"""``torch.compile(fullgraph=True)``: a training step as uncompiled, buffers included.

Backend "aot_eager" traces as "inductor" does and runs the graph as it is, so that the numbers can
be compared; inductor itself compiles one block.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from tests.support.compilers import Compiler, needs_inductor, renamed
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    images,
    needs_triton,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")


def block_of(backend: str, kind: type = PreActBlock, **options) -> nn.Module:
    torch.manual_seed(0)
    return randomise(kind(4, 8, 2, backend=backend, **options)).to(DEVICE)


def assert_compiled_like_plain(module: nn.Module, x: torch.Tensor, **options) -> None:
    plain = copy.deepcopy(module)
    compiler = Compiler()
    compiled = torch.compile(module, fullgraph=True, backend=compiler)
    for seed in range(3):
        found = renamed(step(compiled, x, seed=seed, **options))
        assert_close_steps(found, step(plain, x, seed=seed, **options))
    assert compiler.graphs == 1, "compiled again after the first step"


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        (PreActBlock, "aten"),
        (BottleneckPreActBlock, "aten"),
        pytest.param(PreActBlock, "triton", marks=needs_triton),
    ],
)
def test_block(kind, backend):
    assert_compiled_like_plain(block_of(backend, kind), images((2, 4, 5, 6)))


@pytest.mark.parametrize(
    "prepare",
    {
        "eval": lambda b: b.eval(),
        "frozen-norm": lambda b: b.bn2.eval(),
        "frozen-weights": lambda b: b.conv1.requires_grad_(False),
        "cumulative-average": lambda b: setattr(b.bn1, "momentum", None),
        "raw-shortcut": lambda b: setattr(b, "shortcut_reads", "raw"),
        "group-norm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 4).to(DEVICE)),
        "eager-blocks": lambda b: setattr(b, "backend", "eager"),
    }.items(),
    ids=lambda case: case[0],
)
def test_block_variants(prepare):
    block = block_of("aten")
    prepare[1](block)
    assert_compiled_like_plain(block, images((2, 4, 5, 6)))


def test_nchw_input():
    assert_compiled_like_plain(block_of("aten"), images((2, 4, 5, 6), channels_last=False))


def test_autocast():
    assert_compiled_like_plain(block_of("aten"), images((2, 4, 5, 6)), autocast=torch.bfloat16)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_model(block):
    torch.manual_seed(0)
    model = PreActResNet(block, [2, 1], 5, widths=[8, 16], stem_width=4, backend="aten")
    assert_compiled_like_plain(randomise(model).to(DEVICE), images((2, 3, 8, 8)))


def test_training_with_an_optimizer_does_not_recompile():
    torch.manual_seed(0)
    model = PreActResNet("basic", [1, 1], 5, widths=[4, 8], stem_width=4, backend="aten")
    model = model.to(DEVICE)
    plain = copy.deepcopy(model)
    compiler = Compiler()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    target = torch.tensor([0, 3], device=DEVICE)
    for module in (compiled, plain):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for seed in range(4):
            loss = F.cross_entropy(module(images((2, 3, 8, 8), seed)), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert compiler.graphs == 1
    for (name, mine), theirs in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_dynamic_batch_size(training):
    """One more graph at the second batch size, none at the ones after it."""
    block = block_of("aten").train(training)
    plain = copy.deepcopy(block)
    compiler = Compiler()
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    for n in (2, 3, 4, 5, 7):
        x = images((n, 4, 5, 6), n)
        assert_close_steps(renamed(step(compiled, x)), step(plain, x))
    assert compiler.graphs <= 2


@needs_inductor
def test_inductor():
    block = block_of("aten")
    plain = copy.deepcopy(block)
    compiled = torch.compile(block, fullgraph=True)
    x = images((2, 4, 5, 6))
    assert_close_steps(renamed(step(compiled, x)), step(plain, x))


def test_no_grad():
    block = block_of("aten").eval()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = compiled(images((2, 4, 5, 6)))
    torch.testing.assert_close(out, block(images((2, 4, 5, 6))).detach())


def test_export():
    block = block_of("aten").eval()
    x = images((2, 4, 5, 6))
    exported = torch.export.export(block, (x,))
    torch.testing.assert_close(exported.module()(x), block(x))
