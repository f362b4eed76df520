"""A block behaves like the ``nn.Module`` of its children, in everything a training script does.

The eager twin (the same children, called one by one) is the expectation throughout; the accuracy
of the numbers is test_blocks.py's subject.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    eager_twin,
    images,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = {"basic": PreActBlock, "bottleneck": BottleneckPreActBlock}
SHAPE = (3, 4, 5, 6)


def block_of(backend: str = "aten", kind: type = PreActBlock, **options) -> PreActBlock:
    torch.manual_seed(0)
    block = kind(4, 8, 2, backend=backend, **options)
    return randomise(block).to(DEVICE)


def identity_block(backend: str = "aten", **options) -> PreActBlock:
    torch.manual_seed(0)
    return randomise(PreActBlock(4, 4, backend=backend, **options)).to(DEVICE)


def stage_of(backend: str = "aten", count: int = 3) -> Stage:
    torch.manual_seed(0)
    stage = Stage(*[PreActBlock(4, 4, backend=backend) for _ in range(count)], backend=backend)
    return randomise(stage).to(DEVICE)


def assert_like_eager(module: nn.Module, x: torch.Tensor, **options) -> None:
    twin = eager_twin(module)
    assert_close_steps(step(module, x, **options), step(twin, x, **options))


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_batches_only_in_training(backend):
    block = identity_block(backend)
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


def test_buffers_move_without_gradients_too():
    block, twin = identity_block(), eager_twin(identity_block())
    with torch.no_grad():
        block(images(SHAPE))
        twin(images(SHAPE))
    for (name, mine), theirs in zip(block.named_buffers(), twin.buffers()):
        torch.testing.assert_close(mine, theirs, msg=name)


def test_buffers_and_parameters_stay_the_same_objects():
    block = identity_block()
    held = [*block.parameters(), *block.buffers()]
    pointers = [tensor.data_ptr() for tensor in held]
    step(block, images(SHAPE))
    assert all(a is b for a, b in zip(held, [*block.parameters(), *block.buffers()]))
    assert pointers == [tensor.data_ptr() for tensor in held]


@pytest.mark.parametrize("momentum", [0.1, None], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
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
    for module in (block_of(backend), identity_block(backend), stage_of(backend, 2)):
        out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        (dx,) = torch.autograd.grad(out.sum(), x)
        assert dx.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_that_are_views(backend):
    """Strided, transposed and expanded inputs, and gradients of them."""
    block = identity_block(backend)
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
        block = identity_block(backend)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"shortcut": "raw"}, {"same": True}, {"same": True, "identity": "preact"}],
    ids=["preact", "raw", "identity", "identity-preact"],
)
def test_autocast_dtypes(options, kind, x_dtype):
    """Output and dx have eager's dtypes, which depend on where the shortcut comes from."""
    options = dict(options)
    channels = (8, 8, 1) if options.pop("same", False) else (8, 12, 2)
    block = KINDS[kind](*channels, backend="aten", **options).to(DEVICE)
    seen = []
    for module in (block, eager_twin(block)):
        x = images((2, 8, 5, 6), dtype=x_dtype).requires_grad_()
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            out = module(x)
        out.float().sum().backward()
        seen.append((out.dtype, x.grad.dtype, module.bn1.weight.grad.dtype))
    assert seen[0] == seen[1]


def test_autocast_is_what_it_was_after_a_block():
    block = identity_block()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        block(images(SHAPE))
        assert torch.is_autocast_enabled(DEVICE.type)
        assert torch.get_autocast_dtype(DEVICE.type) == torch.bfloat16
        ones = torch.ones(2, 2, device=DEVICE)
        assert F.linear(ones, ones).dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_outside_or_inside_autocast(backend):
    block = identity_block(backend)
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


def subsets(block: nn.Module) -> list[tuple[str, ...]]:
    """Each parameter alone, all but each, none, all, and those of each child."""
    names = [name for name, _ in block.named_parameters()]
    children = {name.rsplit(".", 1)[0] for name in names}
    result: list[tuple[str, ...]] = [(), tuple(names)]
    result += [(name,) for name in names]
    result += [tuple(n for n in names if n != name) for name in names]
    result += [tuple(n for n in names if n.startswith(child)) for child in sorted(children)]
    return result


