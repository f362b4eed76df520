"""What ``fuse`` does to a model beside what any unit promises (test_unit_behaviour.py).

The unfused model is the expectation throughout; the accuracy of the numbers is test_fuse.py's
subject, training loops are test_fuse_training.py's.
"""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from resnetv2 import PreActBlock, explain, fuse, unfuse
from tests.support.fuse_checks import (
    chain_calls,
    fuse_if_any,
    fused_copy,
    fused_units,
    training_step,
)
from tests.support.fuse_models import (
    FAMILIES,
    Basic,
    Bottleneck,
    Dropping,
    NormAct,
    OfNormActs,
    OfTuples,
    PlainNet,
    PostActivation,
    tuple_block,
)
from tests.support.processes import python
from tests.support.subjects import FOREIGN, NET_SHAPE, SHAPE, foreign
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    images,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def net_of(block: type | None = None) -> nn.Module:
    torch.manual_seed(0)
    return randomise(PlainNet(block or Basic)).to(DEVICE)


def assert_like(fused: nn.Module, model: nn.Module, x: torch.Tensor, **options) -> None:
    assert_close_steps(training_step(fused, x, **options), training_step(model, x, **options))


# What stays as it was.


def test_everything_of_a_model_stays_the_same_object():
    """Parameters, buffers, children, their order and names; flags, gradients and versions too."""
    model = net_of(tuple_block)
    model(images(NET_SHAPE)).sum().backward()
    model.layers[0].eval()
    model.layers[1][0].body.conv1.conv.weight.requires_grad_(False)

    def described() -> list:
        return [
            [(name, id(m), m.training) for name, m in model.named_modules()],
            [(name, id(p), id(p.grad), p._version, p.requires_grad)
             for name, p in model.named_parameters()],
            [(name, id(b), b._version) for name, b in model.named_buffers()],
            [list(m._modules) + list(m._parameters) + list(m._buffers) for m in model.modules()],
            [n for n, m in model.named_modules() if isinstance(m, OfTuples)],
        ]  # fmt: skip

    before = described()
    generator = torch.get_rng_state()
    assert fuse(model, backend="aten") is model
    assert fused_units(model) == 4
    assert described() == before
    unfuse(model)
    assert described() == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_fuse_runs_no_block():
    """No hook fires, nothing is counted, no buffer moves while a model is being fused."""
    model = net_of()
    seen = []
    for module in model.modules():
        module.register_forward_hook(lambda m, *_: seen.append(m))
    before = {name: b.clone() for name, b in model.named_buffers()}
    fuse(model, backend="aten")
    explain(model)
    assert seen == []
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_classes():
    """A fused block is still one of its class; no name suggests a convolution or a norm."""
    model = net_of(tuple_block)
    types = [type(m) for m in model.modules()]
    leaves = {
        name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    }
    fuse(model, backend="aten")
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), types))
    changed = {n for (n, m), kind in zip(model.named_modules(), types) if type(m) is not kind}
    assert changed
    assert not changed & leaves
    for name in changed:
        kind = type(model.get_submodule(name)).__name__
        assert "Conv" not in kind
        assert "BatchNorm" not in kind
    unfuse(model)
    assert [type(m) for m in model.modules()] == types


class ConvBatchNormBlock(Basic):
    """A class whose own name misleads initialisers."""


def test_class_names_with_conv_and_batch_norm():
    fused = fuse(ConvBatchNormBlock(4, 4), backend="aten")
    assert isinstance(fused, ConvBatchNormBlock)
    assert "Conv" not in type(fused).__name__
    assert "BatchNorm" not in type(fused).__name__
    assert explain(fused).fused[0].class_name == "ConvBatchNormBlock"


