"""What blocks of this library do beside what any unit does (test_unit_behaviour.py).

The eager twin (the same children, called one by one) is the expectation throughout; the accuracy
of the numbers is test_blocks.py's subject.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage
from tests.support.kernel_checks import in_turn
from tests.support.subjects import SHAPE, own
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    assert_close_steps,
    eager_twin,
    images,
    needs_triton,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_like_eager(module: nn.Module, x: torch.Tensor, **options) -> None:
    twin = eager_twin(module)
    assert_close_steps(step(module, x, **options), step(twin, x, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_batches_only_in_training(backend):
    block = own("identity", backend)
    block(images(SHAPE))
    assert int(block.bn1.num_batches_tracked) == 1
    block.bn2.eval()
    block(images(SHAPE))
    assert int(block.bn1.num_batches_tracked) == 2
    assert int(block.bn2.num_batches_tracked) == 1
    block.eval()
    before = {name: buffer.clone() for name, buffer in block.named_buffers()}
    block(images(SHAPE))
    for name, buffer in block.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_buffers_and_parameters_stay_the_same_objects():
    block = own("identity")
    held = [*block.parameters(), *block.buffers()]
    pointers = [tensor.data_ptr() for tensor in held]
    step(block, images(SHAPE))
    assert all(a is b for a, b in zip(held, [*block.parameters(), *block.buffers()]))
    assert pointers == [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize(
    ("momentum", "backend"),
    [(0.1, "aten"), (None, "aten"), pytest.param(None, "triton", marks=needs_triton)],
)
def test_a_block_used_twice_in_a_stage(momentum, backend):
    """Shared weights: gradients add up and running statistics move once after the other."""
    block = PreActBlock(4, 4, norm=lambda c: nn.BatchNorm2d(c, momentum=momentum))
    stage = Stage(block, block, backend=backend).to(DEVICE)
    assert_like_eager(stage, images(SHAPE))
    assert int(block.bn1.num_batches_tracked) == 2


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_memory_format_out_is_that_of_the_input(channels_last, backend):
    x = images(SHAPE, channels_last=channels_last).requires_grad_()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for module in (own("identity", backend), own("mixed-stage", backend)):
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_views(backend):
    """Strided, transposed and expanded inputs, and gradients of them."""
    block = own("identity", backend)
    wide = images((3, 8, 10, 12))
    for x in (
        wide[:, ::2, ::2, 1::2],
        wide[:, :4, :5, :6],
        images((3, 4, 6, 5)).transpose(2, 3),
        images((1, 4, 5, 6)).expand(3, -1, -1, -1),
    ):
        eager = eager_twin(block)
        a = x.detach().requires_grad_()
        b = x.detach().requires_grad_()
        g = images((3, 4, 5, 6), 7)[:, :, :, :]
        out, expected = block(a), eager(b)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.backward(g.transpose(2, 3).contiguous().transpose(2, 3))
        expected.backward(g)
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)
        block = own("identity", backend)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@in_turn(
    "options, kind",
    {
        "preact": (8, 12, 2, "preact", "raw"),
        "raw": (8, 12, 2, "raw", "raw"),
        "identity": (8, 8, 1, "preact", "raw"),
        "identity-preact": (8, 8, 1, "preact", "preact"),
    },
    [("basic", PreActBlock), ("bottleneck", BottleneckPreActBlock), ("basic", PreActBlock)],
)
def test_autocast_dtypes(options, kind, x_dtype):
    """Output and dx have eager's dtypes, which depend on where the shortcut comes from."""
    *channels, shortcut, identity = options
    block = kind(*channels, shortcut=shortcut, identity=identity, backend="aten").to(DEVICE)
    seen = []
    for module in (block, eager_twin(block)):
        x = images((2, 8, 5, 6), dtype=x_dtype).requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = module(x)
        out.float().sum().backward()
        seen.append((out.dtype, x.grad.dtype, module.bn1.weight.grad.dtype))
    assert seen[0] == seen[1]


def test_autocast_is_what_it_was_after_a_block():
    block = own("identity")
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        block(images(SHAPE))
        assert torch.is_autocast_enabled(DEVICE.type)
        assert torch.get_autocast_dtype(DEVICE.type) == torch.bfloat16
        ones = torch.ones(2, 2, device=DEVICE)
        assert F.linear(ones, ones).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_outside_or_inside_autocast(backend):
    block = own("identity", backend)
    grads = []
    for inside in (False, True):
        x = images(SHAPE).requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = block(x)
            if inside:
                out.sum().backward()
        if not inside:
            out.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_frozen_blocks_in_a_stage():
    """Fine-tuning: no gradient is computed or left before the first parameter that wants one."""
    stage = own("stage")
    for parameter in stage[:2].parameters():
        parameter.requires_grad_(False)
    twin = eager_twin(stage)
    for module in (stage, twin):
        module(images(SHAPE)).backward(images(SHAPE, 3))
    for (name, mine), theirs in zip(stage.named_parameters(), twin.parameters()):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_forward_between_eval_forward_and_its_backward(backend):
    """Running statistics move in place meanwhile; the eval gradient is that of its forward."""
    block = own("identity", backend)
    x = images(SHAPE).requires_grad_()
    block.eval()
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    loss = block(x).square().sum()
    block.train()
    block(images(SHAPE, 1)).sum().backward()
    (dx,) = torch.autograd.grad(loss, x)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_accumulation(backend):
    block = own("basic", backend)
    x = images(SHAPE).requires_grad_()
    out = block(x)
    g = images(out.shape, 3)
    out.backward(g, retain_graph=True)
    once = [x.grad.clone(), *[p.grad.clone() for p in block.parameters()]]
    out.backward(g)
    twice = [x.grad, *[p.grad for p in block.parameters()]]
    for a, b in zip(once, twice):
        assert torch.equal(2 * a, b)
    with pytest.raises(RuntimeError, match="second time"):
        out.backward(g)


