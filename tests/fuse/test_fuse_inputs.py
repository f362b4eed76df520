"""A fused model takes the inputs, devices and ways of differentiating that the unfused one does."""

from __future__ import annotations

import copy
import gc
import pickle
import time
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnetv2 import PreActBlock, explain, fuse
from resnetv2.core.run import run_blocks
from tests.support.fuse_checks import chain_calls, fuse_if_any, fused_copy, fused_units
from tests.support.fuse_models import Basic, IdentityFromPreact, PlainNet, conv3
from tests.support.mutations import MUTATIONS
from tests.support.yardstick import DEVICE, assert_close_steps, images, randomise, step

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = (3, 4, 8, 8)


def pair(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = randomise(model).to(DEVICE)
    return fused_copy(model), model


def test_a_module_in_several_places_is_called_as_often():
    torch.manual_seed(0)
    first, second, pool = Basic(4, 4), Basic(4, 4), nn.MaxPool2d(2, 1, 1)
    for blocks in ([first, second, first], [first, pool, second, pool], [first, first]):
        fused, model = pair(nn.Sequential(*blocks))
        assert_close_steps(step(fused, images(SHAPE)), step(model, images(SHAPE)))


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_block_that_runs_both_ways_in_one_graph(momentum):
    """By its own forward for an input in an odd layout, and fused for its own output."""
    block = Basic(4, 4, norm=lambda channels: nn.BatchNorm2d(channels, momentum=momentum))
    fused, model = pair(nn.Sequential(block, block))
    x = images(SHAPE).transpose(2, 3)
    assert_close_steps(step(fused, x), step(model, x))


def test_a_block_that_is_put_in_anothers_place():
    fused, model = pair(nn.Sequential(Basic(4, 4), Basic(4, 4), Basic(4, 4)))
    for each in (fused, model):
        each[2] = each[0]
    assert_close_steps(step(fused, images(SHAPE)), step(model, images(SHAPE)))


@pytest.mark.parametrize("memory", ["recompute", "invert"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_batched_gradients(training, memory):
    """is_grads_batched, as vectorised jacobians have them."""
    fused, model = pair(nn.Sequential(Basic(4, 4), Basic(4, 4)))
    fuse(fused, memory=memory, backend="aten")
    found = []
    for each in (fused, model):
        x = images(SHAPE).requires_grad_()
        out = each.train(training)(x)
        gs = torch.stack([images(SHAPE, seed) for seed in range(2)])
        found.append(torch.autograd.grad(out, [x, *each.parameters()], gs, is_grads_batched=True))
    for mine, expected in zip(*found):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)


class Sum(nn.Module):
    def __init__(self, channels: int, out: int, shortcut: nn.Module) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv3(channels, out)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv3(out, out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))) + self.shortcut(x)


SHORTCUTS = {
    "to-one-pixel": lambda: Sum(4, 4, nn.Conv2d(4, 4, 1, 8)),
    "of-one-channel": lambda: Sum(4, 4, nn.Conv2d(4, 1, 1)),
    "to-one-channel": lambda: Sum(4, 1, nn.Conv2d(4, 1, 1)),
    "of-the-whole-image": lambda: Sum(4, 4, nn.Conv2d(4, 4, 7, padding=(3, 3), stride=4)),
}


@pytest.mark.parametrize("name", SHORTCUTS)
def test_shortcuts_that_are_broadcast(name):
    fused, model = pair(SHORTCUTS[name]())
    for shape in (SHAPE, (3, 4, 4, 4)):
        try:
            expected = step(copy.deepcopy(model), images(shape))
        except RuntimeError:
            with pytest.raises(RuntimeError):
                copy.deepcopy(fused)(images(shape))
            continue
        assert_close_steps(step(copy.deepcopy(fused), images(shape)), expected)


def test_what_a_collection_runs_is_no_part_of_a_forward():
    """Callbacks and finalizers, of a profiler or a test tool, run wherever a trace allocates."""
    called = []

    def clock(phase: str, info: object) -> None:
        called.append(time.perf_counter())

    thresholds = gc.get_threshold()
    gc.callbacks.append(clock)
    gc.set_threshold(1, 1, 1)
    try:
        fused, _ = pair(Basic(4, 4))
    finally:
        gc.set_threshold(*thresholds)
        gc.callbacks.remove(clock)
    assert called
    assert gc.isenabled()
    assert fused_units(fused) == 1


