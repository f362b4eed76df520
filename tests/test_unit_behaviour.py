"""What a unit promises whoever wrote it: this library's block, or a foreign one after ``fuse``.

It behaves like the ``nn.Module`` of its children, called one by one, in everything that a training
script does to it. What only blocks of this library do is test_behaviour.py's subject, what only
``fuse`` does fuse/test_fuse_behaviour.py's; the accuracy of the numbers has tests of its own.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from tests.support.fuse_checks import chain_calls, training_step
from tests.support.fuse_models import NormAct, PostActivation, SqueezeExcite
from tests.support.kernel_checks import in_turn
from tests.support.subjects import NET_SHAPE, SHAPE, Pair, blocks, every, pair, stages, subjects
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    images,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_like(module: nn.Module, twin: nn.Module, x: torch.Tensor, **options) -> None:
    assert_close_steps(training_step(module, x, **options), training_step(twin, x, **options))


def assert_fused_again(module: nn.Module, twin: nn.Module) -> None:
    x = images(SHAPE)
    assert chain_calls(module, x) == 1
    assert_like(module, twin, x)


# --- hooks, parametrizations and other children ---------------------------------------------------

# Subject, path of the child, calls in a step: an activation module is called before each
# convolution.
LEAVES = {
    "own bn1": ("own basic", "bn1", 1),
    "own conv2": ("own basic", "conv2", 1),
    "own act": ("own basic", "act", 2),
    "own shortcut": ("own basic", "shortcut", 1),
    "own projection": ("own basic", "shortcut.0", 1),
    "bn1": ("fused basic", "bn1", 1),
    "conv1": ("fused basic", "conv1", 1),
    "bn2": ("fused basic", "bn2", 1),
    "conv2": ("fused wide", "conv_b", 1),
    "shortcut": ("fused basic", "shortcut", 1),
    "projection": ("fused basic", "shortcut.0", 1),
    "norm-with-act": ("fused norm-act", "norm2", 1),
    "act-of-a-norm": ("fused norm-act", "norm2.act", 1),
    "identity": ("fused norm-act", "drop_path", 1),
    "body": ("fused tuples", "body", 1),
    "layer": ("fused tuples", "body.conv2", 1),
    "leaf-of-a-layer": ("fused tuples", "body.conv2.conv", 1),
    "act-of-a-layer": ("fused tuples", "body.conv1.activ", 1),
    "identity-conv": ("fused tuples", "identity_conv", 1),
    "act": ("fused wide", "act_a", 1),
}
HOOKS = {
    "pre": "register_forward_pre_hook",
    "forward": "register_forward_hook",
    "backward": "register_full_backward_hook",
    "backward-pre": "register_full_backward_pre_hook",
}


def out_of_place(*modules: nn.Module) -> None:
    """Backward hooks and in-place activations exclude each other, in eager too."""
    for module in modules:
        for child in module.modules():
            if hasattr(child, "inplace"):
                child.inplace = False


@in_turn("leaf, register", LEAVES, HOOKS.items(), each=2)
def test_hooks_on_children_fire(leaf, register):
    """As often as eagerly; removed, the block is fused again."""
    subject, path, calls = leaf
    module, twin = pair(subject)
    if "backward" in register:
        out_of_place(module, twin)
    x = images(SHAPE)
    assert chain_calls(module, x) == 1
    counts, handles, steps = [], [], []
    for each in (module, twin):
        seen: list[str] = []
        target = each.get_submodule(path)
        handles.append(getattr(target, register)(lambda *_, s=seen: s.append("called")))
        steps.append(training_step(each, x))
        counts.append(len(seen))
    assert counts == [calls, calls]
    assert_close_steps(*steps)
    for handle in handles:
        handle.remove()
    assert_fused_again(module, twin)


@stages
@in_turn("where, register", {w: w for w in ("0", "1", "2", "1.conv1", "2.bn2")}, HOOKS.items(), 2)
def test_hooks_inside_a_stage_fire(where, register, subject):
    """The stage runs that block alone, the others still as chains."""
    module, twin = pair(subject)
    seen: list[str] = []
    handle = getattr(module.get_submodule(where), register)(lambda *_: seen.append(where))
    assert_like(module, twin, images(SHAPE))
    assert seen == [where]
    handle.remove()
    assert_fused_again(module, twin)


@blocks
def test_a_hook_that_changes_its_output_counts(subject):
    for path in ("conv1", "bn2", "shortcut.0"):
        module, twin = pair(subject)
        plain = module.eval()(images(SHAPE))
        for each in (module, twin.eval()):
            each.get_submodule(path).register_forward_hook(lambda _, __, out: out * 0.5)
        assert_like(module, twin, images(SHAPE))
        assert not torch.allclose(module(images(SHAPE)), plain)


@blocks
def test_global_hooks_see_the_children(subject):
    module, _ = pair(subject)
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        module(images(SHAPE))
    finally:
        handle.remove()
    assert module.conv1 in seen
    assert module in seen
    assert chain_calls(module, images(SHAPE)) == 1


@stages
@pytest.mark.parametrize("where", ["", "0", "0.conv1", "1.bn1"])
def test_forward_put_on_an_instance_is_called(where, subject):
    """How adapters and offloading libraries wrap a module."""
    module = pair(subject)[0].eval()
    x = images(SHAPE)
    target = module.get_submodule(where)
    original, seen = target.forward, []
    expected = module(x)

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(where)
        return original(x) * 0.5

    target.forward = forward
    assert not torch.allclose(module(x), expected)
    assert seen == [where]
    del target.forward
    assert torch.equal(module(x), expected)


@blocks
@pytest.mark.parametrize("path", ["conv1", "bn1", "shortcut.0"])
def test_pruning(path, subject):
    module, twin = pair(subject)
    for each in (module, twin):
        prune.l1_unstructured(each.get_submodule(path), "weight", amount=0.5)
    assert chain_calls(module, images(SHAPE)) == 0
    mine, theirs = training_step(module, images(SHAPE)), training_step(twin, images(SHAPE))
    assert_close_steps(mine, theirs)
    mask = module.get_submodule(path).weight_mask
    assert (mine[f"grad {path}.weight_orig"][mask == 0] == 0).all()
    for each in (module, twin):
        prune.remove(each.get_submodule(path), "weight")
    assert_fused_again(module, twin)


@blocks
@pytest.mark.parametrize(
    ("how", "path"),
    [
        pytest.param(parametrizations.weight_norm, "conv2", id="weight-norm"),
        pytest.param(parametrizations.spectral_norm, "shortcut.0", id="spectral-norm"),
    ],
)
def test_parametrizations(how, path, subject):
    module, twin = pair(subject)
    for each in (module, twin):
        torch.manual_seed(4)
        how(each.get_submodule(path))
    assert chain_calls(module, images(SHAPE)) == 0
    assert_like(module, twin, images(SHAPE))
    for each in (module, twin):
        parametrize.remove_parametrizations(each.get_submodule(path), "weight")
    assert_fused_again(module, twin)


REPLACEMENTS = {
    "group-norm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 4)),
    "no-norm": lambda b: setattr(b, "bn2", nn.Identity()),
    "instance-norm": lambda b: setattr(b, "bn2", nn.InstanceNorm2d(8)),
    "other-norm": lambda b: setattr(b, "bn2", nn.BatchNorm2d(8, eps=0.1)),
    "norm-with-act": lambda b: setattr(b, "bn1", NormAct(4, nn.SiLU())),
    "other-conv": lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, 2, 1)),
    "grouped-conv": lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, 2, 1, groups=2)),
    "depthwise-conv": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 1, groups=8)),
    "dilated-conv": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 2, dilation=2)),
    "conv5x5": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 5, 1, 2)),
    "conv1x3": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, (1, 3), 1, (0, 1))),
    "same-padding": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, padding="same")),
    "reflecting": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 1, padding_mode="reflect")),
    "wider-inside": lambda b: [
        setattr(b, "conv1", nn.Conv2d(4, 6, 3, 2, 1)),
        setattr(b, "bn2", nn.BatchNorm2d(6)),
        setattr(b, "conv2", nn.Conv2d(6, 8, 3, 1, 1)),
    ],
    "sequence-for-conv": lambda b: setattr(
        b, "conv2", nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), SqueezeExcite(8))
    ),
    "shortcut-normed": lambda b: b.shortcut.append(nn.BatchNorm2d(8)),
    "shortcut-pooled": lambda b: setattr(
        b, "shortcut", nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(4, 8, 1))
    ),
    "shortcut-3x3": lambda b: setattr(b, "shortcut", nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1))),
    "shortcut-of-conv": lambda b: setattr(b, "shortcut", nn.Conv2d(4, 8, 1, 2)),
}
# What remains one chain, in which ATen computes the convolutions that the kernels do not.
STILL_A_CHAIN = (
    "other-norm", "other-conv", "grouped-conv", "depthwise-conv", "dilated-conv", "conv5x5",
    "conv1x3", "same-padding", "wider-inside", "shortcut-3x3", "shortcut-of-conv", "group-norm",
    "instance-norm",
)  # fmt: skip


def replace_in(modules: Pair, name: str) -> None:
    for each in modules:
        torch.manual_seed(5)
        REPLACEMENTS[name](each)
        each.to(DEVICE)


@blocks
@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_children(name, subject):
    """Whatever is put in a child's place is what runs; the old child back, it is fused again."""
    module, twin = pair(subject)
    children, shortcut = dict(module._modules), list(module.shortcut)
    replace_in((module, twin), name)
    assert_like(module, twin, images(SHAPE))
    if subject.startswith("own"):
        assert chain_calls(module, images(SHAPE)) == (name in STILL_A_CHAIN)
    for path, child in children.items():
        setattr(module, path, child)
    del module.shortcut[len(shortcut) :]
    assert chain_calls(module, images(SHAPE)) == 1


