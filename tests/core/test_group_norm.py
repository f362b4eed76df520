"""Units of group, instance and layer norm: eager PyTorch's function, within the yardstick."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.blocks import Stage, norm_layer
from resnetv2.core.modules import Computed
from resnetv2.core.operators import chain_forward
from resnetv2.core.reading import Reading, read
from resnetv2.core.run import describe, run_chain
from resnetv2.kernels import reference
from resnetv2.kernels.inspect.yardstick import Draw
from resnetv2.studies.norms import NORMS
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    assert_equal_steps,
    assert_yardstick,
    check_module,
    eager_twin,
    images,
    interpreted,
    needs_triton,
    randomise,
    record_terms,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def by_hand(block, **norms):
    """Other norms in place of a block's, as users put them there."""
    for name, norm in norms.items():
        setattr(block, name, norm)
    return block


UNITS = {
    "groups-silu": lambda: PreActBlock(12, 12, norm="group:3", act="silu"),
    "groups-odd-projection": lambda: PreActBlock(15, 9, 2, norm="group:3", act="gelu"),
    "layer-bottleneck": lambda: BottleneckPreActBlock(8, 20, norm="layer", bias=True, act="silu"),
    "instance-raw-projection": lambda: PreActBlock(
        5, 7, 2, norm="instance", shortcut="raw", act="silu", bias=True
    ),
    "identity-reads-preact": lambda: PreActBlock(
        8, 8, norm="group:4", identity="preact", act="silu"
    ),
    "batch-then-group": lambda: by_hand(PreActBlock(6, 6, act="silu"), bn2=nn.GroupNorm(2, 6)),
    "group-then-batch": lambda: by_hand(
        BottleneckPreActBlock(8, 8, act="gelu"), bn1=nn.GroupNorm(2, 8), bn3=nn.GroupNorm(1, 2)
    ),
    "instance-norm-by-hand": lambda: by_hand(
        PreActBlock(6, 6, act="silu"),
        bn1=nn.InstanceNorm2d(6),
        bn2=nn.InstanceNorm2d(6, affine=True),
    ),
    "not-affine": lambda: by_hand(
        PreActBlock(6, 6, act="silu"), bn2=nn.GroupNorm(3, 6, affine=False)
    ),
}
# The interpreter meets what these have in others.
SKIPPED = ("layer-bottleneck", "instance-norm-by-hand")
ON_BACKENDS = [
    pytest.param(name, backend, marks=marks, id=f"{name}-{backend}")
    for backend, marks in (("aten", ()), ("triton", needs_triton))
    for name in UNITS
    if not (interpreted(backend) and name in SKIPPED)
]


def unit(name: str, backend: str = "aten") -> nn.Module:
    torch.manual_seed(0)
    block = randomise(UNITS[name]()).to(DEVICE)
    block.backend = backend
    return block


def channels(block) -> int:
    return block.in_channels


def runs_fused(block) -> bool:
    return not isinstance(read(block), str)