def test_initialisers_that_match_class_names_touch_the_same_modules():
    """The DCGAN idiom: model.apply(weights_init)."""

    def names_touched(model: nn.Module) -> list[str]:
        touched: list[nn.Module] = []

        def weights_init(m: nn.Module) -> None:
            name = m.__class__.__name__
            if name.find("Conv") != -1:
                nn.init.normal_(m.weight, 0.0, 0.02)
                touched.append(m)
            elif name.find("BatchNorm") != -1:
                nn.init.normal_(m.weight, 1.0, 0.02)
                nn.init.zeros_(m.bias)
                touched.append(m)

        model.apply(weights_init)
        names = {id(m): name for name, m in model.named_modules()}
        return [names[id(m)] for m in touched]

    model = net_of()
    fused = fused_copy(model)
    torch.manual_seed(3)
    expected = names_touched(model)
    torch.manual_seed(3)
    assert names_touched(fused) == expected
    for a, b in zip(fused.parameters(), model.parameters()):
        assert torch.equal(a, b)


def test_weight_decay_groups():
    """By name, by the type of the module and by dimension."""

    def groups(model: nn.Module) -> list[list[str]]:
        norms = [
            f"{path}.{name}"
            for path, m in model.named_modules()
            if isinstance(m, nn.BatchNorm2d)
            for name, _ in m.named_parameters(recurse=False)
        ]
        exact = [path for path, m in model.named_modules() if type(m) is nn.Conv2d]
        named = [n for n, _ in model.named_parameters() if "bn" in n or n.endswith(".bias")]
        flat = [n for n, p in model.named_parameters() if p.dim() == 1]
        return [norms, exact, named, flat]

    for block in (Basic, tuple_block, lambda i, o, _: OfNormActs(NormAct, i, 3, o)):
        model = PlainNet(block)
        expected = groups(model)
        assert groups(fuse(model, backend="aten")) == expected


def test_an_optimizer_built_before_keeps_working():
    model = net_of()
    fused = copy.deepcopy(model)
    states = []
    for each in (fused, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for seed in range(4):
            if seed == 1 and each is fused:
                fuse(fused, backend="aten")
            if seed == 3 and each is fused:
                unfuse(fused)
            loss = F.cross_entropy(each(images(NET_SHAPE, seed)), torch.tensor([0, 3]).to(DEVICE))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        states.append(each.state_dict())
    for name in states[0]:
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", FOREIGN)
def test_state_dict_loads_both_ways(kind):
    model = foreign(kind)
    fused = fused_copy(model)
    other = {name: value + 1 for name, value in model.state_dict().items()}
    assert list(fused.state_dict()) == list(model.state_dict())
    assert fused.state_dict()._metadata == model.state_dict()._metadata
    fused.load_state_dict(other, strict=True)
    model.load_state_dict(fused.state_dict(), strict=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other[name]), name
    missing = dict(other)
    del missing[next(iter(other))]
    with pytest.raises(RuntimeError, match="Missing key"):
        fused.load_state_dict(missing, strict=True)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_is_unfused_by_itself(how):
    model = fuse(net_of(), backend="aten", memory="invert")
    other = how(model)
    assert type(other) is type(model)
    assert fused_units(other) == 4
    assert chain_calls(other, images(NET_SHAPE)) == chain_calls(model, images(NET_SHAPE)) > 0
    if how is copy.deepcopy:  # a shallow copy has the original's children
        unfuse(other)
        assert fused_units(other) == 0
        assert fused_units(model) == 4


def test_a_saved_model_loads_in_another_process(tmp_path):
    """Where nothing was fused yet; the file refers to the original classes alone."""
    model = fuse(net_of(tuple_block), backend="aten").eval()
    x = images(NET_SHAPE)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        "import torch\n"
        f"model, x, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "from resnetv2 import explain\n"
        "assert len(explain(model).fused) == 4\n"
        "torch.testing.assert_close(model(x), expected)\n"
    )
    python("-c", code)


