"""Memory layouts of a chain where a tensor lies in both: one channel, images of one pixel.

Promises: fake tensors have the real strides; the result has the input's layout; what the kernels
leave to ATen comes back in channels_last.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import Stage
from resnetv2.core.modules import UnitModules
from resnetv2.core.operators import chain_backward, chain_forward
from resnetv2.core.reading import Reading
from resnetv2.core.run import describe
from resnetv2.core.spec import decode
from resnetv2.kernels.reference import in_memory_format, is_channels_last
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    eager_twin,
    images,
    needs_triton,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")

MEMORY = ("recompute", "invert", "segment")
SIZES = ((1, 3, 5, 5), (3, 1, 5, 5), (2, 4, 1, 1), (2, 1, 1, 1), (2, 3, 4, 1))


def laid_out(x: Tensor, channels_last: bool) -> Tensor:
    """x with the strides of a new tensor, whatever its size."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return in_memory_format(x, memory_format)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize(
    "size", [(1, 3, 5, 5), (3, 1, 5, 5), (2, 4, 1, 1), (2, 1, 1, 1), (2, 3, 4, 1)]
)
def test_layout_is_what_a_convolution_of_aten_sees(size, channels_last):
    """``is_channels_last`` against the layout in which ATen's convolution answers."""
    x = laid_out(torch.zeros(size), channels_last)
    out = torch.nn.functional.conv2d(x, torch.zeros(2, size[1], 1, 1), padding=1)
    assert is_channels_last(x) == is_channels_last(out)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("channels", [(1, 1), (1, 3), (1, 8), (3, 1), (8, 1), (3, 8)], ids=str)
def test_fake_tensors_have_the_real_strides(channels, size, channels_last):
    """Forward and backward, for gradients in either layout."""
    c, k = channels
    x = laid_out(images((2, c, size, size)), channels_last)
    cases = itertools.product(("preact", "raw"), (1, 2), (1, 2))
    for (shortcut, stride, dilation), memory in zip(cases, itertools.cycle(MEMORY)):
        first = PreActBlock(c, k, stride, shortcut=shortcut)
        first.conv1.dilation = first.conv1.padding = (dilation, dilation)
        units = [Reading(block.to(DEVICE).unit_modules()) for block in (first, PreActBlock(k, k))]
        arguments = describe(units, x.dtype, need_x=True, backend="aten", memory=memory, segment=1)
        check_strides(x, *arguments)


def check_strides(
    x: Tensor, params: list[Tensor], layout: list[int], constants: list[float]
) -> None:
    params = [p.detach() for p in params]
    out, stats, *kept = same_strides(chain_forward, x, params, layout, constants)
    kept = kept[len(kept) - len(decode(layout, constants).kept()) :]
    for last in (True, False):
        g = laid_out(torch.ones_like(out), last)
        same_strides(chain_backward, g, x, out, stats, kept, params, layout, constants)


def same_strides(operator: Any, *arguments: Any) -> list[Tensor]:
    """The operator's results, which have the strides of those for fake tensors."""
    real = operator(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:

        def fake(value: Any) -> Any:
            if isinstance(value, list):
                return [fake(element) for element in value]
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

        faked = operator(*map(fake, arguments))
    for a, b in zip(real, faked, strict=True):
        assert not isinstance(a, type(b))
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    return real


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
def test_fake_tensors_behind_one_number(channels_last):
    """An inner width of 1 on images of one pixel, whose strides cannot tell a layout."""
    unit = BottleneckPreActBlock(4, 4).to(DEVICE).unit_modules()
    assert isinstance(unit, UnitModules)
    x = laid_out(images((2, 4, 1, 1)), channels_last)
    arguments = describe(
        [Reading(unit)], x.dtype, need_x=True, backend="aten", memory="recompute", segment=1
    )
    check_strides(x, *arguments)


@needs_triton
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
@pytest.mark.parametrize(
    ("channels", "size", "padding"),
    [((1, 8), 5, 2), ((8, 1), 5, 2), ((4, 6), 1, 3), ((1, 6), 1, 3)],
    ids=["from-one-channel", "to-one-channel", "one-pixel-grows", "one-number-grows"],
)
def test_dilated_convolutions_beside_kernels(channels, size, padding, channels_last):
    """ATen computes what is dilated, the kernels the rest."""
    c, k = channels
    block = randomise(PreActBlock(c, k, backend="triton")).to(DEVICE)
    block.conv1.dilation = (2, 2)
    block.conv1.padding = (padding, padding)
    if padding != 2:
        block.shortcut[0].padding = (padding - 2, padding - 2)
    x = laid_out(images((3, c, size, size)), channels_last)
    eager = eager_twin(block)
    assert_close_steps(step(block, x), step(eager, x))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "NCHW"])
def test_result_of_one_channel_lies_as_the_input(channels_last):
    """Eight channels out of one: the layout is that of the input's strides."""
    stage = Stage(PreActBlock(1, 8, backend="aten"), PreActBlock(8, 8, backend="aten")).to(DEVICE)
    x = laid_out(images((2, 1, 5, 5)), channels_last)
    assert is_channels_last(stage(x)) == channels_last