@pytest.mark.parametrize(("name", "backend"), ON_BACKENDS)
def test_float32(name, backend):
    block = unit(name, backend)
    assert runs_fused(block)
    check_module(block, (2, channels(block), 5, 6))


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "nchw"])
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.float32, None),
    ],
    ids=["bf16", "fp16", "autocast", "float32"],
)
@pytest.mark.parametrize("name", ["groups-silu", "groups-odd-projection", "batch-then-group"])
def test_dtypes_and_layouts(name, dtype, autocast, channels_last):
    block = unit(name).to(torch.float32 if autocast else dtype)
    check_module(
        block, (4, channels(block), 9, 7),
        dtype=dtype, autocast=autocast, channels_last=channels_last, draws=9,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_on(backend, dtype):
    block = unit("groups-silu", backend).to(dtype)
    draws = {"draws": 3, "eager_draws": 15} if interpreted(backend) else {"draws": 9}
    check_module(block, (2, 12, 5, 6), dtype=dtype, **draws)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_pixel_a_group(backend):
    """Its variance is 0: the gradient of its input is 0, as in eager."""
    torch.manual_seed(0)
    block = randomise(PreActBlock(6, 6, norm="instance", act="silu", bias=True)).to(DEVICE)
    block.backend = backend
    check_module(block, (2, 6, 1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "nchw"])
@pytest.mark.parametrize("groups", [1, 3, 12])
def test_far_from_zero(groups, channels_last, backend):
    """As exact as eager's in NCHW: of channels_last ATen's group norm gives rounding alone."""
    torch.manual_seed(0)
    block = randomise(PreActBlock(12, 12, norm=f"group:{groups}", act="silu")).to(DEVICE)
    block.backend = backend
    shape = (2, 12, 9, 7) if interpreted(backend) else (4, 12, 33, 17)
    eager, exact = eager_twin(block), eager_twin(block, torch.float64)
    terms = record_terms(exact)

    def take(seed: int, both: bool) -> Draw:
        x = images(shape, seed, mean=1e3, channels_last=False)
        given = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        ours = step(block, given, seed=seed) if both else None
        theirs, truth = (step(e, x.to(e.bn1.weight.dtype), seed=seed) for e in (eager, exact))
        return Draw(ours, theirs, truth, dict(terms))

    assert_yardstick(take, 3, 9)


def test_a_weight_of_zero_does_not_silence_its_group():
    block = unit("groups-silu")
    with torch.no_grad():
        block.bn1.weight[1] = 0
        block.bn2.weight.zero_()
    check_module(block, (2, 12, 5, 6))


def test_training_and_evaluation_are_the_same():
    block, x = unit("groups-silu"), images((2, 12, 5, 6))
    training = step(block, x)
    assert_equal_steps(step(block.eval(), x), training)


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(6, track_running_stats=True), nn.LocalResponseNorm(2)]
)
def test_others_run_child_by_child(norm):
    block = by_hand(PreActBlock(6, 6), bn2=norm).to(DEVICE)
    assert not runs_fused(block)
    x = images((2, 6, 5, 6))
    assert torch.equal(block(x), eager_twin(block)(x))


def test_gradcheck():
    block = randomise(PreActBlock(4, 6, norm="group:2", act="silu", bias=True)).double()
    x = images((2, 4, 3, 3), dtype=torch.float64).cpu().requires_grad_()
    assert torch.autograd.gradcheck(block, (x,))
    assert torch.autograd.gradgradcheck(block, (x,))


@pytest.mark.parametrize("memory", ["invert", "invert_h1", "segment"])
def test_memory_modes(memory):
    torch.manual_seed(0)
    blocks = [PreActBlock(8, 8, norm="group:4", act="silu", backend="aten") for _ in range(5)]
    check_module(randomise(Stage(*blocks, backend="aten", memory=memory)).to(DEVICE), (2, 8, 6, 6))


def test_a_stage_of_both_norms():
    """Statistics of either kind side by side, moments handed on only to a batch norm."""
    torch.manual_seed(0)
    norms = ("batch", "group:4", "layer", "batch")
    blocks = [PreActBlock(8, 8, norm=norm, act="silu", backend="aten") for norm in norms]
    blocks.insert(2, PreActBlock(8, 8, 2, norm="group:2", act="silu", backend="aten"))
    check_module(randomise(Stage(*blocks, backend="aten")).to(DEVICE), (3, 8, 8, 8))


def test_a_whole_net_has_the_norm_everywhere():
    model = PreActResNet("basic", [1, 1], 5, widths=[8, 16], stem_width=8, norm="group:4")
    assert sum(isinstance(m, nn.GroupNorm) for m in model.modules()) == 5
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", NORMS)
def test_the_norms_of_the_study_run_fused(name):
    assert runs_fused(PreActBlock(8, 8, norm=NORMS[name]))


