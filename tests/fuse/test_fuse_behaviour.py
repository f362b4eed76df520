"""A fused model behaves, in everything a training script does to it, like the model it was.

The unfused model is the expectation throughout; the accuracy of the numbers is test_fuse.py's
subject, training loops are test_fuse_training.py's.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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
    SqueezeExcite,
    Wide,
    tuple_block,
)
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    images,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 4, 5, 6)
NET_SHAPE = (2, 3, 8, 8)


def block_of(out_channels: int = 8, stride: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return randomise(Basic(4, out_channels, stride)).to(DEVICE)


def stage_of(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return randomise(nn.Sequential(*[Basic(4, 4) for _ in range(count)])).to(DEVICE)


def net_of(block: type | None = None) -> nn.Module:
    torch.manual_seed(0)
    return randomise(PlainNet(block or Basic)).to(DEVICE)


def norm_act_block() -> nn.Module:
    torch.manual_seed(0)
    return randomise(OfNormActs(NormAct, 4, 3, 8)).to(DEVICE)


def tuples_of() -> nn.Module:
    torch.manual_seed(0)
    return randomise(OfTuples(4, 8, 2, True)).to(DEVICE)


def wide_of() -> nn.Module:
    torch.manual_seed(0)
    return randomise(Wide(4, 8, 2, activate_first=False)).to(DEVICE)


MAKERS = [block_of, norm_act_block, tuples_of, wide_of, stage_of]


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


@pytest.mark.parametrize("make", [*MAKERS, net_of])
def test_state_dict_loads_both_ways(make):
    model = make()
    fused = fused_copy(make())
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


def round_trip(how: str, model: nn.Module) -> nn.Module:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "copy":
        return copy.copy(model)
    if how == "pickle":
        return pickle.loads(pickle.dumps(model))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", ["deepcopy", "copy", "pickle", "torch.save"])
@pytest.mark.parametrize("make", [*MAKERS, net_of])
def test_copies_are_fused_and_compute_the_same(make, how):
    model = fuse(make(), backend="aten", memory="invert")
    shape = NET_SHAPE if make is net_of else SHAPE
    other = round_trip(how, model)
    assert type(other) is type(model)
    assert fused_units(other) == fused_units(model) > 0
    assert chain_calls(other, images(shape)) == chain_calls(model, images(shape)) > 0
    if how == "copy":  # it shares parameters and children with the original
        return
    assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
    assert_equal_steps(step(other, images(shape)), step(model, images(shape)))
    unfuse(other)
    assert fused_units(other) == 0
    assert fused_units(model) > 0


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
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


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
    model = stage_of()
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
    model = block_of()
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
        model = stage_of()
        fused = fused_copy(model).to(dtype)
        model.to(dtype)
        x = images(SHAPE, dtype=dtype)
        found, expected = fused(x), model(x)
        assert found.dtype == expected.dtype == dtype
        rtol = 1e-9 if dtype == torch.float64 else 0.1
        torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)


def test_memory_format_of_weights():
    model = stage_of().to(memory_format=torch.channels_last)
    fused = fused_copy(stage_of()).to(memory_format=torch.channels_last)
    for channels_last in (True, False):
        x = images(SHAPE, channels_last=channels_last)
        assert_like(fused, model, x)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert fused(x).is_contiguous(memory_format=memory_format)
        model(x)


# The children are run where they must be, and only there.


LEAVES = {
    "bn1": (block_of, "bn1"),
    "conv1": (block_of, "conv1"),
    "bn2": (block_of, "bn2"),
    "conv2": (wide_of, "conv_b"),
    "shortcut": (block_of, "shortcut"),
    "projection": (block_of, "shortcut.0"),
    "norm-with-act": (norm_act_block, "norm2"),
    "act-of-a-norm": (norm_act_block, "norm2.act"),
    "identity": (norm_act_block, "drop_path"),
    "body": (tuples_of, "body"),
    "layer": (tuples_of, "body.conv2"),
    "leaf-of-a-layer": (tuples_of, "body.conv2.conv"),
    "act-of-a-layer": (tuples_of, "body.conv1.activ"),
    "identity-conv": (tuples_of, "identity_conv"),
    "act": (wide_of, "act_a"),
}
HOOKS = {
    "pre": "register_forward_pre_hook",
    "forward": "register_forward_hook",
    "backward": "register_full_backward_hook",
    "backward-pre": "register_full_backward_pre_hook",
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", LEAVES)
def test_hooks_on_children_fire(where, kind):
    """As often as in the unfused block; removed, the block is fused again."""
    make, path = LEAVES[where]
    if kind.startswith("backward"):
        in_place_off = [m for m in make().modules() if getattr(m, "inplace", False)]
        if in_place_off:
            make = not_in_place(make)
    model = make()
    fused = fused_copy(model)
    x = images(SHAPE)
    assert chain_calls(fused, x) == 1
    counts = []
    handles = []
    steps = []
    for each in (fused, model):
        seen: list[str] = []
        handle = getattr(each.get_submodule(path), HOOKS[kind])(
            lambda *_, s=seen: s.append("called")
        )
        handles.append(handle)
        steps.append(training_step(each, x))
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
    assert_close_steps(*steps)
    for handle in handles:
        handle.remove()
    assert chain_calls(fused, x) == 1
    assert fused_units(fused) == 1
    assert_like(fused, model, x)


def not_in_place(make):
    """Backward hooks and in-place activations exclude each other, in eager too."""

    def made() -> nn.Module:
        model = make()
        for module in model.modules():
            if hasattr(module, "inplace"):
                module.inplace = False
        return model

    return made


def test_a_hook_that_changes_its_output_counts():
    for path in ("conv1", "bn2", "shortcut.0"):
        model = block_of().eval()
        fused = fused_copy(model)
        for each in (fused, model):
            each.get_submodule(path).register_forward_hook(lambda _, __, out: out * 0.5)
        assert_like(fused, model, images(SHAPE))


def test_explain_names_the_hook():
    fused = fused_copy(block_of())
    handle = fused.conv1.register_forward_hook(lambda *_: None)
    (row,) = explain(fused).blocks
    assert not row.fused
    assert "hook" in row.reason
    handle.remove()
    assert explain(fused).blocks[0].fused


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("where", ["0", "1", "2", "1.conv1", "2.bn2"])
def test_hooks_inside_a_chain_fire(where, kind):
    """The Sequential runs that block alone, the others still as chains."""
    model = stage_of()
    fused = fused_copy(model)
    seen: list[str] = []
    target = fused.get_submodule(where)
    handle = getattr(target, HOOKS[kind])(lambda *_: seen.append(where))
    assert_like(fused, model, images(SHAPE))
    assert seen == [where]
    handle.remove()
    assert chain_calls(fused, images(SHAPE)) == 1


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


def test_global_hooks_see_the_children():
    fused = fused_copy(block_of())
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        fused(images(SHAPE))
    finally:
        handle.remove()
    assert fused.conv1 in seen
    assert fused in seen
    assert chain_calls(fused, images(SHAPE)) == 1


@pytest.mark.parametrize("where", ["", "0", "0.conv1", "1.bn1"])
def test_forward_put_on_an_instance_is_called(where):
    """How adapters and offloading libraries wrap a module."""
    fused = fused_copy(stage_of().eval())
    x = images(SHAPE)
    target = fused.get_submodule(where)
    original, seen = target.forward, []
    expected = fused(x)

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(where)
        return original(x) * 0.5

    target.forward = forward
    assert not torch.allclose(fused(x), expected)
    assert seen == [where]
    del target.forward
    assert torch.equal(fused(x), expected)


@pytest.mark.parametrize("path", ["conv1", "conv2", "bn1", "shortcut.0"])
def test_pruning(path):
    model = block_of()
    fused = fused_copy(model)
    for each in (fused, model):
        prune.l1_unstructured(each.get_submodule(path), "weight", amount=0.5)
    assert chain_calls(fused, images(SHAPE)) == 0
    mine, theirs = training_step(fused, images(SHAPE)), training_step(model, images(SHAPE))
    assert_close_steps(mine, theirs)
    mask = fused.get_submodule(path).weight_mask
    assert (mine[f"grad {path}.weight_orig"][mask == 0] == 0).all()
    for each in (fused, model):
        prune.remove(each.get_submodule(path), "weight")
    assert chain_calls(fused, images(SHAPE)) == 1
    assert_like(fused, model, images(SHAPE))


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("path", ["conv2", "shortcut.0"])
def test_parametrizations(how, path):
    model = block_of()
    fused = fused_copy(model)
    for each in (fused, model):
        torch.manual_seed(4)
        how(each.get_submodule(path))
        assert parametrize.is_parametrized(each.get_submodule(path))
    assert chain_calls(fused, images(SHAPE)) == 0
    assert_like(fused, model, images(SHAPE))
    for each in (fused, model):
        parametrize.remove_parametrizations(each.get_submodule(path), "weight")
    assert chain_calls(fused, images(SHAPE)) == 1
    assert_like(fused, model, images(SHAPE))


def test_fuse_after_pruning_and_parametrization():
    for how in (
        lambda m: prune.random_unstructured(m, "weight", 0.3),
        parametrizations.weight_norm,
    ):
        model, fused = block_of(), block_of()
        for each in (fused, model):
            torch.manual_seed(4)
            how(each.conv1)
        assert_like(fuse_if_any(fused), model, images(SHAPE))


REPLACEMENTS = {
    "group-norm": lambda b: setattr(b, "bn1", nn.GroupNorm(2, 4)),
    "no-norm": lambda b: setattr(b, "bn2", nn.Identity()),
    "instance-norm": lambda b: setattr(b, "bn2", nn.InstanceNorm2d(8)),
    "other-norm": lambda b: setattr(b, "bn2", nn.BatchNorm2d(8, eps=0.1)),
    "norm-with-act": lambda b: setattr(b, "bn1", NormAct(4, nn.SiLU())),
    "other-conv": lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, 2, 1)),
    "grouped-conv": lambda b: setattr(b, "conv1", nn.Conv2d(4, 8, 3, 2, 1, groups=2)),
    "wider-inside": lambda b: [
        setattr(b, "conv1", nn.Conv2d(4, 6, 3, 2, 1)),
        setattr(b, "bn2", nn.BatchNorm2d(6)),
        setattr(b, "conv2", nn.Conv2d(6, 8, 3, 1, 1)),
    ],
    "reflecting": lambda b: setattr(b, "conv2", nn.Conv2d(8, 8, 3, 1, 1, padding_mode="reflect")),
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


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replaced_children(name):
    """Whatever is put in a child's place is what runs; the old child back, it is fused again."""
    model = block_of()
    fused = fused_copy(model)
    before = dict(fused._modules), list(fused.shortcut)
    for each in (fused, model):
        torch.manual_seed(5)
        REPLACEMENTS[name](each)
        each.to(DEVICE)
    assert_like(fused, model, images(SHAPE))
    for path, child in before[0].items():
        setattr(fused, path, child)
    while len(fused.shortcut) > len(before[1]):
        del fused.shortcut[-1]
    assert chain_calls(fused, images(SHAPE)) == 1