@subjects("triton basic")
@pytest.mark.parametrize("name", STILL_A_CHAIN)
def test_replaced_children_beside_kernels(name, subject):
    modules = pair(subject)
    replace_in(modules, name)
    assert_like(*modules, images(SHAPE))


@pytest.mark.parametrize(("subject", "path"), [("own basic", "act"), ("fused wide", "act_a")])
def test_replaced_activation(subject, path):
    for act in (
        nn.Tanh(), nn.SiLU(), nn.PReLU(), nn.ReLU6(), nn.GELU("tanh"), nn.ReLU(inplace=True)
    ):  # fmt: skip
        module, twin = pair(subject)
        for each in (module, twin):
            setattr(each, path, copy.deepcopy(act).to(DEVICE))
        assert_like(module, twin, images(SHAPE))


@stages
def test_a_block_replaced_in_a_stage(subject):
    module, twin = pair(subject)
    for each in (module, twin):
        torch.manual_seed(7)
        each[1] = randomise(PostActivation(4, 4)).to(DEVICE)
    assert_like(module, twin, images(SHAPE))
    assert chain_calls(module, images(SHAPE)) == 2


def round_trip(how: str, module: nn.Module) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(module)
    if how == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    ("subject", "how"),
    [
        *((s, how) for s in ("own basic", "fused net") for how in ("deepcopy", "pickle", "save")),
        ("own bottleneck", "pickle"),
        ("own stage", "save"),
        ("fused basic", "save"),
        ("fused norm-act", "pickle"),
        ("fused tuples", "deepcopy"),
        ("fused wide", "save"),
        ("fused stage", "pickle"),
    ],
)
def test_copies_are_fused_and_compute_the_same(subject, how):
    module, _ = pair(subject)
    x = images(NET_SHAPE if "net" in subject else SHAPE, 5)
    step(module, x)  # gradients and buffers that differ from those of a new module
    other = round_trip(how, module)
    assert type(other) is type(module)
    assert chain_calls(other, x) == chain_calls(module, x) > 0
    assert not {id(p) for p in other.parameters()} & {id(p) for p in module.parameters()}
    assert_equal_steps(step(other, x), step(module, x))


