"""``fuse`` on blocks with a second input: an embedding that is added, or scales and shifts.

Promise: any call gives eager's result and gradients, the embedding's included; it runs as a chain
where the embedding has one value for each image and channel, and by the block's own forward else.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from resnetv2 import explain, fuse, unfuse
from tests.support.fuse_checks import ChainCalls, chain_calls, fused_copy
from tests.support.fuse_models.grouped import Embedded, GroupNormed, MaybeEmbedded
from tests.support.yardstick import DEVICE, images, randomise

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS, FEATURES = 6, 5


class Added(GroupNormed):
    """The embedding as it comes is added behind a convolution."""

    def __init__(self) -> None:
        super().__init__(CHANNELS, nn.Conv2d)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.relu(self.gn1(x))) + emb
        return x + self.conv2(self.relu(self.gn2(h)))


class AddedInPlace(Added):
    """It also changes what it is given."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        emb *= 2
        return super().forward(x, emb)


class AddedFlag(Added):
    """Its second input is no tensor."""

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        h = self.conv2(self.relu(self.gn2(self.conv1(self.relu(self.gn1(x))))))
        return x + (h + h if double else h)


class AddedLater(Added):
    """A third input may be left out."""

    def forward(self, x: Tensor, emb: Tensor, scale: float | None = None) -> Tensor:
        h = super().forward(x, emb)
        return h if scale is None else h * scale


class ReadTwice(Added):
    """The embedding decides over another thing too."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return super().forward(x, emb) if emb.mean() > 100 else x


def build(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomise(make()).to(DEVICE)


def one_step(block: nn.Module, call: Callable[..., Tensor], *inputs: Any) -> list[Tensor | None]:
    """The output of a call, and all gradients."""
    given = [t.clone().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    out = call(block, *given)
    wanted = [t for t in (*given, *block.parameters()) if isinstance(t, Tensor)]
    return [out, *torch.autograd.grad(out, wanted, images(out.shape, 1), allow_unused=True)]


def assert_alike(
    fused: nn.Module, plain: nn.Module, call: Callable[..., Tensor], *inputs: Any
) -> None:
    steps = [one_step(each, call, *inputs) for each in (fused, plain)]
    for mine, theirs in zip(*steps, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            atol = 1e-5 * float(theirs.detach().abs().max()) + 1e-6
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=atol)


def chains(block: nn.Module, call: Callable[..., Tensor], *inputs: Any) -> int:
    with torch.no_grad(), ChainCalls() as calls:
        call(block, *inputs)
    return calls.count


def plainly(block: nn.Module, *inputs: Any) -> Tensor:
    return block(*inputs)


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ((3, CHANNELS, 1, 1), 1),
        ((1, CHANNELS, 1, 1), 1),
        ((CHANNELS, 1, 1), 1),
        ((3, CHANNELS, 7, 4), 0),
        ((1, CHANNELS, 7, 4), 0),
        ((3, 1, 1, 1), 0),
        ((1,), 0),
        ((4,), 0),
    ],
    ids=str,
)
def test_shapes_of_an_embedding(shape, count):
    block = build(Added)
    fused = fused_copy(block)
    x, emb = images((3, CHANNELS, 7, 4)), images(shape, 2)
    assert chains(fused, plainly, x, emb) == count
    assert_alike(fused, block, plainly, x, emb)


def test_an_embedding_of_more_images_than_x():
    """It is broadcast over, as in eager."""
    block = build(Added)
    fused = fused_copy(block)
    x, emb = images((1, CHANNELS, 5, 4)), images((3, CHANNELS, 1, 1), 2)
    assert chains(fused, plainly, x, emb) == 0
    assert_alike(fused, block, plainly, x, emb)


CALLS = {
    "given": lambda block, x, emb: block(x, emb),
    "by-name": lambda block, x, emb: block(x, emb=emb),
    "none": lambda block, x, emb: block(x, None),
    "left-out": lambda block, x, emb: block(x),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("how", CALLS)
def test_an_embedding_that_may_be_left_out(how, training):
    block = build(lambda: MaybeEmbedded(CHANNELS, 8, FEATURES)).train(training)
    fused = fused_copy(block)
    x, emb = images((3, CHANNELS, 5, 4)), images((3, FEATURES), 2)
    assert chains(fused, CALLS[how], x, emb) == 1
    assert_alike(fused, block, CALLS[how], x, emb)


def test_a_sequence_of_blocks_without_theirs_is_one_chain():
    model = nn.Sequential(*[MaybeEmbedded(CHANNELS, CHANNELS, FEATURES) for _ in range(3)])
    fused = fuse(model.to(DEVICE), backend="aten")
    assert chain_calls(fused, images((2, CHANNELS, 5, 4))) == 1


@pytest.mark.parametrize(
    ("make", "second", "count"),
    [
        pytest.param(AddedFlag, False, 0, id="flag-given"),
        pytest.param(AddedFlag, True, 0, id="flag-set"),
        pytest.param(AddedLater, images((3, CHANNELS, 1, 1), 2), 1, id="third-left-out"),
    ],
)
def test_other_inputs(make, second, count):
    block = build(make)
    fused = fused_copy(block)
    assert explain(fused).fused
    x = images((3, CHANNELS, 5, 4))
    assert chains(fused, plainly, x, second) == count
    assert_alike(fused, block, plainly, x, second)


def test_a_third_input():
    block = build(AddedLater)
    fused = fused_copy(block)
    inputs = images((3, CHANNELS, 5, 4)), images((3, CHANNELS, 1, 1), 2), 0.5
    assert chains(fused, plainly, *inputs) == 0
    assert_alike(fused, block, plainly, *inputs)


@pytest.mark.parametrize(
    ("make", "reason"), [(AddedInPlace, "in place"), (ReadTwice, "values, size")]
)
def test_left_alone(make, reason):
    block = build(make)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pre-activation")
        fused = fuse(block, backend="aten")
    (row,) = explain(fused).blocks
    assert not row.fused
    assert reason in row.reason


@pytest.mark.parametrize("how", ["add", "scale"])
def test_what_computes_it_is_called_once(how):
    """Hooks on it are honoured; ``unfuse`` leaves them."""
    block = build(lambda: Embedded(CHANNELS, 8, FEATURES, how))
    fused = fused_copy(block)
    seen: list[Any] = []
    for each in (block, fused):
        each.proj[1].register_forward_hook(lambda module, given, out: 3 * out)
    fused.proj.register_forward_hook(lambda *_: seen.append(1))
    x, emb = images((3, CHANNELS, 5, 4)), images((3, FEATURES), 2)
    assert chains(fused, plainly, x, emb) == 1
    assert len(seen) == 1
    assert_alike(fused, block, plainly, x, emb)
    assert type(unfuse(fused)) is Embedded
    assert_alike(fused, block, plainly, x, emb)