def test_moving_average_of_a_fused_model():
    """EMA by AveragedModel: deepcopy, then steps of both."""
    model = fuse(net_of(), backend="aten")
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    plain = unfuse(copy.deepcopy(model))
    for name, parameter in model.named_parameters():
        parameter.data.add_(0.1)
        plain.get_parameter(name).data.add_(0.05)
    averaged.update_parameters(model)
    averaged.update_parameters(model)  # the first only copies
    assert chain_calls(averaged, images(NET_SHAPE)) > 0
    averaged.module.load_state_dict(plain.state_dict())
    assert_like(averaged.module, plain, images(NET_SHAPE))


def test_a_norm_aliased_elsewhere_stays_the_same_object():
    model = net_of()
    norm = model.layers[0][0].bn1
    model.first_norm = norm
    model.norms = [norm]
    held = {"norm": norm}
    names = list(model.state_dict())
    fuse(model, backend="aten")
    assert fused_units(model) == 4
    assert model.layers[0][0].bn1 is model.first_norm is model.norms[0] is held["norm"]
    assert list(model.state_dict()) == names
    before = norm.running_mean.clone()
    model(images(NET_SHAPE))
    assert not torch.equal(held["norm"].running_mean, before)


def test_nothing_global_is_patched():
    watched = [nn.Module, nn.Sequential, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, Basic, PlainNet]
    modules = [F, torch, nn.modules.batchnorm, nn.modules.container]
    bystander, copies = net_of(), net_of()
    # PyTorch imports parts of itself at the first call.
    fuse(net_of(), backend="aten")(images(NET_SHAPE)).sum().backward()
    before = [dict(vars(each)) for each in (*watched, *modules)]
    types = [type(m) for m in bystander.modules()]
    fuse(copies, backend="aten")
    copies(images(NET_SHAPE)).sum().backward()
    for each, old in zip((*watched, *modules), before):
        now = dict(vars(each))
        assert now.keys() == old.keys(), each
        assert all(now[name] is old[name] for name in old), each
    assert [type(m) for m in bystander.modules()] == types
    assert type(Basic(4, 4)) is Basic
    assert chain_calls(bystander, images(NET_SHAPE)) == 0


def test_fused_models_do_not_change_each_other():
    first, second, third = net_of(), net_of(), net_of()
    fuse(first, backend="aten", memory="invert")
    fuse(second, backend="aten")
    x = images(NET_SHAPE)
    expected = step(copy.deepcopy(third), x)
    unfuse(first)
    assert fused_units(first) == 0
    assert fused_units(second) == 4
    assert chain_calls(second, x) > 0
    second.layers[0][0].bn1.register_forward_hook(lambda *_: None)
    third_fused = fuse(third, backend="aten")
    assert fused_units(third_fused) == 4
    assert_close_steps(step(third_fused, x), expected)
    assert type(second.layers[1][0]) is type(third.layers[1][0])


def test_models_and_classes_can_be_collected():
    """No table keeps a fused model alive."""
    model = fuse(net_of(), backend="aten")
    model(images(NET_SHAPE)).sum().backward()
    alive = weakref.ref(model.layers[0][0])
    del model
    gc.collect()
    assert alive() is None


def test_fusing_twice_and_unfusing_twice():
    model = net_of()
    types = [type(m) for m in model.modules()]
    fuse(model, backend="aten")
    once = [type(m) for m in model.modules()]
    fuse(model, backend="aten", memory="invert")
    assert [type(m) for m in model.modules()] == once
    assert fused_units(model) == 4
    assert_like(copy.deepcopy(model), net_of(), images(NET_SHAPE))
    assert unfuse(model) is model
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == types
    plain = net_of()
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]
    assert chain_calls(model, images(NET_SHAPE)) == 0
    assert_equal_steps(step(model, images(NET_SHAPE)), step(plain, images(NET_SHAPE)))
    assert fused_units(fuse(model, backend="aten")) == 4