# --- autograd -------------------------------------------------------------------------------------


def subsets(module: nn.Module) -> list[tuple[str, ...]]:
    """Each parameter alone, all but each, none, all, and those of each child."""
    names = [name for name, _ in module.named_parameters()]
    children = {name.rsplit(".", 1)[0] for name in names}
    result: list[tuple[str, ...]] = [(), tuple(names)]
    result += [(name,) for name in names]
    result += [tuple(n for n in names if n != name) for name in names]
    result += [tuple(n for n in names if n.startswith(child)) for child in sorted(children)]
    return result


@subjects(
    "own biased", "own biased-raw", "own biased-identity", "own biased-bottleneck",
    "own biased-bottleneck-raw", "own biased-bottleneck-identity", "triton biased-bottleneck",
    "fused basic", "fused tuples", "fused wide",
)  # fmt: skip
@pytest.mark.parametrize("x_grad", [True, False], ids=["x-needs-grad", "x-without-grad"])
def test_every_subset_of_gradients(subject, x_grad):
    """.grad is None exactly where eager leaves it None, and the others are right."""
    modules = pair(subject)
    chosen = subsets(modules[0])
    if subject.startswith("triton"):  # some subsets: interpreted kernels take their time
        names = ("conv3.weight", "bn3.bias", "conv2.bias", "bn1.weight", "shortcut.0.weight")
        chosen = [(), *((name,) for name in names)]
    for names in chosen:
        found = []
        for each in modules:
            each.zero_grad(set_to_none=True)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(name in names)
            x = images(SHAPE).requires_grad_(x_grad)
            out = each(x)
            assert out.requires_grad == (x_grad or bool(names))
            g = images(out.shape, 3)
            if out.requires_grad:
                out.backward(g)
            grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
            found.append({**grads, **({"x": x.grad} if x.grad is not None else {})})
        assert found[0].keys() == found[1].keys(), names
        scale = float(g.norm())  # of what is summed
        for name in found[0]:
            torch.testing.assert_close(
                found[0][name], found[1][name], rtol=1e-4, atol=1e-5 * scale, msg=f"{names} {name}"
            )