@pytest.mark.parametrize("x_grad", [True, False], ids=["x-needs-grad", "x-without-grad"])
@pytest.mark.parametrize("options", [{}, {"shortcut": "raw"}, {"same": True}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_subset_of_gradients(kind, options, x_grad):
    """.grad is None exactly where eager leaves it None, and the others are right."""
    options = dict(options)
    channels = (8, 8, 1) if options.pop("same", False) else (8, 12, 2)
    block = KINDS[kind](*channels, bias=True, backend="aten", **options)
    check_subsets(randomise(block).to(DEVICE), x_grad, subsets(block))


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("x_grad", [True, False], ids=["x-needs-grad", "x-without-grad"])
def test_some_subsets_of_gradients_interpreted(x_grad, backend):
    block = randomise(BottleneckPreActBlock(4, 8, 2, bias=True, backend=backend)).to(DEVICE)
    names = ("conv3.weight", "bn3.bias", "conv2.bias", "bn1.weight", "shortcut.0.weight")
    check_subsets(block, x_grad, [(), *[(name,) for name in names]])


def check_subsets(block: nn.Module, x_grad: bool, chosen: list[tuple[str, ...]]) -> None:
    for names in chosen:
        grads = []
        for module in (copy.deepcopy(block), eager_twin(block)):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in names)
            x = images((2, block.in_channels, 5, 6)).requires_grad_(x_grad)
            out = module(x)
            assert out.requires_grad == (x_grad or bool(names))
            if out.requires_grad:
                out.backward(images(out.shape, 3))
            found = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            grads.append({**found, **({"x": x.grad} if x.grad is not None else {})})
        assert grads[0].keys() == grads[1].keys(), names
        scale = float(images((2, block.out_channels, 5, 6), 3).norm())  # of what is summed
        for name in grads[0]:
            torch.testing.assert_close(
                grads[0][name], grads[1][name], rtol=1e-4, atol=1e-5 * scale, msg=f"{names} {name}"
            )


def test_frozen_blocks_in_a_stage():
    """Fine-tuning: no gradient is computed or left before the first parameter that wants one."""
    stage = stage_of(count=3)
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
def test_two_forwards_before_one_backward(backend):
    block = block_of(backend)
    results = []
    for module in (block, eager_twin(block)):
        a, b = images(SHAPE, 1).requires_grad_(), images(SHAPE, 2).requires_grad_()
        first, second = module(a), module(b)
        (first * second).sum().backward()
        results.append([a.grad, b.grad, *[p.grad for p in module.parameters()]])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_forward_between_eval_forward_and_its_backward(backend):
    """Running statistics move in place meanwhile; the eval gradient is that of its forward."""
    block = identity_block(backend)
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
    block = block_of(backend)
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


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("make", [identity_block, block_of, stage_of])
def test_output_may_be_changed_in_place(make, channels_last):
    """An addition does not save its result, so out.mul_(2) after a block works in eager."""
    module = make()
    results = []
    for each in (module, eager_twin(module)):
        x = images(SHAPE, channels_last=channels_last).requires_grad_()
        out = each(x)
        out.mul_(2.0).add_(1.0)
        out.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


def test_input_changed_before_backward_is_noticed():
    block = identity_block()
    x = images(SHAPE).requires_grad_()
    y = x * 1.0
    out = block(y)
    with torch.no_grad():
        y.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, backend):
    block = block_of(backend)
    expected = eager_twin(block)(images(SHAPE))
    with context():
        out = block(images(SHAPE))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("make", [identity_block, stage_of])
def test_checkpoint(make, reentrant):
    module = make()
    g = images(SHAPE, 3)
    plain = step(module, images(SHAPE), g)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found = step(Checkpointed(), images(SHAPE), g)
    for name, value in plain.items():
        if not name.startswith("buffer"):
            assert torch.equal(value, found[name.replace("grad ", "grad inner.")]), name