def test_input_changed_before_backward_is_noticed():
    block = own("identity")
    x = images(SHAPE).requires_grad_()
    y = x * 1.0
    out = block(y)
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_saves_no_more_than_half_of_eager():
    """``recompute`` keeps x and h1, where eager keeps x, z1, h1 and z2."""
    x = images((2, 16, 8, 8)).requires_grad_()
    sizes = []
    block = PreActBlock(16, 16, backend="aten").to(DEVICE)
    for module in (block, eager_twin(block)):
        held: dict[int, int] = {}

        def pack(tensor: torch.Tensor, held: dict[int, int] = held) -> torch.Tensor:
            if tensor.dim() == 4 and tensor.shape[-1] == 8:
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = module(x)
        sizes.append(sum(held.values()))
        del out
    activation = x.numel() * x.element_size()
    assert sizes[0] == 2 * activation
    assert sizes[1] >= 4 * activation


def test_state_dict_is_that_of_the_children():
    """Checkpoints written without this package load strictly."""

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1 = nn.BatchNorm2d(4)
            self.conv1 = nn.Conv2d(4, 8, 3, 2, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
            self.shortcut = nn.Sequential(nn.Conv2d(4, 8, 1, 2, bias=False))

    block = own("basic")
    assert list(block.state_dict()) == list(Plain().state_dict())
    block.load_state_dict(Plain().state_dict(), strict=True)


def test_children_by_hand_give_what_the_block_computes():
    block = own("identity")
    x = images(SHAPE)
    h = block.conv1(F.relu(block.bn1(x)))
    by_hand = x + block.conv2(F.relu(block.bn2(h)))
    torch.testing.assert_close(block(x), by_hand, rtol=1e-4, atol=1e-5)


def test_print_names_the_children():
    text = str(PreActBlock(4, 8, 2))
    assert text.startswith("PreActBlock(")
    assert "4, 8, stride=2, shortcut='preact'" in text
    assert "(bn1): BatchNorm2d(4" in text
    assert "(conv2): Conv2d(8, 8, kernel_size=(3, 3)" in text
    assert "BottleneckPreActBlock(" in str(BottleneckPreActBlock(4, 8))


def test_subclass_with_its_own_forward_in_a_stage():
    class Scaled(PreActBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    stage = Stage(Scaled(4, 4), PreActBlock(4, 4), backend="aten").to(DEVICE)
    for block in stage:
        block.backend = "aten"
    x = images(SHAPE)
    torch.testing.assert_close(
        stage(x), stage[1](0.5 * stage[0].forward_children(x)), rtol=1e-4, atol=1e-5
    )


def test_identity_module_as_shortcut():
    block = own("identity")
    block.shortcut = nn.Identity()
    assert_like_eager(block, images(SHAPE))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_gradient(value, backend):
    """What GradScaler looks for: every gradient that eager's overflow reaches is not finite."""
    block = own("basic", backend)
    results = []
    for module in (block, eager_twin(block)):
        out_shape = (3, 8, 3, 3)
        g = images(out_shape, 3)
        g[1, 2, 1, 1] = value
        results.append(step(module, images(SHAPE), g))
    for name in results[0]:
        assert torch.equal(results[0][name].isfinite(), results[1][name].isfinite()), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel_in_training(backend):
    """A ValueError as eager's, at the norm that has it, with nothing changed."""
    block = own("basic", backend)
    before = {name: b.clone() for name, b in block.named_buffers()}
    for shape in ((1, 4, 1, 1), (1, 4, 2, 2)):  # the second only inside, after the stride
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(images(shape))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            eager_twin(block)(images(shape))
    for name, buffer in block.named_buffers():
        assert torch.equal(buffer, before[name]), name
    block.eval()
    assert block(images((1, 4, 1, 1))).shape == (1, 8, 1, 1)


def trained(backend: str) -> dict[str, torch.Tensor]:
    """Weights and buffers after two steps of SGD."""
    torch.manual_seed(5)
    model = PreActResNet("bottleneck", [1, 1], 3, widths=[8, 12], stem_width=4, backend=backend)
    model = model.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for seed in range(2):
        out = model(images((2, 3, 5, 6), seed))
        loss = F.cross_entropy(out, torch.tensor([0, 2], device=DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


first_run = functools.cache(trained)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_from_one_seed_are_bitwise_equal(backend):
    """The same inputs give the same bits, every run."""
    found, again = first_run(backend), trained(backend)
    for name in found:
        assert torch.equal(found[name], again[name]), name
        assert found[name].isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_eager(backend):
    mine, theirs = first_run(backend), trained("eager")
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
