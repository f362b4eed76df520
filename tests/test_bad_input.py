"""Bad input: one clear error at once that says what was expected and what came."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage
from tests.support.yardstick import BACKENDS, DEVICE, images

pytestmark = pytest.mark.usefixtures("one_thread")
ANY_BACKEND = (*BACKENDS, "eager")

INPUTS = {
    "rank-3": (lambda: torch.zeros(4, 5, 6), r"4D.*got 3D input \(4, 5, 6\)"),
    "rank-2": (lambda: torch.zeros(2, 4), r"4D.*got 2D"),
    "rank-5": (lambda: torch.zeros(1, 2, 4, 5, 6), r"4D.*got 5D"),
    "channels": (lambda: torch.zeros(2, 3, 5, 6), r"4 channels, got 3 channels: \(2, 3, 5, 6\)"),
    "channels-last-axis": (lambda: torch.zeros(2, 5, 6, 4), r"4 channels, got 5 channels"),
    "channels-of-empty": (lambda: torch.zeros(0, 3, 5, 6), r"4 channels, got 3 channels"),
    "int64": (lambda: torch.zeros(2, 4, 5, 6, dtype=torch.int64), r"floating.*torch.int64"),
    "uint8": (lambda: torch.zeros(2, 4, 5, 6, dtype=torch.uint8), r"floating.*torch.uint8"),
    "complex": (lambda: torch.zeros(2, 4, 5, 6, dtype=torch.complex64), r"floating.*complex64"),
    "float64": (lambda: torch.zeros(2, 4, 5, 6).double(), r"torch.float32, got torch.float64"),
    "bfloat16": (lambda: torch.zeros(2, 4, 5, 6).bfloat16(), r"torch.float32, got torch.bfloat16"),
}


@pytest.mark.parametrize("backend", ANY_BACKEND)
@pytest.mark.parametrize("case", INPUTS)
def test_inputs(case, backend):
    make, message = INPUTS[case]
    block = PreActBlock(4, 4, backend=backend).to(DEVICE)
    for module in (block, Stage(block, backend=backend)):
        with pytest.raises(ValueError, match=message):
            module(make().to(DEVICE))
    assert int(block.bn1.num_batches_tracked) == 0


@pytest.mark.parametrize("backend", ANY_BACKEND)
def test_input_on_another_device(backend):
    block = PreActBlock(4, 4, backend=backend).to(DEVICE)
    with pytest.raises(ValueError, match=f"device {DEVICE}.*, got meta"):
        block(torch.zeros(2, 4, 5, 6, device="meta"))


def test_float32_input_of_a_half_module():
    block = PreActBlock(4, 4).to(DEVICE).half()
    with pytest.raises(ValueError, match=r"torch.float16, got torch.float32 \(torch.autocast"):
        block(images((2, 4, 5, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "break_it",
    {
        "narrow-norm": lambda b: setattr(b, "bn2", nn.BatchNorm2d(3)),
        "wide-norm": lambda b: setattr(b, "bn2", nn.BatchNorm2d(9)),
        "one-channel-norm": lambda b: setattr(b, "bn1", nn.BatchNorm2d(1)),
        "conv-in": lambda b: setattr(b, "conv2", nn.Conv2d(7, 8, 3, padding=1)),
        "projection-in": lambda b: setattr(b, "shortcut", nn.Conv2d(5, 8, 1, 2)),
    }.items(),
    ids=lambda case: case[0],
)
def test_children_that_do_not_fit_each_other(break_it, backend):
    block = PreActBlock(4, 8, 2, backend=backend)
    break_it[1](block)
    with pytest.raises(ValueError, match=r"expected a (norm|projection).* channels, got"):
        block.to(DEVICE)(images((2, 4, 5, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_of_a_stage_that_do_not_fit_each_other(backend):
    stage = Stage(PreActBlock(4, 8), PreActBlock(4, 4), backend=backend).to(DEVICE)
    with pytest.raises(ValueError, match="8 channels, got 4"):
        stage(images((2, 4, 5, 6)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shortcut_of_another_size(backend):
    block = PreActBlock(4, 4, backend=backend)
    block.conv2 = nn.Conv2d(4, 4, 3)
    with pytest.raises((ValueError, RuntimeError), match="must"):
        block.to(DEVICE)(images((2, 4, 5, 6)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"out_channels": -4}, "out_channels must be at least 1, got -4"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"shortcut": "conv"}, "shortcut must be .*'conv'"),
        ({"identity": "none"}, "identity must be .*'none'"),
        ({"norm": "rms"}, "norm must be .*'rms'"),
        ({"act": "swish"}, "act must be one of .*relu.*'swish'"),
        ({"backend": "cuda"}, "backend must be one of .*triton.*'cuda'"),
    ],
    ids=str,
)
def test_block_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreActBlock(**{"in_channels": 4, "out_channels": 4, **arguments})


@pytest.mark.parametrize(("out_channels", "expansion"), [(6, 4), (5, 2), (4, 0)])
def test_expansion_that_does_not_divide(out_channels, expansion):
    with pytest.raises(ValueError, match=f"multiple of expansion, got {out_channels} and"):
        BottleneckPreActBlock(4, out_channels, expansion=expansion)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "wide"}, "block must be one of basic, bottleneck.*'wide'"),
        ({"stem": "mnist"}, "stem must be one of cifar, imagenet, got 'mnist'"),
        ({"memory": "none"}, "memory must be one of recompute.*'none'"),
        ({"backend": "cuda"}, "backend must be one of .*'cuda'"),
        ({"act": "swish"}, "act must be one of .*'swish'"),
        ({"layers": []}, "layers must name"),
        ({"layers": [2, 0]}, r"layers must name .*\[2, 0\]"),
        ({"widths": [16]}, "2 stages, 1 widths"),
        ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
    ],
    ids=str,
)
def test_model_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        PreActResNet(**{"block": "basic", "layers": [1, 1], **arguments})


@pytest.mark.parametrize(
    ("depth", "block", "nearest"),
    [
        (1, "basic", "8"),
        (2, "basic", "8"),
        (9, "basic", "8 or 14"),
        (18, "basic", "14 or 20"),
        (21, "bottleneck", "20 or 29"),
        (1000, "bottleneck", "992 or 1001"),
        (0, "bottleneck", "11"),
        (-3, "bottleneck", "11"),
    ],
)
def test_impossible_depths_name_the_nearest(depth, block, nearest):
    with pytest.raises(ValueError, match=f"n\\+2 .*got {depth}; nearest: {nearest}$"):
        PreActResNet.from_depth(depth, block)


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 1, 8, 8)], ids=str)
def test_images_that_do_not_fit(shape):
    model = PreActResNet("basic", [1, 1], widths=[4, 8])
    with pytest.raises(ValueError, match=r"images \(N, 3, H, W\), got"):
        model(torch.zeros(shape))