@pytest.mark.parametrize("make", [identity_block, block_of, stage_of])
def test_double_backward(make):
    """A gradient penalty: the gradient of dx's norm, as eager's."""
    module = make()
    results = []
    for each in (module, eager_twin(module)):
        x = images(SHAPE).requires_grad_()
        (dx,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        dx.square().sum().sqrt().backward()
        results.append([x.grad, *[p.grad for p in each.parameters()]])
    for mine, theirs in zip(*results):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@pytest.mark.parametrize("make", [identity_block, stage_of])
def test_vmap_jvp_and_functional_call(make):
    module = make().eval()
    twin = eager_twin(module)
    batch = images((2, 3, 4, 5, 6)[1:]).unsqueeze(0).repeat(2, 1, 1, 1, 1)
    torch.testing.assert_close(torch.func.vmap(module)(batch), torch.func.vmap(twin)(batch))

    x, tangent = images(SHAPE), images(SHAPE, 1)
    for mine, theirs in zip(
        torch.func.jvp(module, (x,), (tangent,)), torch.func.jvp(twin, (x,), (tangent,))
    ):
        torch.testing.assert_close(mine, theirs)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        mine = torch.autograd.forward_ad.unpack_dual(module(dual)).tangent
        theirs = torch.autograd.forward_ad.unpack_dual(twin(dual)).tangent
    torch.testing.assert_close(mine, theirs)

    doubled = {name: 2 * value for name, value in module.state_dict().items()}
    assert not torch.equal(torch.func.functional_call(module, doubled, (x,)), module(x))
    expected = torch.func.functional_call(twin, doubled, (x,))
    torch.testing.assert_close(
        torch.func.functional_call(module, doubled, (x,)),
        expected,
        rtol=1e-5,
        atol=1e-6 * float(expected.detach().abs().max()),
    )

    def loss(params: dict[str, torch.Tensor], m: nn.Module) -> torch.Tensor:
        return torch.func.functional_call(m, params, (x,)).square().mean()

    params = dict(module.named_parameters())
    mine, theirs = torch.func.grad(loss)(params, module), torch.func.grad(loss)(params, twin)
    for name in params:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def round_trip(how: str, module: nn.Module) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    if how == "torch.save":
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    torch.manual_seed(99)
    fresh = type(module)(4, 8, 2, backend="aten").to(DEVICE)
    fresh.load_state_dict(torch.load(file), strict=True)
    return fresh


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict"])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same(kind, how):
    block = block_of("aten", KINDS[kind])
    step(block, images(SHAPE, 5))
    block.zero_grad()
    other = round_trip(how, block)
    assert_equal_steps(step(block, images(SHAPE)), step(other, images(SHAPE)))


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

    block = block_of()
    assert list(block.state_dict()) == list(Plain().state_dict())
    block.load_state_dict(Plain().state_dict(), strict=True)


def test_children_by_hand_give_what_the_block_computes():
    block = identity_block()
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


def test_plain_sequential_of_blocks():
    blocks = nn.Sequential(*[PreActBlock(4, 4, backend="aten") for _ in range(3)]).to(DEVICE)
    assert_like_eager(randomise(blocks), images(SHAPE))


@pytest.mark.parametrize("child", ["bn1", "conv2", "act", "shortcut", "shortcut.0"])
def test_hooks_on_children_fire(child):
    block = block_of()
    seen: list[str] = []
    target = block.get_submodule(child)
    target.register_forward_pre_hook(lambda *_: seen.append("pre"))
    target.register_forward_hook(lambda *_: seen.append("forward"))
    target.register_full_backward_hook(lambda *_: seen.append("backward"))
    twin = eager_twin(block_of())
    assert_close_steps(step(block, images(SHAPE)), step(twin, images(SHAPE)))
    calls = 2 if child == "act" else 1
    assert sorted(seen) == sorted(["pre", "forward", "backward"] * calls)


def test_a_hook_that_changes_its_output_counts():
    block = identity_block()
    handle = block.conv1.register_forward_hook(lambda _, __, out: out * 0)
    block.eval()
    x = images(SHAPE)
    expected = eager_twin(block)(x)
    assert torch.equal(block(x), expected)
    handle.remove()
    assert not torch.allclose(block(x), expected)


def test_global_hooks_see_the_children():
    block = identity_block()
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        block(images(SHAPE))
    finally:
        handle.remove()
    assert block.conv1 in seen
    assert block in seen


@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
@pytest.mark.parametrize("where", ["0", "1", "2", "1.conv1", "2.bn2"])
def test_hooks_inside_a_stage_fire(where, kind):
    """The stage runs that block alone, the others still as chains."""
    stage = stage_of()
    seen: list[str] = []
    target = stage.get_submodule(where)
    register = {
        "forward": target.register_forward_hook,
        "pre": target.register_forward_pre_hook,
        "backward": target.register_full_backward_hook,
    }[kind]
    register(lambda *_: seen.append(where))
    assert_close_steps(step(stage, images(SHAPE)), step(eager_twin(stage_of()), images(SHAPE)))
    assert seen == [where]


@pytest.mark.parametrize("where", ["", "0", "0.conv1"])
def test_forward_put_on_an_instance_is_called(where):
    """How adapters and offloading libraries wrap a module."""
    stage = stage_of().eval()
    target = stage.get_submodule(where)
    original, seen = target.forward, []

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(where)
        return original(x) * 0.5

    expected = stage(images(SHAPE))
    target.forward = forward
    assert not torch.allclose(stage(images(SHAPE)), expected)
    assert seen == [where]


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


def test_pruning():
    block = identity_block()
    twin = eager_twin(block)
    for module in (block, twin):  # a pruned module cannot be copied
        prune.l1_unstructured(module.conv1, "weight", amount=0.5)
    mine, theirs = step(block, images(SHAPE)), step(twin, images(SHAPE))
    assert_close_steps(mine, theirs)
    assert (mine["grad conv1.weight_orig"][block.conv1.weight_mask == 0] == 0).all()
    prune.remove(block.conv1, "weight")
    assert_like_eager(block, images(SHAPE))


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrizations(how):
    block = block_of()
    how(block.conv2)
    assert parametrize.is_parametrized(block.conv2)
    twin = eager_twin(block)
    assert_close_steps(step(block, images(SHAPE)), step(twin, images(SHAPE)))


@pytest.mark.parametrize(
    "replace",
    {
        "group-norm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 4)),
        "no-norm": lambda b: setattr(b, "bn2", nn.Identity()),
        "grouped-conv": lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, 2, 1, groups=2)),
        "depthwise-conv": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 1, groups=8)),
        "dilated-conv": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 2, dilation=2)),
        "conv5x5": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 5, 1, 2)),
        "conv1x3": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, (1, 3), 1, (0, 1))),
        "same-padding": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, padding="same")),
        "reflect-padding": lambda b: setattr(
            b, "conv2", nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        ),
        "instance-norm": lambda b: setattr(b, "bn2", nn.InstanceNorm2d(8)),
        "relu6": lambda b: setattr(b, "act", nn.ReLU6()),
        "inplace-relu": lambda b: setattr(b, "act", nn.ReLU(inplace=True)),
        "tanh-gelu": lambda b: setattr(b, "act", nn.GELU("tanh")),
        "prelu": lambda b: setattr(b, "act", nn.PReLU()),
        "shortcut-conv": lambda b: setattr(b, "shortcut", nn.Conv2d(4, 8, 1, 2)),
        "shortcut-3x3": lambda b: setattr(b, "shortcut", nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1))),
        "shortcut-pooled": lambda b: setattr(
            b, "shortcut", nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 8, 1))
        ),
        "shortcut-with-norm": lambda b: b.shortcut.append(nn.BatchNorm2d(8)),
    }.items(),
    ids=lambda case: case[0],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_replaced_children(replace, backend):
    torch.manual_seed(0)
    block = PreActBlock(4, 8, 2, backend=backend)
    replace[1](block)
    assert_like_eager(block.to(DEVICE), images(SHAPE))


