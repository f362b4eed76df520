"""``fuse`` on models from packages that know nothing of this one: timm's and pytorchcv's."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnetv2 import explain, fuse, unfuse
from resnetv2.data._torchvision import import_torchvision
from tests.support.fuse_checks import chain_calls, check_fused, fuse_if_any, fused_copy, needs
from tests.support.yardstick import DEVICE, assert_close_steps, images, randomise, step

pytestmark = pytest.mark.usefixtures("one_thread")


def from_timm(name: str, **options) -> nn.Module:
    import_torchvision()  # which timm imports
    import timm

    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options).to(DEVICE)


def from_pytorchcv(family: str, name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    module = importlib.import_module(f"pytorchcv.models.{family}")
    return getattr(module, name)(**options).to(DEVICE)


# Small nets of the packages' own builders: the blocks are the point, not the number of channels.
TIMM = {"layers": (2, 2), "channels": (16, 24), "stem_chs": 8}


def assert_trains_like(fused: nn.Module, model: nn.Module, shape: tuple[int, ...]) -> None:
    """A step in training and one in evaluation; norms first given weights that matter."""
    randomise(model)
    fused.load_state_dict(model.state_dict())
    for training in (True, False):
        mine = step(fused.train(training), images(shape))
        theirs = step(model.train(training), images(shape))
        assert_close_steps(mine, theirs, rtol=1e-3, atol=1e-3)


def compare(model: nn.Module, units: int, shape: tuple[int, ...], *, chains: int) -> None:
    """units: blocks fused. chains: operator calls in evaluation."""
    fused = fused_copy(model)
    report = explain(fused)
    assert len(report.fused) == units, report
    assert chain_calls(fused.eval(), images(shape)) == chains
    assert_trains_like(fused, model, shape)
    names = [name for name, _ in unfuse(fused).named_modules()]
    assert names == [name for name, _ in model.named_modules()]
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]


@needs("timm")
@pytest.mark.parametrize(
    ("name", "units"),
    [("resnetv2_50", 4), ("resnetv2_18", 4)],
)
def test_timm(name, units):
    """Norm and activation are one module; all units but none are fused, two stages two chains."""
    model = from_timm(name, **TIMM)
    compare(model, units, (2, 3, 32, 32), chains=2)


@needs("timm")
def test_timm_resnetv2_50_whole():
    """The model of the README: every unit fused, and a step in training."""
    model = from_timm("resnetv2_50")
    fused = fuse(copy.deepcopy(model), backend="aten")
    rows = explain(fused).fused
    assert len(rows) == 16
    assert sum("projection from preact" in row.kind for row in rows) == 4
    assert all(row.class_name == "PreActBottleneck" for row in rows)
    x = images((2, 3, 32, 32))
    for each in (fused, model):
        F.cross_entropy(each(x), torch.tensor([0, 1], device=DEVICE)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in fused.parameters())
    torch.testing.assert_close(fused.eval()(x), model.eval()(x), rtol=1e-3, atol=1e-4)


@needs("timm")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("resnetv2_50d", {}, id="average-pooled-shortcut"),
        pytest.param("resnetv2_50", {"drop_path_rate": 0.5}, id="stochastic-depth"),
    ],
)
def test_timm_with_eager_pieces(name, options):
    """What needs a piece in eager computes the same, whatever of it is fused."""
    model = from_timm(name, **TIMM, **options)
    fused = fused_copy(model)
    assert len(explain(fused).blocks) >= 4
    randomise(model)
    fused.load_state_dict(model.state_dict())
    for training in (True, False):
        steps = []
        for each in (fused, model):
            torch.manual_seed(3)
            steps.append(step(each.train(training), images((2, 3, 32, 32))))
        assert_close_steps(*steps, rtol=1e-3, atol=1e-3)
    assert chain_calls(fused.eval(), images((2, 3, 32, 32))) >= 1


@needs("timm")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_timm_bit(training):
    """BiT: group norms with an activation in them, and weights that are standardised."""
    import_torchvision()
    from timm.models.resnetv2 import ResNetV2

    torch.manual_seed(0)
    # Its norms take 32 groups, of the inner widths too.
    sizes = {"layers": (1, 2), "channels": (128, 256), "stem_chs": 32, "num_classes": 5}
    model = randomise(ResNetV2(stem_type="fixed", **sizes)).to(DEVICE)
    fused = check_fused(model, (2, 3, 32, 32), training=training, eager_draws=2)
    assert len(explain(fused).fused) == 3
    assert chain_calls(fused, images((2, 3, 32, 32))) == 2


@needs("timm")
def test_timm_bit_whole():
    """All blocks of a published net, in a chain a stage; in float64, where no rounding hides."""
    model = from_timm("resnetv2_50x1_bit").double()
    fused = fuse(copy.deepcopy(model), backend="aten")
    rows = explain(fused).fused
    assert len(rows) == 16
    assert all("group norms, computed weights" in row.kind for row in rows)
    x = images((2, 3, 32, 32)).double()
    assert chain_calls(fused.eval(), x) == 4
    steps = [step(each.train(), x) for each in (fused, model)]
    assert_close_steps(*steps, rtol=1e-9, atol=1e-9)
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in model.modules()]


@needs("timm")
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_050"])
def test_timm_post_activation_is_left_alone(name):
    model = from_timm(name)
    fused = fuse_if_any(copy.deepcopy(model))
    assert len(explain(fused).fused) == 0
    assert [type(m) for m in fused.modules()] == [type(m) for m in model.modules()]
    x = images((1, 3, 32, 32))
    assert torch.equal(fused.eval()(x), model.eval()(x))


@needs("pytorchcv")
@pytest.mark.parametrize(
    ("family", "name", "units"),
    [
        ("preresnet_cifar", "preresnet20_cifar10", 9),
        ("preresnet_cifar", "preresnet164bn_cifar10", 54),
    ],
)
def test_pytorchcv(family, name, units):
    """Children return tuples; the stages are Sequentials inside of one, so they are one chain.

    Rounding grows in so many layers, in eager too: it is the yardstick.
    """
    model = randomise(from_pytorchcv(family, name))
    for training in (True, False):
        fused = check_fused(model, (2, 3, 32, 32), training=training, eager_draws=2)
        assert len(explain(fused).fused) == units
        assert chain_calls(fused.eval(), images((2, 3, 32, 32))) == 1


@needs("pytorchcv")
@pytest.mark.parametrize(
    ("family", "build", "units"),
    [
        pytest.param(
            "wrn_cifar",
            lambda m: m.CIFARWRN([[4, 4], [8, 8]], 4, num_classes=5, in_size=(16, 16)),
            4,
            id="wide",
        ),
        pytest.param(
            "preresnet",
            lambda m: m.PreResNet([[16, 16], [32, 32]], 8, True, False, num_classes=5),
            4,
            id="stride-on-3x3",
        ),
        pytest.param(
            "preresnet",
            lambda m: m.PreResNet([[16, 16], [32, 32]], 8, True, True, num_classes=5),
            4,
            id="stride-on-1x1",
        ),
    ],
)
def test_pytorchcv_small(family, build, units):
    torch.manual_seed(0)
    module = importlib.import_module(f"pytorchcv.models.{family}")
    model = build(module).to(DEVICE)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    fused = fused_copy(model)
    assert len(explain(fused).fused) == units, explain(fused)
    assert_trains_like(fused, model, (2, 3, 32, 32))


@needs("pytorchcv")
@pytest.mark.parametrize(
    ("family", "name"),
    [("sepreresnet_cifar", "sepreresnet20_cifar10"), ("pyramidnet_cifar", "PyrUnit")],
)
def test_pytorchcv_others(family, name):
    """Squeeze-excitation in each unit, and units that begin without a ReLU."""
    if name == "PyrUnit":
        model = from_pytorchcv(family.removesuffix("_cifar"), name, in_channels=8, out_channels=12,
                               stride=2, bottleneck=False)  # fmt: skip
        shape: tuple[int, ...] = (2, 8, 8, 8)
    else:
        model, shape = from_pytorchcv(family, name), (2, 3, 32, 32)
    fused = fused_copy(model)
    assert_trains_like(fused, model, shape)
    if name == "PyrUnit":
        assert len(explain(fused).fused) == 0
    assert all(row.fused or row.reason for row in explain(fused).blocks)


@needs("pytorchcv")
def test_pytorchcv_1001_layers():
    """All 333 units in one chain, fused in a moment; a training step with finite gradients."""
    model = from_pytorchcv("preresnet_cifar", "preresnet1001_cifar10")
    names = list(model.state_dict())
    fuse(model, backend="aten", memory="invert")
    report = explain(model)
    assert len(report.fused) == 333
    assert len(report.blocks) == 333
    assert len(str(report).splitlines()) < 40
    assert list(model.state_dict()) == names
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loss = F.cross_entropy(model(images((2, 3, 8, 8))), torch.tensor([0, 1], device=DEVICE))
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    optimizer.step()
    assert chain_calls(model, images((2, 3, 8, 8))) == 1


@needs("timm")
def test_readme_prints_what_explain_prints():
    """The README's five lines are run, and the table under them is their output."""
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## Fuse a model that somebody else wrote\n")[1].split("\n## ")[0]
    code, shown = re.findall(r"^```\w*\n(.*?)^```$", section, flags=re.MULTILINE | re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == shown