@pytest.mark.parametrize(
    ("norm", "channels", "message"),
    [
        ("group", 8, '"group:32"'),
        ("group:0", 8, "got 'group:0'"),
        ("rms", 8, "got 'rms'"),
        ("group:3", 8, "norm must divide 8 channels, got 3 groups"),
    ],
)
def test_a_wrong_name(norm, channels, message):
    with pytest.raises(ValueError, match=message):
        norm_layer(norm)(channels)


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        pytest.param(nn.GroupNorm(6, 6), (1, 6, 1, 1), id="group"),
        pytest.param(nn.InstanceNorm2d(6), (2, 6, 1, 1), id="instance"),
    ],
)
def test_nothing_to_average(norm, shape):
    block = by_hand(PreActBlock(6, 6), bn1=norm).to(DEVICE)
    for each in (block, eager_twin(block)):
        with pytest.raises(ValueError, match="more than 1"):
            each(images(shape))


class Modulated(nn.Module):
    """A unit whose second norm is scaled and shifted, and whose first convolution and projection
    are moved, for each image: what an embedding does."""

    def __init__(self, block: PreActBlock) -> None:
        super().__init__()
        self.block = block
        self.scale, self.shift, self.move = (
            nn.Parameter(torch.randn(2, block.out_channels)) for _ in range(3)
        )
        self.backend = block.backend

    def forward(self, x):
        block = self.block
        if self.backend == "eager":
            z, move = block.act(block.bn1(x)), self.move[..., None, None]
            u = block.bn2(block.conv1(z) + move)
            u = u * (1 + self.scale[..., None, None]) + self.shift[..., None, None]
            shortcut = block.shortcut(z) + move if block.has_projection() else x
            return shortcut + block.conv2(block.act(u))
        norm = block.bn2
        slots = [("convs", 0, "bias"), ("norms", 1, "weight"), ("norms", 1, "bias")]
        if block.has_projection():
            slots.append(("projection", 0, "bias"))

        def compute(second):
            scale = 1 + self.scale
            found = [block.conv1.bias + second, norm.weight * scale, norm.bias * scale + self.shift]
            if block.has_projection():
                found.append(block.shortcut[0].bias + second)
            return found

        computed = Computed(tuple(slots), compute)
        reading = Reading(read(block).unit._replace(computed=computed))
        return run_chain([reading], x, backend=self.backend, second=self.move)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("norm", "channels"), [("group:2", 6), ("layer", 6), ("group:2", 4)],
    ids=["groups", "layer", "projection"],
)  # fmt: skip
def test_computed_for_each_image(norm, channels, backend):
    torch.manual_seed(0)
    block = randomise(PreActBlock(channels, 6, norm=norm, bias=True, act="silu", backend=backend))
    module = Modulated(block).to(DEVICE)
    check_module(module, (2, channels, 5, 6), draws=3)


def test_statistics_are_kept_by_group():
    """What a chain keeps of a group norm does not grow with its channels."""
    sizes = []
    for name, count in (("group:4", 2 * 3 * 4), ("layer", 2 * 3)):
        block = PreActBlock(32, 32, norm=name, backend="aten").to(DEVICE)
        reading = read(block)
        arguments = describe(
            [reading], torch.float32, need_x=True, backend="aten", memory="recompute", segment=0
        )
        _, stats, *_ = chain_forward(images((3, 32, 4, 4)), *arguments)
        sizes.append((stats.numel(), 2 * count))
    assert all(found == expected for found, expected in sizes)


def test_moments_of_channels_with_other_means():
    x = images((3, 8, 5, 7), dtype=torch.float64) + torch.arange(8)[:, None, None] * 100
    mean, rstd = reference.group_moments(x, 2, 1e-5)
    parts = x.reshape(3, 2, -1)
    torch.testing.assert_close(mean, parts.mean(2))
    torch.testing.assert_close(rstd, (parts.var(2, correction=0) + 1e-5).rsqrt())


def test_a_copy_computes_the_same():
    block, x = unit("groups-silu"), images((2, 12, 5, 6))
    assert_equal_steps(step(copy.deepcopy(block), x), step(block, x))
