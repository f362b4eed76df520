"""Training loops that people have, on a fused model: the results are the unfused model's.

Compilers, trainers, and what walks over the norms of a model between steps.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from resnetv2 import fuse, unfuse
from resnetv2.data._torchvision import import_torchvision
from tests.support.compilers import Compiler, needs_inductor, renamed
from tests.support.fuse_checks import ChainCalls, fused_copy, fused_units, needs
from tests.support.fuse_models import (
    Basic,
    NormAct,
    OfNormActs,
    OfTuples,
    PaddedBoth,
    PlainNet,
    Wide,
    tuple_block,
)
from tests.support.yardstick import DEVICE, assert_close_steps, images, randomise, step

pytestmark = pytest.mark.usefixtures("one_thread")

NET_SHAPE = (4, 3, 8, 8)


def net_of(block: Callable[..., nn.Module] = Basic, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(PlainNet(block), seed).to(DEVICE)


def targets(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, (NET_SHAPE[0],), generator=generator).to(DEVICE)


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(images(NET_SHAPE, seed), targets(seed)) for seed in range(count)]


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return F.cross_entropy(model(images(NET_SHAPE, seed)), targets(seed))


def assert_same_state(a: nn.Module, b: nn.Module, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    mine, theirs = a.state_dict(), b.state_dict()
    assert list(mine) == list(theirs)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=atol, msg=name)


# Between the steps.


def test_sam_with_momentum_0():
    """Sharpness-aware minimisation: the second forward moves no statistics, by momentum 0."""
    model = net_of()
    fused = fused_copy(model)
    for each in (fused, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9)
        norms = [m for m in each.modules() if isinstance(m, nn.BatchNorm2d)]
        for seed in range(3):
            loss_of(each, seed).backward()
            moved = {name: b.clone() for name, b in each.named_buffers() if "running" in name}
            norm = torch.stack([p.grad.norm() for p in each.parameters()]).norm()
            steps = [0.05 * p.grad / norm for p in each.parameters()]
            with torch.no_grad():
                for p, e in zip(each.parameters(), steps):
                    p.add_(e)
            optimizer.zero_grad()
            for m in norms:
                m.backup_momentum, m.momentum = m.momentum, 0
            loss_of(each, seed).backward()
            for name, before in moved.items():
                assert torch.equal(each.get_buffer(name), before), name
            for m in norms:
                m.momentum = m.backup_momentum
            with torch.no_grad():
                for p, e in zip(each.parameters(), steps):
                    p.sub_(e)
            optimizer.step()
            optimizer.zero_grad()
    assert int(fused.layers[0][0].bn1.num_batches_tracked) == 6
    assert_same_state(fused, model)


def test_update_bn():
    """Statistics anew, as cumulative averages, with momentum None meanwhile."""
    model = net_of()
    fused = fused_copy(model)
    for each in (fused, model):
        update_bn(batches(3), each, device=DEVICE)
        assert all(m.momentum == 0.1 for m in each.modules() if isinstance(m, nn.BatchNorm2d))
    assert_same_state(fused, model, rtol=1e-5, atol=1e-6)


def test_gradient_accumulation_clipping_and_zeroing():
    model = net_of(tuple_block)
    fused = fused_copy(model)
    for each in (fused, model):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3, eps=1e-3)
        for seed in range(4):
            (loss_of(each, seed) / 2).backward()
            if seed % 2:
                torch.nn.utils.clip_grad_norm_(each.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=seed > 1)
    assert_same_state(fused, model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_grad_scaler(dtype):
    """Scaled training in half precision goes on as unfused, and its scale with it."""
    model = net_of()
    fused = fused_copy(model)
    scales, losses = [], []
    for each in (fused, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**16, growth_interval=2)
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, dtype=dtype):
                loss = loss_of(each, seed)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(each.parameters(), 5.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        scales.append(scaler.get_scale())
        if each is fused:
            assert each.layers[0][0].conv1.weight.grad.dtype == torch.float32
    assert scales[0] == scales[1]
    torch.testing.assert_close(losses[:4], losses[4:], rtol=0.05, atol=0.05)


def test_freezing_and_thawing_layers():
    """Fine-tuning: a stage with its norms in evaluation and without gradients, then with."""
    model = net_of()
    fused = fused_copy(model)
    for each in (fused, model):
        each.layers[0].requires_grad_(False)
        each.layers[0].eval()
        loss_of(each).backward()
        assert all(p.grad is None for p in each.layers[0].parameters())
        each.layers[0].requires_grad_(True)
        each.train()
        loss_of(each, 1).backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    assert_same_state(fused, model)


def test_adversarial_training():
    """PGD in evaluation, then a step in training, on the same model."""
    model = net_of(lambda i, o, s: Wide(i, o, s))
    fused = fused_copy(model)
    found = []
    for each in (fused, model):
        x, y = images(NET_SHAPE), targets(0)
        attacked = x.clone()
        each.eval()
        for _ in range(2):
            attacked.requires_grad_(True)
            loss = F.cross_entropy(each(attacked), y)
            (grad,) = torch.autograd.grad(loss, attacked)
            attacked = (attacked.detach() + 0.1 * grad.clamp(-1e-2, 1e-2)).detach()
        each.train()
        F.cross_entropy(each(attacked), y).backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
        found.append(attacked)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert_same_state(fused, model)


# Compilers.


BLOCKS = {
    "basic": Basic,
    "tuples": tuple_block,
    "flags": lambda i, o, s: Wide(i, o, s),
    "norm-and-act-in-one": lambda i, o, s: nn.Sequential(
        OfNormActs(NormAct, i, 2, o), *[nn.MaxPool2d(2)] * (s - 1)
    ),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("block", "training"), [*((block, True) for block in BLOCKS), ("basic", False)]
)
def test_compile_after_fuse(block, training):
    """One graph, with the chains in it, and no second one in the steps that follow."""
    model = net_of(BLOCKS[block]).train(training)
    fused = fused_copy(model)
    compiler = Compiler()
    compiled = torch.compile(fused, fullgraph=True, backend=compiler)
    for seed in range(3):
        x = images(NET_SHAPE, seed)
        assert_close_steps(renamed(step(compiled, x, seed=seed)), step(model, x, seed=seed))
    assert compiler.graphs == 1
    assert compiler.chains >= 1


@pytest.mark.usefixtures("fresh_compiler")
@needs_inductor
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "nchw"])
def test_inductor_finds_the_layouts_that_it_was_told(channels_last):
    """Asymmetric padding in ATen, in either layout: inductor asserts every stride."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = randomise(nn.Sequential(PaddedBoth(4, False), PaddedBoth(4, False))).to(DEVICE)
    model = model.to(memory_format=layout)
    fused = fused_copy(model)
    x = images((2, 4, 6, 6), channels_last=channels_last)
    compiled = torch.compile(fused, fullgraph=True)
    assert_close_steps(renamed(step(compiled, x)), step(model, x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("what", ["the model", "the compiled model"])
def test_compile_before_fuse(what):
    """fuse(model) behind a compiled model's back, or on it: the next call runs fused."""
    model = net_of()
    mine = copy.deepcopy(model)
    compiler = Compiler()
    compiled = torch.compile(mine, fullgraph=True, backend=compiler)
    x = images(NET_SHAPE)
    assert_close_steps(renamed(step(compiled, x)), step(model, x))
    assert compiler.chains == 0
    returned = fuse(mine if what == "the model" else compiled, backend="aten")
    assert returned is (mine if what == "the model" else compiled)
    assert fused_units(mine) == 4
    for seed in range(2):
        x = images(NET_SHAPE, seed)
        assert_close_steps(renamed(step(compiled, x)), step(model, x))
    assert compiler.chains >= 1
    assert compiler.graphs == 2


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_in_place_and_of_single_blocks():
    """module.compile(), and torch.compile of one stage of a fused model."""
    model = net_of()
    fused = fused_copy(model)
    compiler = Compiler()
    fused.layers[0].compile(fullgraph=True, backend=compiler)
    x = images(NET_SHAPE)
    assert_close_steps(step(fused, x), step(model, x))
    assert compiler.chains == 1


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_a_hook():
    """What must run child by child does so in one graph too."""
    model = net_of()
    fused = fused_copy(model)
    seen = []
    fused.layers[0][0].conv1.register_forward_hook(lambda *_: seen.append(1))
    compiled = torch.compile(fused, backend="aot_eager")
    assert_close_steps(renamed(step(compiled, images(NET_SHAPE))), step(model, images(NET_SHAPE)))
    assert seen


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_autocast():
    model = net_of()
    fused = fused_copy(model)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = images(NET_SHAPE)
    found = renamed(step(compiled, x, autocast=torch.bfloat16))
    assert_close_steps(found, step(copy_of(fused, model), x, autocast=torch.bfloat16))


def copy_of(fused: nn.Module, start: nn.Module) -> nn.Module:
    """The fused model as it was at the start."""
    other = copy.deepcopy(fused)
    other.load_state_dict(start.state_dict())
    return other


@pytest.mark.parametrize("block", ["basic", "tuples"])
def test_export_after_unfuse(block):
    model = net_of(BLOCKS[block]).eval()
    x = images(NET_SHAPE)
    expected = model(x)
    unfused = unfuse(fused_copy(model))
    exported = torch.export.export(unfused, (x,))
    assert not any("chain" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("block", ["flags", "norm-and-act-in-one"])
def test_jit_trace_after_unfuse(block):
    model = net_of(BLOCKS[block]).eval()
    x = images(NET_SHAPE)
    traced = torch.jit.trace(unfuse(fused_copy(model)), x)
    assert "chain" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


def test_fx_after_unfuse():
    torch.manual_seed(0)
    model = randomise(nn.Sequential(OfTuples(4, 4), nn.ReLU())).to(DEVICE).eval()
    unfused = unfuse(fused_copy(model))
    x = images((2, 4, 5, 6))
    graph = torch.fx.symbolic_trace(unfused)
    torch.testing.assert_close(graph(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_of_a_fused_model_runs_its_children():
    model = net_of().eval()
    x = images(NET_SHAPE)
    traced = torch.jit.trace(fused_copy(model), x)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


# Trainers.


def lightning_module(model: nn.Module) -> nn.Module:
    import_torchvision()  # which torchmetrics, and so lightning, imports where it is installed
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.chains = 0

        def training_step(self, batch, _):
            x, y = batch
            with ChainCalls() as calls:
                out = self.model(x)
            self.chains += calls.count
            return F.cross_entropy(out, y)

        def validation_step(self, batch, _):
            assert not self.model.training
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    return Module()


@needs("lightning")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trainer(precision, tmp_path):
    import_torchvision()
    import lightning

    model = net_of().cpu()
    fused = fused_copy(model)
    data = [(x.cpu(), y.cpu()) for x, y in batches(3)]
    chains = []
    for each in (fused, model):
        module = lightning_module(each)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of workers, loggers and the like
            trainer = lightning.Trainer(
                accelerator="cpu",
                max_epochs=1,
                precision=precision,
                gradient_clip_val=1.0,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=tmp_path,
            )
            loader = torch.utils.data.DataLoader(data, batch_size=None)
            trainer.fit(module, loader, loader)
            trainer.save_checkpoint(tmp_path / f"{each is fused}.ckpt")
        assert trainer.global_step == 3
        chains.append(module.chains)
    assert chains[0] >= 3
    assert chains[1] == 0
    rtol = 1e-3 if precision == "32-true" else 0.1
    assert_same_state(fused, model, rtol=rtol, atol=rtol / 10 if rtol < 0.1 else 0.05)
    saved = torch.load(tmp_path / "True.ckpt", weights_only=False)["state_dict"]
    lightning_module(model).load_state_dict(saved, strict=True)


@needs("accelerate")
@pytest.mark.parametrize(("precision", "when"), [("no", "before"), ("bf16", "after")])
def test_accelerate(precision, when):
    """Accelerator.prepare puts a forward of its own on the model; fused before or after it."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    model = net_of().cpu()
    fused = fused_copy(model) if when == "before" else copy.deepcopy(model)
    data = [(x.cpu(), y.cpu()) for x, y in batches(3)]
    dtypes = []
    for each in (fused, model):
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        optimizer = torch.optim.SGD(each.parameters(), lr=0.05)
        prepared, optimizer = accelerator.prepare(each, optimizer)
        if when == "after" and each is fused:
            fuse(prepared, backend="aten")
        with ChainCalls() as calls:
            for x, y in data:
                optimizer.zero_grad()
                out = prepared(x)
                accelerator.backward(F.cross_entropy(out, y))
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
        assert (calls.count >= 3) == (each is fused)
        dtypes.append(out.dtype)
        plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
        assert plain is each
    assert dtypes[0] == dtypes[1]
    rtol = 1e-3 if precision == "no" else 0.1
    assert_same_state(fused, model, rtol=rtol, atol=rtol / 10 if rtol < 0.1 else 0.05)


def test_training_follows_the_unfused_model():
    """Ten steps from the same start, and evaluation in between."""
    model = net_of(tuple_block)
    fused = fused_copy(model)
    losses = []
    for each in (fused, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.02, momentum=0.9, nesterov=True)
        for seed in range(10):
            loss = loss_of(each.train(), seed % 2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                losses.append([loss.item(), loss_of(each.eval(), 2).item()])
    torch.testing.assert_close(losses[:10], losses[10:], rtol=1e-2, atol=1e-3)
    assert losses[9][0] < losses[0][0]
