"""``fuse`` on diffusers' blocks and nets: group norms, an embedding as a second input.

Promise: a training step is within the yardstick of eager's, gradients of the embedding included;
each ``ResnetBlock2D`` without resampling in it runs fused, the others are left alone with a reason.
"""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

from resnetv2 import explain, fuse, unfuse
from resnetv2.data._torchvision import import_torchvision
from tests.support.fuse_checks import ChainCalls, check_fused, fused_copy, needs
from tests.support.fuse_models.grouped import Conditioned
from tests.support.yardstick import (
    DEVICE,
    assert_close_steps,
    assert_equal_steps,
    images,
    randomise,
    step,
)

pytestmark = [pytest.mark.usefixtures("one_thread"), needs("diffusers")]

FEATURES = 10
SMALL = {"block_out_channels": (8, 12), "layers_per_block": 1, "norm_num_groups": 4}


def resnet_block(channels: int = 8, **options) -> nn.Module:
    import_torchvision()  # which diffusers imports
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    block = ResnetBlock2D(in_channels=channels, temb_channels=FEATURES, groups=4, **options)
    return randomise(block).to(DEVICE)


class Autoencoder(nn.Module):
    """``AutoencoderKL``, from images to images without a draw from its latent distribution."""

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        from diffusers import AutoencoderKL

        self.model = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **SMALL,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).sample


class Denoiser(nn.Module):
    """``UNet2DConditionModel`` with a prompt and timesteps of its own."""

    def __init__(self) -> None:
        super().__init__()
        import_torchvision()
        from diffusers import UNet2DConditionModel

        self.model = UNet2DConditionModel(
            sample_size=8, in_channels=3, out_channels=3, cross_attention_dim=6,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            **SMALL,
        )  # fmt: skip
        self.prompt = nn.Parameter(torch.randn(2, 5, 6))
        self.register_buffer("steps", torch.tensor([3, 700]))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, self.steps, self.prompt).sample


NETS = {"vae": Autoencoder, "unet": Denoiser}


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]().to(DEVICE)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="added"),
        pytest.param({"time_embedding_norm": "scale_shift"}, id="scale-shift"),
        pytest.param({"out_channels": 12, "skip_time_act": True}, id="shortcut"),
        pytest.param({"output_scale_factor": 1.4}, id="output-scale"),
        pytest.param(
            {"out_channels": 12, "output_scale_factor": 2**0.5,
             "time_embedding_norm": "scale_shift", "groups_out": 3},
            id="scale-shift-shortcut-output-scale",
        ),
        pytest.param({"non_linearity": "gelu", "conv_shortcut_bias": False, "out_channels": 4},
                     id="gelu"),
    ],
)  # fmt: skip
def test_block(options, training):
    model = Conditioned(resnet_block(**options), features=FEATURES).to(DEVICE)
    fused = check_fused(model, (3, 8, 7, 6), training=training, draws=3)
    (row,) = explain(fused).blocks
    assert row.fused
    assert "group norms, with temb" in row.kind


@pytest.mark.parametrize("precision", [torch.bfloat16], ids=["bf16-autocast"])
def test_block_under_autocast(precision):
    model = Conditioned(resnet_block(out_channels=12), features=FEATURES).to(DEVICE)
    check_fused(model, (3, 8, 7, 6), autocast=precision, draws=9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"up": True}, "size", id="up"),
        pytest.param({"down": True}, "AvgPool2d", id="down"),
        pytest.param({"dropout": 0.3}, "dropout with p = 0.3 in training", id="dropout"),
    ],
)
def test_left_alone(options, reason):
    block = resnet_block(**options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*pre-activation")
        fused = fuse(copy.deepcopy(block), backend="aten")
    (row,) = explain(fused).blocks
    assert not row.fused
    assert reason in row.reason
    x, temb = images((2, 8, 6, 6)), images((2, FEATURES))
    results = []
    for each in (fused, block):
        torch.manual_seed(1)
        results.append(each(x, temb))
    assert torch.equal(*results)


CALLS = {
    "positional": lambda block, x, temb: block(x, temb),
    "keyword": lambda block, x, temb: block(x, temb=temb),
    "none-of-a-batch": lambda block, x, temb: block(x, temb[:1]),
}


@pytest.mark.parametrize("how", CALLS)
def test_ways_to_call_it(how):
    block = resnet_block()
    fused = fused_copy(block)
    x, temb = images((3, 8, 6, 5)), images((3, FEATURES))
    with torch.no_grad(), ChainCalls() as calls:
        out = CALLS[how](fused, x, temb)
    assert calls.count == 1
    torch.testing.assert_close(out, CALLS[how](block, x, temb), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(lambda: images((2, FEATURES)), id="of-other-images"),
        pytest.param(lambda: images((3, FEATURES + 1)), id="other-features"),
        pytest.param(lambda: images((3, FEATURES)).double(), id="other-dtype"),
        pytest.param(lambda: None, id="none"),
        pytest.param(lambda: 3.0, id="a-number"),
    ],
)
def test_an_embedding_that_eager_refuses(second):
    """The same error as eager's."""
    block = resnet_block()
    errors = []
    for each in (fused_copy(block), block):
        with pytest.raises((RuntimeError, TypeError)) as found:
            each(images((3, 8, 6, 5)), second())
        errors.append((type(found.value), str(found.value)))
    assert errors[0] == errors[1]


