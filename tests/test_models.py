"""Networks: depths, sizes, initialisation and the paper's first and last unit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import resnetv2
from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    check_module,
    eager_twin,
    images,
    randomise,
    step,
    with_backend,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def small(block: str = "basic", layers: tuple[int, ...] = (2, 1), **options) -> PreActResNet:
    torch.manual_seed(0)
    widths = [4 * 2**i * (1 if block == "basic" else 4) for i in range(len(layers))]
    options = {"widths": widths, "stem_width": 4, "num_classes": 5, "backend": "aten", **options}
    return PreActResNet(block, layers, **options).to(DEVICE)


# Millions of parameters as published: He et al. 2016, tables 2, 4 and 5 (1000 classes for
# ImageNet, torchvision's and timm's counts); Zagoruyko & Komodakis 2016, tables 4 and 5.
PUBLISHED = {
    "preact_resnet20": (0.27, 0.01),
    "preact_resnet56": (0.85, 0.01),
    "preact_resnet110": (1.7, 0.05),
    "preact_resnet164": (1.7, 0.05),
    "preact_resnet1001": (10.2, 0.15),
    "preact_resnet1202": (19.4, 0.1),
    "preact_resnet18": (11.7, 0.1),
    "preact_resnet34": (21.8, 0.1),
    "preact_resnet50": (25.5, 0.1),
    "preact_resnet101": (44.5, 0.1),
    "preact_resnet152": (60.2, 0.1),
    "preact_resnet200": (64.7, 0.1),
    "wide_resnet28_10": (36.5, 0.05),
    "wide_resnet16_8": (11.0, 0.05),
    "wide_resnet40_2": (2.2, 0.05),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    millions, tolerance = PUBLISHED[name]
    with torch.device("meta"):
        model = getattr(resnetv2, name)()
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count / 1e6 == pytest.approx(millions, abs=tolerance)
    assert model.fc.out_features == (1000 if model.stem == "imagenet" else 10)
    assert name in repr(getattr(resnetv2, name))


def convolution_layers(model: PreActResNet) -> int:
    """Layers as the paper counts them: without projections."""
    return 2 + sum(block.depth for stage in model.stages for block in stage)


@pytest.mark.parametrize(
    ("depth", "block"),
    [(8, "basic"), (20, "basic"), (110, "basic"), (11, "bottleneck"), (29, BottleneckPreActBlock)],
)
def test_from_depth_counts_layers(depth, block):
    with torch.device("meta"):
        model = PreActResNet.from_depth(depth, block, num_classes=7)
    assert convolution_layers(model) == depth
    assert model.fc.out_features == 7
    assert [len(stage) for stage in model.stages] == [len(model.stage1)] * 3


@pytest.mark.parametrize(("name", "depth"), [(n, int(n.split("resnet")[1])) for n in PUBLISHED
                                            if n.startswith("preact")])  # fmt: skip
def test_factories_have_the_depth_of_their_name(name, depth):
    with torch.device("meta"):
        assert convolution_layers(getattr(resnetv2, name)()) == depth


def test_factories_take_options():
    model = resnetv2.preact_resnet20(7, in_channels=1, act="silu", backend="aten")
    assert model.fc.out_features == 7
    assert model.conv1.in_channels == 1
    assert isinstance(model.stage1[0].act, nn.SiLU)


def by_hand(model: PreActResNet, x: torch.Tensor) -> torch.Tensor:
    """He et al. 2016, equation (3) and appendix, in plain functions: the CIFAR basic net."""

    def norm_act(bn: nn.BatchNorm2d, h: torch.Tensor) -> torch.Tensor:
        u = F.batch_norm(h, None, None, bn.weight, bn.bias, True, 0.0, bn.eps)
        return F.relu(u)

    x = F.conv2d(x, model.conv1.weight, padding=1)
    for number, stage in enumerate(model.stages):
        for i, block in enumerate(stage):
            z = norm_act(block.bn1, x)
            stride = 2 if number > 0 and i == 0 else 1
            first = number == 0 and i == 0
            if len(block.shortcut):
                shortcut = F.conv2d(z, block.shortcut[0].weight, stride=stride)
            else:
                shortcut = z if first else x  # the first unit activates before the paths part
            h = F.conv2d(z, block.conv1.weight, stride=stride, padding=1)
            h = F.conv2d(norm_act(block.bn2, h), block.conv2.weight, padding=1)
            x = shortcut + h
    x = norm_act(model.bn, x)  # an extra activation after the last addition
    return F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)


@pytest.mark.parametrize("backend", [*BACKENDS, "eager"])
def test_the_network_of_the_paper(backend):
    model = randomise(small(layers=(2, 1), backend=backend))
    x = images((2, 3, 6, 6))
    expected = by_hand(eager_twin(model, torch.float64), x.double())
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_first_unit_activates_before_the_paths_part(block):
    model = small(block)
    assert model.stage1[0].reads_preact()
    assert not model.stage1[1].reads_preact()
    assert model.stage2[0].reads_preact()


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_training_step_against_float64(block):
    model = randomise(small(block, (2, 2)))
    check_module(model, (4, 3, 8, 8), draws=3)


def test_imagenet_stem():
    model = small(layers=(1, 1, 1, 1), stem="imagenet", stem_width=8)
    assert model.conv1.kernel_size == (7, 7)
    x = images((2, 3, 64, 48))
    features = model.features(x)
    assert features.shape == (2, 32, 2, 2)
    assert features.min() >= 0
    assert model(x).shape == (2, 5)
    check_module(model, (2, 3, 64, 48))


def test_features_then_classifier():
    model = small().eval()
    x = images((2, 3, 8, 8))
    features = model.features(x)
    assert features.shape == (2, 8, 4, 4)
    torch.testing.assert_close(model(x), model.fc(features.mean((2, 3))))


def test_stages_are_sequentials_of_blocks():
    model = small(layers=(3, 2))
    stage = model.stage1
    assert isinstance(stage, nn.Sequential)
    assert len(stage) == 3
    assert isinstance(stage[0], PreActBlock)
    assert list(stage) == [stage[0], stage[1], stage[2]]
    assert model.stages == [model.stage1, model.stage2]
    assert "stage1.2.conv2.weight" in dict(model.named_parameters())


def test_a_slice_of_a_stage_runs_as_the_stage_does():
    stage = Stage(*[PreActBlock(4, 4) for _ in range(3)], backend="aten", memory="invert")
    part = stage[1:]
    assert isinstance(part, Stage)
    assert (part.backend, part.memory, part.segment) == ("aten", "invert", 0)
    assert list(part) == [stage[1], stage[2]]
    x = images((2, 4, 5, 5))
    torch.testing.assert_close(part.to(DEVICE)(x), stage[2](stage[1](x)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_stage_equals_its_blocks_one_by_one(training, backend):
    """Moments from the epilogue that wrote a tensor, or computed by the block that reads it."""
    torch.manual_seed(0)
    stage = Stage(PreActBlock(4, 6, 2), PreActBlock(6, 6), backend=backend)
    randomise(stage).to(DEVICE).train(training)
    single = nn.Sequential(*with_backend(stage, backend))
    x, g = images((2, 4, 5, 6)), images((2, 6, 3, 3), 3)
    assert_close_steps(step(stage, x, g), step(single, x, g))


def test_a_hook_on_a_block_inside_a_stage_fires_and_changes_nothing():
    model = small(layers=(3, 1))
    seen = []
    twin = eager_twin(model)
    model.stage1[1].register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    x, g = images((2, 3, 8, 8)), torch.ones(2, 5, device=DEVICE)
    expected: list[torch.Tensor] = []
    twin.stage1[1].register_forward_hook(lambda _, __, out: expected.append(out.detach().clone()))
    assert_close_steps(step(model, x, g), step(twin, x, g), 1e-3, 1e-4)
    torch.testing.assert_close(seen[0], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_initialisation_is_the_papers(block):
    """Convolutions N(0, 2/(k*k*out_channels)); norms 1 and 0; the classifier's bias 0."""
    torch.manual_seed(0)
    model = PreActResNet(block, [2, 2], widths=[64, 128], bias=True)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            k = module.kernel_size[0]
            std = math.sqrt(2.0 / (k * k * module.out_channels))
            n = module.weight.numel()
            # Five standard errors of a normal sample's mean and standard deviation.
            assert abs(float(module.weight.detach().mean())) < 5 * std / math.sqrt(n), name
            assert abs(float(module.weight.detach().std()) / std - 1) < 5 / math.sqrt(2 * n), name
            if module.bias is not None:
                assert (module.bias == 0).all(), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
    assert (model.fc.bias == 0).all()


