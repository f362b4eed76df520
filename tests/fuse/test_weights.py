"""Weights of other code bases load by name, and then the nets give the same logits."""

from __future__ import annotations

import re
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resnetv2 import (
    PreActResNet,
    load_weights,
    preact_resnet18,
    preact_resnet20,
    preact_resnet50,
    preact_resnet164,
)
from resnetv2.data._torchvision import import_torchvision
from resnetv2.train import InputError

import_torchvision()  # which timm imports
timm = pytest.importorskip("timm")
cifar = pytest.importorskip("pytorchcv.models.preresnet_cifar")

pytestmark = pytest.mark.usefixtures("one_thread")


class StyleBlock(nn.Module):
    """A basic block as torchvision names it, its projection reading the activated input."""

    def __init__(self, channels: int, width: int, stride: int, projection: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.projection = projection
        if stride != 1:
            layer = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False))
            self.add_module(projection, layer)

    def forward(self, x: Tensor) -> Tensor:
        z = F.relu(self.bn1(x))
        shortcut = getattr(self, self.projection)(z) if hasattr(self, self.projection) else x
        return self.conv2(F.relu(self.bn2(self.conv1(z)))) + shortcut


class StyleNet(nn.Module):
    """Names as torchvision's, but for the last norm and, where asked for, what forks changed."""

    def __init__(self, projection: str = "downsample", classifier: str = "fc") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.layer1 = nn.Sequential(*(StyleBlock(8, 8, 1, projection) for _ in range(2)))
        self.layer2 = nn.Sequential(StyleBlock(8, 16, 2, projection))
        self.bn = nn.BatchNorm2d(16)
        self.classifier = classifier
        self.add_module(classifier, nn.Linear(16, 7))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.layer2(self.layer1(self.conv1(x)))))
        return getattr(self, self.classifier)(x.mean((2, 3)))


def small_timm() -> nn.Module:
    """timm's class of resnetv2_18, with few channels."""
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    return ResNetV2(
        layers=[1, 2],
        channels=(64, 128),
        basic=True,
        bottle_ratio=1.0,
        num_classes=7,
        conv_layer=create_conv2d,
        norm_layer=BatchNormAct2d,
    )


small = partial(PreActResNet, "basic", num_classes=7, first_identity="raw")

# The other net, ours, and the images' size.
PAIRS = {
    "timm resnetv2_50": (partial(timm.create_model, "resnetv2_50"), preact_resnet50, 64),
    "timm basic": (small_timm, partial(small, [1, 2], stem="imagenet", widths=[64, 128]), 32),
    "pytorchcv preresnet164bn": (
        cifar.preresnet164bn_cifar10,
        preact_resnet164,
        32,
    ),
    "pytorchcv preresnet20": (
        cifar.preresnet20_cifar10,
        partial(preact_resnet20, first_identity="raw"),
        32,
    ),
    "torchvision's style": (StyleNet, partial(small, [2, 1], stem_width=8, widths=[8, 16]), 16),
    "torchvision's style, fork": (
        partial(StyleNet, "shortcut", "linear"),
        partial(small, [2, 1], stem_width=8, widths=[8, 16]),
        16,
    ),
}


def trained(net: nn.Module) -> nn.Module:
    """``net`` in float64 as after a training: nothing is at its initial value."""
    generator = torch.Generator().manual_seed(1)
    net.double().eval()
    for name, value in net.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0, generator=generator)
        elif value.is_floating_point() and value.dim() == 1:
            value.uniform_(0.2, 1.0, generator=generator)
        elif value.is_floating_point():
            value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
    return net


@pytest.mark.parametrize("pair", PAIRS)
def test_same_logits(pair: str) -> None:
    make, ours, size = PAIRS[pair]
    other = trained(make())
    model = ours().double().eval()
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = other(images)
        assert not torch.allclose(model(images), expected)
        assert load_weights(model, other.state_dict()) is model
        torch.testing.assert_close(model(images), expected)


def test_a_file_and_what_training_scripts_put_around_it(tmp_path: Path) -> None:
    other = preact_resnet20(num_classes=3)
    wrapped = OrderedDict((f"module.{name}", v) for name, v in other.state_dict().items())
    torch.save({"epoch": 3, "state_dict": wrapped}, tmp_path / "weights.pt")
    model = load_weights(preact_resnet20(num_classes=3), tmp_path / "weights.pt")
    for name, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_another_number_of_classes() -> None:
    """Everything but the classifier, which stays."""
    other, model = preact_resnet20(num_classes=100), preact_resnet20(num_classes=10)
    before = model.fc.weight.clone()
    with pytest.raises(InputError, match=r"shape: fc.weight \(100, 64\) instead of \(10"):
        load_weights(model, other.state_dict())
    load_weights(model, other.state_dict(), classifier=False)
    assert torch.equal(model.fc.weight, before)
    assert torch.equal(model.stage3[2].conv2.weight, other.stage3[2].conv2.weight)


def without(*names: str) -> dict[str, Tensor]:
    return {n: v for n, v in StyleNet().state_dict().items() if not n.startswith(names)}


@pytest.mark.parametrize(
    ("weights", "says"),
    [
        pytest.param(
            without("layer2.0.bn2", "bn."),
            "missing: stage2.0.bn2.weight, stage2.0.bn2.bias, stage2.0.bn2.running_mean and 5 more",
            id="missing",
        ),
        pytest.param(
            {**without(), "layer1.0.se.weight": torch.zeros(1)},
            "unexpected: layer1.0.se.weight (names of torchvision's style made this library's)",
            id="unexpected",
        ),
        pytest.param(
            {**without(), "conv1.weight": torch.zeros(8, 1, 3, 3)},
            "of another shape: conv1.weight (8, 1, 3, 3) instead of (8, 3, 3, 3)",
            id="shape",
        ),
        pytest.param({"conv1.weight": 3}, "expected a state_dict of tensors, got conv1", id="type"),
    ],
)
def test_weights_of_another_net(weights: dict[str, Tensor], says: str) -> None:
    model = small([2, 1], stem_width=8, widths=[8, 16])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=re.escape(says)):
        load_weights(model, weights)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_first_unit_that_computes_something_else_is_refused() -> None:
    """All names and shapes fit."""
    other = timm.create_model("resnetv2_18", num_classes=10)
    with pytest.raises(InputError, match=r'timm.* make it with first_identity="raw"'):
        load_weights(preact_resnet18(10), other.state_dict())
    load_weights(preact_resnet18(10, first_identity="raw"), other.state_dict())


def test_nets_that_resemble_ours_are_refused() -> None:
    """pytorchcv's for ImageNet have a norm in the stem, torchvision's own add after the norm."""
    from pytorchcv.models.preresnet import preresnet18

    other = preresnet18()
    with pytest.raises(InputError, match=r"unexpected: features.init_block.bn.weight"):
        load_weights(preact_resnet18(first_identity="raw"), other.state_dict())
    later = {**StyleNet().state_dict(), "layer2.0.downsample.1.weight": torch.ones(16)}
    with pytest.raises(InputError, match=r"unexpected: layer2.0.downsample.1.weight"):
        load_weights(small([2, 1], stem_width=8, widths=[8, 16]), later)


def test_a_file_that_holds_no_weights(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<html>")
    torch.save([1, 2], tmp_path / "list.pt")
    for name, says in (("page.html", "cannot read weights from"), ("list.pt", "got a list")):
        with pytest.raises(InputError, match=says):
            load_weights(preact_resnet20(), tmp_path / name)