class Adapter(nn.Module):
    """What adapters put in the place of a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def hook(block: nn.Module) -> None:
    block.time_emb_proj.register_forward_hook(lambda module, given, out: 2 * out)


def adapt(block: nn.Module) -> None:
    torch.manual_seed(2)
    block.time_emb_proj = Adapter(block.time_emb_proj).to(DEVICE)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [hook, adapt])
def test_what_is_put_on_the_projection_is_honoured(change, when):
    """It is called at every call, once; a child of another class than was recognised is reason
    enough for the block's own forward."""
    block = resnet_block(out_channels=12)
    plain = copy.deepcopy(block)
    change(plain)
    if when == "before":
        change(block)
    fused = fuse(block, backend="aten")
    if when == "after":
        change(block)
    x, temb = images((3, 8, 6, 5)), images((3, FEATURES))
    seen: list[int] = []
    fused.time_emb_proj.register_forward_hook(lambda *_: seen.append(1))
    with ChainCalls() as calls, torch.no_grad():
        fused(x, temb)
    assert len(seen) == 1
    assert calls.count == (0 if (change, when) == (adapt, "after") else 1)
    models = [Conditioned(each, features=FEATURES).to(DEVICE) for each in (fused, plain)]
    models[1].embedding.data.copy_(models[0].embedding.data)
    assert_close_steps(*[step(model, x) for model in models])


@pytest.mark.parametrize("name", NETS)
def test_net(name):
    """Every ResnetBlock2D is fused; one training step; unfused it is as before."""
    model = net(name)
    fused = fused_copy(model)
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == "ResnetBlock2D"]
    assert [row.path for row in explain(fused).fused] == blocks
    assert all(row.fused or row.reason for row in explain(fused).blocks)
    assert list(fused.state_dict()) == list(model.state_dict())
    x = images((2, 3, 16, 16))
    with torch.no_grad(), ChainCalls() as calls:
        fused(x)
    assert calls.count == len(blocks)
    check_fused(model, (2, 3, 16, 16), eager_draws=2)
    assert [type(m) for m in unfuse(fused).modules()] == [type(m) for m in model.modules()]


def test_compiled():
    """As one graph with the chain in it, whose outputs and gradients are the block's."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    block = resnet_block(out_channels=12, output_scale_factor=2.0)
    models = [Conditioned(block, features=FEATURES).to(DEVICE)]
    models.append(copy.deepcopy(models[0]))
    fuse(models[0], backend="aten")
    models[0].blocks[0].compile(backend=backend, fullgraph=True)
    x = images((3, 8, 6, 5))
    assert_close_steps(*[step(model, x) for model in models])
    assert "chain_forward" in str(graphs[0].graph)


def test_memory_auto():
    model = Conditioned(resnet_block(), features=FEATURES).to(DEVICE)
    fuse(model, memory="auto", budget="1GiB")
    model(images((3, 8, 6, 5))).sum().backward()
    assert "predicted peak" in explain(model).memory


@pytest.mark.parametrize(
    "remake", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_run_fused(remake):
    block = fused_copy(resnet_block(time_embedding_norm="scale_shift"))
    again = remake(block)
    x = images((3, 8, 6, 5))
    models = [Conditioned(each, features=FEATURES).to(DEVICE) for each in (again, block)]
    models[1].embedding.data.copy_(models[0].embedding.data)
    assert_equal_steps(*[step(model, x) for model in models])
    with torch.no_grad(), ChainCalls() as calls:
        again(x, models[0].embedding)
    assert calls.count == 1