@subjects("own basic", "triton basic", "fused stage", "fused stage invert")
def test_two_forwards_before_one_backward(subject):
    results = []
    for each in pair(subject):
        a, b = images(SHAPE, 1).requires_grad_(), images(SHAPE, 2).requires_grad_()
        first, second = each(a), each(b)
        (first * second).sum().backward()
        results.append([a.grad, b.grad, *[p.grad for p in each.parameters()], *each.buffers()])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@subjects("own basic", "own stage", "fused basic", "fused stage")
@pytest.mark.parametrize("channels_last", [True, False])
def test_output_may_be_changed_in_place(subject, channels_last):
    """An addition does not save its result, so out.mul_(2) after a block works in eager."""
    results = []
    for each in pair(subject):
        x = images(SHAPE, channels_last=channels_last).requires_grad_()
        out = each(x)
        out.mul_(2.0).add_(1.0)
        out.square().sum().backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-3)


@subjects("own basic", "triton basic", "fused stage")
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context, subject):
    """Running statistics move all the same."""
    module, twin = pair(subject)
    with context():
        out, expected = module(images(SHAPE)), twin(images(SHAPE))
    assert not out.requires_grad
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (name, mine), theirs in zip(module.named_buffers(), twin.buffers()):
        torch.testing.assert_close(mine, theirs, msg=name)


@stages
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(subject, reentrant):
    module, _ = pair(subject)
    g = images(SHAPE, 3)
    plain = step(copy.deepcopy(module), images(SHAPE), g)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    found = step(Checkpointed(), images(SHAPE), g)
    for name, value in plain.items():
        if not name.startswith("buffer"):
            assert torch.equal(value, found[name.replace("grad ", "grad inner.")]), name