def test_identity_module_as_shortcut():
    block = identity_block()
    block.shortcut = nn.Identity()
    assert_like_eager(block, images(SHAPE))


def test_sync_batch_norm_conversion():
    """In evaluation it runs in one process, on any device; in training it is eager's affair."""
    block = nn.SyncBatchNorm.convert_sync_batchnorm(identity_block())
    assert type(block.bn1) is nn.SyncBatchNorm
    block.eval()
    expected = identity_block().eval()(images(SHAPE))
    torch.testing.assert_close(block(images(SHAPE)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("make", [identity_block, block_of, stage_of])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_inf_pass_as_in_eager(make, value, training, backend):
    """The same positions of out, dx and gradients are NaN, +Inf and -Inf.

    Of buffers, the same are finite: eager's own running mean of Inf is Inf on a CPU, NaN on a GPU.
    """
    module = make(backend)
    x = images(SHAPE)
    x[1, 2, 3, 1] = value
    module.train(training)
    twin = eager_twin(module)
    mine, theirs = step(module, x), step(twin, x)
    for name in mine:
        a, b = mine[name], theirs[name]
        assert torch.equal(a.isfinite(), b.isfinite()), name
        if name.startswith("buffer"):
            continue
        assert torch.equal(a.isnan(), b.isnan()), name
        assert torch.equal(a == torch.inf, b == torch.inf), name
        assert torch.equal(a == -torch.inf, b == -torch.inf), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_the_gradient(value, backend):
    """What GradScaler looks for: every gradient that eager's overflow reaches is not finite."""
    block = block_of(backend)
    results = []
    for module in (block, eager_twin(block)):
        out_shape = (3, 8, 3, 3)
        g = images(out_shape, 3)
        g[1, 2, 1, 1] = value
        results.append(step(module, images(SHAPE), g))
    for name in results[0]:
        assert torch.equal(results[0][name].isfinite(), results[1][name].isfinite()), name


def test_grad_scaler_skips_the_step_and_halves_the_scale():
    block = block_of()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    before = [p.detach().clone() for p in block.parameters()]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = block(images(SHAPE)).float().square().sum() * 1e4
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(a, b) for a, b in zip(before, block.parameters()))


@pytest.mark.parametrize("shape", [(0, 4, 5, 6), (0, 4, 1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(shape, training):
    """Whatever eager does: an empty result, or its error."""
    outcomes = []
    for module in (identity_block(), eager_twin(identity_block())):
        try:
            outcomes.append(step(module.train(training), images(shape)))
        except (RuntimeError, ValueError) as error:
            outcomes.append({"error": torch.tensor(ord(type(error).__name__[0]))})
    assert outcomes[0].keys() == outcomes[1].keys()
    assert_equal_steps(*outcomes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_value_per_channel_in_training(backend):
    """A ValueError as eager's, at the norm that has it, with nothing changed."""
    block = block_of(backend)
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


def train_briefly(backend: str, steps: int, batch: tuple[int, ...]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model = PreActResNet("bottleneck", [1, 1], 3, widths=[8, 12], stem_width=4, backend=backend)
    model = model.to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    for seed in range(steps):
        loss = F.cross_entropy(model(images(batch, seed)), torch.tensor([0, 2], device=DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_runs_from_one_seed_are_bitwise_equal(backend):
    """The same inputs give the same bits, every run."""
    runs = [train_briefly(backend, 3, (2, 3, 5, 6)) for _ in range(2)]
    for name in runs[0]:
        assert torch.equal(runs[0][name], runs[1][name]), name
        assert runs[0][name].isfinite().all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_follows_eager(backend):
    """Weights and buffers after three steps of SGD."""
    mine, theirs = (train_briefly(b, 3, (2, 3, 5, 6)) for b in (backend, "eager"))
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4, msg=name)