def test_same_seed_same_weights_fused_and_eager():
    states = []
    for backend in ("aten", "eager", "triton"):
        torch.manual_seed(3)
        states.append(PreActResNet("bottleneck", [1, 2], backend=backend).state_dict())
    for other in states[1:]:
        assert list(other) == list(states[0])
        assert all(torch.equal(other[name], states[0][name]) for name in other)


def test_reset_parameters_forgets_training():
    model = small()
    step(model, images((2, 3, 8, 8)), torch.ones(2, 5, device=DEVICE))
    model.reset_parameters()
    assert int(model.bn.num_batches_tracked) == 0
    assert (model.stage1[0].bn1.running_mean == 0).all()


def test_state_dict_round_trip():
    model, other = randomise(small(), 1), small()
    x, g = images((2, 3, 8, 8)), torch.ones(2, 5, device=DEVICE)
    step(model, x, g)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_equal_steps(step(other, x, g), step(model, x, g))


def test_norm_and_act_reach_every_layer():
    """With another norm the children run one by one; the last norm is of the same kind."""
    model = small(norm=lambda c: nn.GroupNorm(2, c), act="gelu")
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert isinstance(model.act, nn.GELU)
    twin = eager_twin(model)
    x, g = images((2, 3, 8, 8)), torch.ones(2, 5, device=DEVICE)
    assert_close_steps(step(model, x, g), step(twin, x, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_modes_share_the_bits_of_the_forward(dtype, monkeypatch):
    """Output and running statistics; a float32 stream in half precision has other roundings."""

    def forward(mode):
        torch.manual_seed(0)
        model = PreActResNet.from_depth(20, memory=mode, backend="aten")
        x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(x)
        return [out.detach(), *(buffer.clone() for buffer in model.buffers())]

    def same(mode):
        return all(map(torch.equal, forward(mode), forward("recompute")))

    walking = ("invert_h1", "invert", "segment")
    assert all(map(same, walking))
    monkeypatch.setenv("RESNETV2_STREAM", "float32")
    assert {same(mode) for mode in walking} == {dtype == torch.float32}