@every
def test_double_backward(subject):
    """A gradient penalty: the gradient of dx's norm, as eager's."""
    results = []
    for each in pair(subject):
        x = images(SHAPE).requires_grad_()
        (dx,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        dx.square().sum().sqrt().backward()
        results.append([x.grad, *[p.grad for p in each.parameters()]])
    for mine, theirs in zip(*results):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * max(scale, 1.0))


@every
def test_vmap(subject):
    """Of the module, and per-example gradients by functional_call under vmap and grad."""
    batch = images((3, 2, 4, 5, 6), 1)
    outs, grads = [], []
    for each in pair(subject):
        each.eval()
        params = {name: p.detach() for name, p in each.named_parameters()}
        buffers = dict(each.named_buffers())

        def loss(params, x, each=each, buffers=buffers):
            return torch.func.functional_call(each, (params, buffers), (x,)).square().mean()

        outs.append(torch.func.vmap(each)(batch))
        grads.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, batch))
    torch.testing.assert_close(*outs)
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], rtol=1e-3, atol=1e-4, msg=name)


@every
def test_jvp(subject):
    """In evaluation: a norm's counter stops jvp in training, in eager too."""
    module, twin = pair(subject)
    x, tangent = images(SHAPE), images(SHAPE, 1)
    results = []
    for each in (module.eval(), twin.eval()):
        with torch.autograd.forward_ad.dual_level():
            out = each(torch.autograd.forward_ad.make_dual(x, tangent))
            dual = torch.autograd.forward_ad.unpack_dual(out).tangent
        results.append([*torch.func.jvp(each, (x,), (tangent,)), dual])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs)


@stages
def test_functional_call_with_other_parameters(subject):
    module, twin = pair(subject)
    x = images(SHAPE)
    doubled = {name: 2 * value for name, value in module.eval().state_dict().items()}
    found, expected = (
        torch.func.functional_call(each, doubled, (x,)) for each in (module, twin.eval())
    )
    assert not torch.equal(found, module(x))
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * scale)


# --- numbers that are not finite, and no numbers --------------------------------------------------


@subjects(
    "own basic", "own identity", "own stage", "triton mixed-stage",
    "fused basic", "fused norm-act", "fused tuples", "fused wide", "fused stage",
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_nan_and_inf_pass_as_in_eager(subject, training):
    """The same positions of out, dx and gradients are NaN, +Inf and -Inf.

    Of buffers, the same are finite: eager's own running mean of Inf is Inf on a CPU, NaN on a GPU.
    """
    specials = [(float("nan"),), (float("inf"),), (float("-inf"),)]
    if subject.startswith("triton"):  # one in each image
        specials = [sum(specials, ())]
    for values in specials:
        module, twin = pair(subject)
        x = images(SHAPE)
        x[: len(values), 2, 3, 1] = x.new_tensor(values)
        mine, theirs = step(module.train(training), x), step(twin.train(training), x)
        assert mine.keys() == theirs.keys()
        for name in mine:
            a, b = mine[name], theirs[name]
            assert torch.equal(a.isfinite(), b.isfinite()), (values, name)
            if not name.startswith("buffer"):
                assert torch.equal(a.isnan(), b.isnan()), (values, name)
                assert torch.equal(a == torch.inf, b == torch.inf), (values, name)


@subjects("own basic", "fused net")
def test_grad_scaler_skips_the_step_and_halves_the_scale(subject):
    module, _ = pair(subject)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    before = [p.detach().clone() for p in module.parameters()]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        out = module(images(NET_SHAPE if "net" in subject else SHAPE))
    scaler.scale(out.float().square().sum() * 1e4).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters()))


@subjects("own identity", "fused stage")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(subject, training):
    """Whatever eager does: an empty result, or its error."""
    for shape in ((0, 4, 5, 6), (0, 4, 1, 1)):
        outcomes: list[object] = []
        for each in pair(subject):
            try:
                outcomes.append(each.train(training)(images(shape)).shape)
            except (RuntimeError, ValueError) as error:
                outcomes.append(type(error))
        assert outcomes[0] == outcomes[1]