def test_a_model_with_blocks_of_this_library():
    """They run fused already; fuse has nothing to say against them and breaks nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(PreActBlock(4, 4, backend="aten"), Basic(4, 4)).to(DEVICE)
    fused = fused_copy(model)
    assert_like(fused, model, images(SHAPE))
    assert_like(unfuse(fused), model, images(SHAPE))


@pytest.mark.parametrize("model", [None, torch.zeros(1), Basic], ids=["none", "tensor", "class"])
@pytest.mark.parametrize("function", [fuse, unfuse, explain])
def test_what_is_not_a_module_is_refused(function, model):
    with pytest.raises(TypeError, match="Module"):
        function(model)


# Read afresh at every call.


def each_call(change) -> None:
    """Two steps of a fused and an unfused stage, ``change`` applied to both between them."""
    model = foreign("stage")
    fused = fused_copy(model)
    for seed in range(2):
        assert_like(fused, model, images(SHAPE, seed), seed=seed)
        for each in (fused, model):
            torch.manual_seed(9)
            change(each)
            each.zero_grad()
    assert chain_calls(fused, images(SHAPE)) >= 1
    assert_like(fused, model, images(SHAPE, 2), seed=2)


def replace_buffer(stage: nn.Module) -> None:
    norm = stage[1].bn1
    norm.running_mean = torch.full_like(norm.running_mean, 0.5)
    norm.register_buffer("running_var", torch.full_like(norm.running_var, 2.0))


def replace_parameter(stage: nn.Module) -> None:
    weight = stage[1].conv1.weight
    stage[1].conv1.weight = nn.Parameter(torch.randn_like(weight))
    stage[2].bn1.bias = nn.Parameter(torch.ones_like(stage[2].bn1.bias))


CHANGES = {
    "momentum": lambda s: setattr(s[1].bn1, "momentum", 0.7),
    "momentum-0": lambda s: [setattr(m, "momentum", 0.0) for m in s.modules()],
    "momentum-none": lambda s: setattr(s[1].bn2, "momentum", None),
    "eps": lambda s: setattr(s[1].bn2, "eps", 0.5),
    "eval": lambda s: s.eval(),
    "one-norm-eval": lambda s: s[1].bn2.eval(),
    "data-assigned": lambda s: setattr(s[1].conv1.weight, "data", s[1].conv1.weight.data * 2),
    "data-written": lambda s: s[1].bn1.weight.data.mul_(2).add_(1),
    "copied": lambda s: s[1].conv2.weight.data.copy_(torch.randn_like(s[1].conv2.weight)),
    "buffer-replaced": replace_buffer,
    "parameter-replaced": replace_parameter,
    "bias-added": lambda s: setattr(s[1].conv1, "bias", nn.Parameter(torch.ones(4, device=DEVICE))),
    "frozen": lambda s: s[1].requires_grad_(False),
    "statistics-reset": lambda s: s[1].bn1.reset_running_stats(),
    "statistics-not-tracked": lambda s: setattr(s[1].bn1, "track_running_stats", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_read_at_every_call(change):
    each_call(CHANGES[change])


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_geometry_is_read_at_every_call(name):
    model = foreign("basic")
    fused = fused_copy(model)
    value = {"stride": (1, 1), "padding": (2, 2), "dilation": (1, 1)}[name]
    for each in (fused, model):
        setattr(each.conv1, name, value)
        each.shortcut[0].stride = {"stride": (1, 1), "padding": (2, 2)}.get(name, (2, 2))
        each.shortcut[0].padding = (1, 1) if name == "padding" else (0, 0)
    if name == "padding":
        for each in (fused, model):
            each.conv1.stride = (2, 2)
            each.shortcut[0].stride = (2, 2)
    assert_like(fused, model, images(SHAPE))


def test_dtype_and_device_moves():
    """model.double(), model.to(bfloat16), to_empty: the parameters' data changes under it."""
    for dtype in (torch.float64, torch.bfloat16):
        model = foreign("stage")
        fused = fused_copy(model).to(dtype)
        model.to(dtype)
        x = images(SHAPE, dtype=dtype)
        found, expected = fused(x), model(x)
        assert found.dtype == expected.dtype == dtype
        rtol = 1e-9 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def test_memory_format_of_weights():
    model = foreign("stage").to(memory_format=torch.channels_last)
    fused = fused_copy(foreign("stage")).to(memory_format=torch.channels_last)
    for channels_last in (True, False):
        x = images(SHAPE, channels_last=channels_last)
        assert_like(fused, model, x)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert fused(x).is_contiguous(memory_format=memory_format)
        model(x)