def test_replaced_activation():
    for act in (nn.Tanh(), nn.SiLU(), nn.PReLU(), nn.ReLU6()):
        model = wide_of()
        fused = fused_copy(model)
        for each in (fused, model):
            each.act_a = copy.deepcopy(act).to(DEVICE)
        assert_like(fused, model, images(SHAPE))


def test_a_deleted_or_added_child():
    """hasattr decides whether there is a projection."""
    model = block_of(4, 1)
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


def test_a_block_replaced_in_a_chain():
    model = stage_of()
    fused = fused_copy(model)
    for each in (fused, model):
        torch.manual_seed(7)
        each[1] = randomise(PostActivation(4, 4)).to(DEVICE)
    assert_like(fused, model, images(SHAPE))
    assert chain_calls(fused, images(SHAPE)) == 2


@pytest.mark.parametrize("when", ["before", "after"])
def test_sync_batch_norm(when):
    """In one process, without a process group, it computes what BatchNorm2d does."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net_of())
    fused = net_of()
    if when == "before":
        fused = fuse_if_any(nn.SyncBatchNorm.convert_sync_batchnorm(fused))
    else:
        fuse(fused, backend="aten")
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    assert type(fused.layers[0][0].bn1) is nn.SyncBatchNorm
    assert list(fused.state_dict()) == list(model.state_dict())
    assert chain_calls(fused, images(NET_SHAPE)) == 1
    for training in (True, False):
        assert_like(fused.train(training), model.train(training), images(NET_SHAPE))


# Autograd.


def subsets(block: nn.Module) -> list[tuple[str, ...]]:
    names = [name for name, _ in block.named_parameters()]
    children = {name.rsplit(".", 1)[0] for name in names}
    result: list[tuple[str, ...]] = [(), tuple(names), *[(name,) for name in names]]
    return result + [tuple(n for n in names if n.startswith(child)) for child in sorted(children)]


@pytest.mark.parametrize("x_grad", [True, False], ids=["x-needs-grad", "x-without-grad"])
@pytest.mark.parametrize("make", [block_of, tuples_of, wide_of])
def test_grad_is_none_where_eager_leaves_it_none(make, x_grad):
    model = make()
    fused = fused_copy(model)
    for names in subsets(model):
        found = []
        for each in (fused, model):
            each.zero_grad(set_to_none=True)
            for name, parameter in each.named_parameters():
                parameter.requires_grad_(name in names)
            x = images(SHAPE).requires_grad_(x_grad)
            out = each(x)
            assert out.requires_grad == (x_grad or bool(names))
            if out.requires_grad:
                out.backward(images(out.shape, 3))
            grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
            found.append({**grads, **({"x": x.grad} if x.grad is not None else {})})
        assert found[0].keys() == found[1].keys(), names
        for name in found[0]:
            torch.testing.assert_close(
                found[0][name], found[1][name], rtol=1e-4, atol=1e-3, msg=f"{names} {name}"
            )


def test_unused_parameters_keep_no_gradient():
    """A child that the forward does not use, and a block whose output is not used."""
    model = nn.ModuleList([block_of(), block_of()])
    model[0].unused = nn.Conv2d(4, 4, 1).to(DEVICE)
    fused = fused_copy(model)
    for each in (fused, model):
        out = each[0](images(SHAPE))
        each[1](images(SHAPE))
        out.sum().backward()
    for (name, a), b in zip(fused.named_parameters(), model.parameters()):
        assert (a.grad is None) == (b.grad is None), name


@pytest.mark.parametrize("make", MAKERS)
def test_input_gradients_in_evaluation(make):
    """Adversarial examples: parameters frozen, running statistics, gradient of the input alone."""
    model = make().eval().requires_grad_(False)
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


@pytest.mark.parametrize("memory", ["recompute", "invert"])
def test_two_forwards_before_one_backward(memory):
    model = stage_of()
    fused = fused_copy(model, memory=memory)
    results = []
    for each in (fused, model):
        a, b = images(SHAPE, 1).requires_grad_(), images(SHAPE, 2).requires_grad_()
        first, second = each(a), each(b)
        (first * second).sum().backward()
        results.append([a.grad, b.grad, *[p.grad for p in each.parameters()], *each.buffers()])
    for mine, theirs in zip(*results):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("make", MAKERS)
def test_double_backward(make):
    """A gradient penalty."""
    model = make()
    fused = fused_copy(model)
    results = []
    for each in (fused, model):
        x = images(SHAPE).requires_grad_()
        (dx,) = torch.autograd.grad(each(x).square().mean(), x, create_graph=True)
        dx.square().sum().backward()
        results.append([x.grad, *[p.grad for p in each.parameters() if p.grad is not None]])
    assert len(results[0]) == len(results[1])
    for mine, theirs in zip(*results):
        scale = max(float(theirs.abs().max()), 1e-2)
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("make", MAKERS)
def test_vmap(make):
    """Per-example gradients, by functional_call under vmap and grad."""
    model = make().eval()
    fused = fused_copy(model)
    x = images((3, 2, 4, 5, 6), 1)
    results = []
    for each in (fused, model):
        params = {name: p.detach() for name, p in each.named_parameters()}
        buffers = dict(each.named_buffers())

        def loss(params, x, each=each, buffers=buffers):
            return torch.func.functional_call(each, (params, buffers), (x,)).square().mean()

        results.append(torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x))
    for name in results[0]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-3, atol=1e-4, msg=name
        )


@pytest.mark.parametrize("make", MAKERS)
def test_jvp(make):
    """In evaluation: a norm's counter stops jvp in training, unfused too."""
    model = make().eval()
    fused = fused_copy(model)
    x, t = images(SHAPE), images(SHAPE, 1)
    for a, b in zip(torch.func.jvp(fused, (x,), (t,)), torch.func.jvp(model, (x,), (t,))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    results = []
    for each in (fused, model):
        with torch.autograd.forward_ad.dual_level():
            out = each(torch.autograd.forward_ad.make_dual(x, t))
            results.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_functional_call_with_other_parameters():
    model = net_of()
    fused = fused_copy(model)
    params = {name: p.detach() * 0.9 for name, p in model.named_parameters()}
    outs = [torch.func.functional_call(m, params, (images(NET_SHAPE),)) for m in (fused, model)]
    torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    model = stage_of()
    fused = fused_copy(model)
    with context():
        out, expected = fused(images(SHAPE)), model(images(SHAPE))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(fused.named_buffers(), model.buffers()):
        torch.testing.assert_close(a, b, msg=name)


def test_checkpoint_around_a_fused_block():
    model = stage_of().eval()
    fused = fused_copy(model)
    results = []
    for each in (fused, model):
        x = images(SHAPE).requires_grad_()
        out = torch.utils.checkpoint.checkpoint(each, x, use_reentrant=False)
        out.sum().backward()
        results.append([out.detach(), x.grad])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


# Numbers.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("make", MAKERS)
def test_nan_and_inf_pass_as_in_eager(make, value):
    model = make()
    fused = fused_copy(model)
    x = images(SHAPE)
    x[1, 2, 3, 1] = value
    mine, theirs = step(fused, x), step(model, x)
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name].isfinite(), theirs[name].isfinite()), name


def test_grad_scaler_sees_inf():
    model = fuse(net_of(), backend="aten")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**24)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        loss = model(images(NET_SHAPE)).float().square().sum() * 1e4
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**23
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_wrong_input_is_an_error_and_moves_no_statistics():
    """Batches are counted before they are looked at, unfused too."""
    fused = fused_copy(stage_of())
    before = {name: b.clone() for name, b in fused.named_buffers() if "running" in name}
    for shape in ((3, 5, 5, 6), (4, 5), (1, 4, 1, 1)):
        with pytest.raises((ValueError, RuntimeError)):
            fused(images(shape))
        for name, buffer in before.items():
            assert torch.equal(fused.get_buffer(name), buffer), (shape, name)
    assert fused.eval()(images((1, 4, 1, 1))).shape == (1, 4, 1, 1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_empty_batch(training):
    model = stage_of().train(training)
    fused = fused_copy(model)
    outcomes = []
    for each in (fused, model):
        try:
            outcomes.append(each(images((0, 4, 5, 6))).shape)
        except (RuntimeError, ValueError) as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


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