@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_fuse_with_another_default_device(default):
    states = torch.get_rng_state()
    if default == "cuda":
        torch.set_default_device("cuda")
    try:
        with torch.device("cpu"):
            block = Basic(4, 4)
        states = torch.get_rng_state()
        if default == "meta":
            with torch.device("meta"):
                fuse(block, backend="aten")
        else:
            fuse(block, backend="aten")
    finally:
        torch.set_default_device(None)
    assert fused_units(block) == 1
    assert torch.equal(torch.get_rng_state(), states)


def test_tensors_without_data():
    fused, _ = pair(Basic(4, 8, 2))
    assert fused.to("meta")(images(SHAPE).to("meta")).shape == (3, 8, 4, 4)


def test_lazy_modules():
    class Lazy(Sum):
        def __init__(self) -> None:
            super().__init__(4, 4, nn.Identity())
            self.bn1, self.conv1 = nn.LazyBatchNorm2d(), nn.LazyConv2d(4, 3, padding=1)

    block = fuse_if_any(Lazy().to(DEVICE))
    assert "not initialised" in explain(block).blocks[0].reason
    block(images(SHAPE))
    assert fused_units(fuse(block, backend="aten")) == 1


class Registered(Basic):
    def __init_subclass__(cls, *, key: str, **options: object) -> None:
        super().__init_subclass__(**options)


class Named(Registered, key="named"):
    pass


def test_a_class_that_asks_its_subclasses_for_a_keyword():
    assert fused_units(fuse(Named(4, 4), backend="aten")) == 1


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles(protocol):
    fused, _ = pair(PlainNet(Basic))
    loaded = pickle.loads(pickle.dumps(fused.eval(), protocol))
    assert fused_units(loaded) == fused_units(fused) == 4
    assert torch.equal(loaded(images((2, 3, 8, 8))), fused(images((2, 3, 8, 8))))


INPUTS = {
    "chunk": lambda x: x.chunk(2, 1)[0],
    "crop": lambda x: x[:, :4, 1:8, :7],
    "crop-of-channels-last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :4, :7],
    "transposed": lambda x: x[:, :4].transpose(2, 3),
    "permuted": lambda x: x[:, :4].permute(0, 1, 3, 2),
    "expanded": lambda x: x[:1, :4].expand(2, 4, 9, 9),
    "one-pixel": lambda x: x[:, :4, :1, :1].contiguous(),
}


@pytest.mark.parametrize("name", INPUTS)
def test_layout_of_the_result(name):
    fused, model = pair(nn.Sequential(Basic(4, 4), Basic(4, 4)).eval())
    x = INPUTS[name](images((2, 8, 9, 9), channels_last=False))
    found, expected = fused(x), model(x)
    assert found.stride() == expected.stride()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_dtypes_that_eager_refuses():
    for change in ("input", "convolution"):
        fused, model = pair(Basic(4, 4))
        x = images(SHAPE, dtype=torch.float64 if change == "input" else torch.float32)
        for each in (fused, model):
            if change == "convolution":
                each.conv2.double()
            with pytest.raises((RuntimeError, ValueError)):
                each(x)


def test_identity_from_preact_is_not_rounded_under_autocast():
    fused, model = pair(nn.Sequential(*[IdentityFromPreact(8) for _ in range(3)]))
    assert chain_calls(fused, images((4, 8, 8, 8))) == 1
    exact = copy.deepcopy(model).double()(images((4, 8, 8, 8)).double())
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found, expected = (each(images((4, 8, 8, 8))) for each in (fused, model))
    assert (found - exact).norm() <= 2 * (expected - exact).norm()


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("memory", ["invert", "invert_h1", "segment"])
def test_walking_back_warns_where_it_loses_the_stream(memory, half):
    """Once, with the figure; and not where it does not."""
    for scale, warned in ((1.0, 0), (1e3 if half else 1e5, 1)):
        torch.manual_seed(0)
        blocks = [PreActBlock(8, 8).to(DEVICE) for _ in range(6)]
        for block in blocks:
            block.conv2.weight.data.mul_(scale)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                x = images((2, 8, 8, 8)).to(torch.bfloat16 if half else torch.float32)
                with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=half):
                    out = run_blocks(blocks, x.requires_grad_(), memory=memory, backend="aten")
                out.sum().backward()
        said = [str(w.message) for w in caught if "walked back" in str(w.message)]
        assert len(said) == warned, said


def test_frozen_garbage_collection_is_said() -> None:
    """What gc.freeze() hides is no referrer of any code."""
    model = MUTATIONS["closure"].build()
    gc.freeze()
    try:
        with pytest.warns(UserWarning, match="no pre-activation block"):
            fuse(model)
        report = explain(model)
    finally:
        gc.unfreeze()
    assert "gc.freeze()" in report.blocks[0].reason
    fuse(model)
    assert explain(model).fused