# The children are run where they must be, and only there.


def test_explain_names_the_hook():
    fused = fused_copy(foreign("basic"))
    handle = fused.conv1.register_forward_hook(lambda *_: None)
    (row,) = explain(fused).blocks
    assert not row.fused
    assert "hook" in row.reason
    handle.remove()
    assert explain(fused).blocks[0].fused


def test_hook_on_the_block_and_on_the_model():
    """Feature extraction: hooks on whole blocks fire and see what eager's see."""
    model = net_of()
    fused = fused_copy(model)
    found = []
    for each in (fused, model):
        features: dict[str, torch.Tensor] = {}
        for path in ("layers", "layers.0", "layers.0.1", "layers.1.0", ""):
            each.get_submodule(path).register_forward_hook(
                lambda _, args, out, p=path, f=features: f.update(
                    {p: out.detach(), p + "<": args[0]}
                )
            )
        each(images(NET_SHAPE))
        found.append({n: t.detach() for n, t in features.items()})
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-4, atol=1e-5)


def test_fuse_after_pruning_and_parametrization():
    for how in (
        lambda m: prune.random_unstructured(m, "weight", 0.3),
        parametrizations.weight_norm,
    ):
        model, fused = foreign("basic"), foreign("basic")
        for each in (fused, model):
            torch.manual_seed(4)
            how(each.conv1)
        assert_like(fuse_if_any(fused), model, images(SHAPE))


def test_a_deleted_or_added_child():
    """hasattr decides whether there is a projection."""
    model = foreign("identity")
    fused = fused_copy(model)
    for each in (fused, model):
        torch.manual_seed(6)
        each.shortcut = nn.Sequential(nn.Conv2d(4, 4, 1)).to(DEVICE)
    assert_like(fused, model, images(SHAPE))
    for each in (fused, model):
        del each.shortcut
    assert_like(fused, model, images(SHAPE))
    assert chain_calls(fused, images(SHAPE)) == 1


def test_a_child_that_was_none():
    """None is no child, but decides as much as one; and None in a child's place."""
    torch.manual_seed(0)
    for start, now in ((None, nn.Conv2d(8, 8, 1)), (nn.Conv2d(8, 8, 1), None)):
        model = randomise(Bottleneck(8, 2)).to(DEVICE)
        model.downsample = None if start is None else start.to(DEVICE)
        fused = fused_copy(model)
        assert chain_calls(fused, images((3, 8, 5, 6))) == 1
        for each in (fused, model):
            each.downsample = copy.deepcopy(now).to(DEVICE) if now is not None else None
        assert_like(fused, model, images((3, 8, 5, 6)))


# Autograd.


def test_unused_parameters_keep_no_gradient():
    """A child that the forward does not use, and a block whose output is not used."""
    model = nn.ModuleList([foreign("basic"), foreign("basic")])
    model[0].unused = nn.Conv2d(4, 4, 1).to(DEVICE)
    fused = fused_copy(model)
    for each in (fused, model):
        out = each[0](images(SHAPE))
        each[1](images(SHAPE))
        out.sum().backward()
    for (name, a), b in zip(fused.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None), name


@pytest.mark.parametrize("kind", ["basic", "norm-act", "tuples", "wide", "stage"])
def test_input_gradients_in_evaluation(kind):
    """Adversarial examples: parameters frozen, running statistics, gradient of the input alone."""
    model = foreign(kind).eval().requires_grad_(False)
    fused = fused_copy(model)
    grads = []
    for each in (fused, model):
        x = images(SHAPE).requires_grad_()
        out = each(x)
        (dx,) = torch.autograd.grad(out.square().sum(), x)
        grads.append(dx)
        assert all(p.grad is None for p in each.parameters())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-3)
    assert chain_calls(fused, images(SHAPE)) == 1


# Numbers.


def test_wrong_input_is_an_error_and_moves_no_statistics():
    """Batches are counted before they are looked at, unfused too."""
    fused = fused_copy(foreign("stage"))
    before = {name: b.clone() for name, b in fused.named_buffers() if "running" in name}
    for shape in ((3, 5, 5, 6), (4, 5), (1, 4, 1, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            fused(images(shape))
        for name, buffer in before.items():
            assert torch.equal(fused.get_buffer(name), buffer), (shape, name)
    assert fused.eval()(images((1, 4, 1, 1))).shape == (1, 4, 1, 1)


def test_the_same_bits_every_run():
    runs = []
    for _ in range(2):
        model = fuse(net_of(tuple_block), backend="aten", memory="invert")
        runs.append([training_step(model, images(NET_SHAPE, seed), seed=seed) for seed in range(2)])
    for a, b in zip(*runs):
        assert_equal_steps(a, b)


# explain.


def test_explain_lists_every_block_with_its_class_and_kind():
    model = fuse(net_of(), backend="aten")
    report = explain(model)
    rows = {row.path: row for row in report.blocks}
    assert list(rows) == ["layers.0.0", "layers.0.1", "layers.1.0", "layers.1.1"]
    assert all(row.fused and row.class_name == "Basic" and not row.reason for row in rows.values())
    assert rows["layers.0.0"].kind == "basic, identity"
    assert rows["layers.1.0"].kind == "basic, projection from preact"
    assert list(report.fused) == list(report.blocks)
    text = str(report)
    for word in ("layers.0.0", "layers.1.0", "Basic", "basic, identity", "projection from preact"):
        assert word in text


def test_explain_says_why_not():
    torch.manual_seed(0)
    model = nn.Sequential(
        Basic(4, 4), PostActivation(4, 4), FAMILIES["squeeze-excitation"].build(), Dropping(4, 0.3)
    )
    report = explain(fuse(model, backend="aten"))
    rows = {row.path: row for row in report.blocks}
    assert rows["0"].fused
    assert not rows["1"].fused
    assert rows["1"].class_name == "PostActivation"
    assert all(row.reason for row in report.blocks if not row.fused)
    text = str(report)
    for row in report.blocks:
        assert row.reason in text


def test_explain_changes_nothing_and_finds_the_same_before_fuse():
    model = net_of()
    types = [type(m) for m in model.modules()]
    state = {
        name: (id(v), v.clone()) for name, v in [*model.named_parameters(), *model.named_buffers()]
    }
    before = explain(model)
    assert [type(m) for m in model.modules()] == types
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        assert id(value) == state[name][0]
        assert torch.equal(value, state[name][1])
    assert len(before.fused) == 0
    assert all(row.reason for row in before.blocks)
    fused = explain(fuse(model, backend="aten"))
    assert [row.path for row in before.blocks] == [row.path for row in fused.blocks]
    assert [row.kind for row in before.blocks] == [row.kind for row in fused.blocks]


def test_explain_is_of_now():
    """A dropout's mode and a replaced child change what is said of a block."""
    model = fuse(nn.Sequential(Dropping(4, 0.3), Basic(4, 4)), backend="aten")
    assert [row.fused for row in explain(model.eval()).blocks] == [True, True]
    assert explain(model.train()).blocks[1].fused
    model[1].bn1 = nn.GroupNorm(2, 4)
    row = explain(model).blocks[1]
    assert not row.fused
    assert "bn1" in row.reason or "norm" in row.reason


def test_representation_is_that_of_the_block():
    model = net_of(lambda i, o, s: Bottleneck(i, o // 4, s))
    fused = fused_copy(model)
    mine, theirs = str(fused), str(model)
    assert len(mine.splitlines()) == len(theirs.splitlines())
    assert "(conv2): Conv2d" in mine
