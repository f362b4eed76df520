"""Memory modes: the same gradients for less, and a plan that says beforehand how much less.

Every mode runs the same chain; what differs is what is kept. Bytes are those that PyTorch's
allocator hands out, read from the profiler on a CPU.
"""

from __future__ import annotations

import copy
import gc
import random
import sys

import pytest
import torch
import torch.nn.functional as F

from resnetv2 import BottleneckPreActBlock, BudgetError, PreActResNet, plan
from resnetv2.core import execution
from resnetv2.core.memory import parse_bytes
from resnetv2.names import MEMORY_MODES
from resnetv2.planning.memory import peak_bytes
from tests.support.yardstick import DEVICE, eager_twin, images, randomise

# Under the interpreter, "auto" would be Triton: slow, and not what allocates on a CPU.
BACKEND = "auto" if DEVICE.type == "cuda" else "aten"
WALKS = MEMORY_MODES[1:]
modes = pytest.mark.parametrize("mode", MEMORY_MODES)
pytestmark = pytest.mark.usefixtures("one_thread")


def set_mode(model, mode, segment=0):
    """A copy of ``model`` in a memory mode."""
    model = copy.deepcopy(model)
    for stage in model.stages:
        stage.memory, stage.segment = mode, segment
    return model


def net(block="bottleneck", units=4, **options):
    torch.manual_seed(0)
    model = PreActResNet(block, [units] * 3, stem_width=8, backend=BACKEND, **options)
    return randomise(model).to(DEVICE, memory_format=torch.channels_last)


def train_step(model, x, autocast=None):
    """Loss, gradients (the input's too) and buffers of one step."""
    x = x.detach().requires_grad_()
    labels = torch.arange(x.shape[0], device=x.device) % 10
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        out = model(x)
    model.zero_grad()
    F.cross_entropy(
        out.to(x.dtype if x.dtype == torch.float64 else torch.float32), labels
    ).backward()
    names = ((n.removeprefix("_orig_mod."), p) for n, p in model.named_parameters())
    grads = {"x": x.grad, **{n: p.grad for n, p in names}}
    return {n: g.clone() for n, g in grads.items()}, dict(model.named_buffers())


def errors(grads, exact):
    """Relative error of each gradient against float64."""
    return {n: ((g.double() - exact[n]).norm() / exact[n].norm()).item() for n, g in grads.items()}


def assert_no_worse(ours, theirs, factor):
    for name, error in ours.items():
        assert error <= factor * theirs[name] + 1e-6, (name, error, theirs[name])


def step_bytes(model, batch, size, autocast=None, layout=torch.channels_last):
    """Peak of a step's allocations, gradients made in it included; its own inputs are not."""
    x = images((batch, 3, size, size)).to(next(model.parameters()).device)
    x = x.contiguous(memory_format=layout)
    labels = torch.zeros(batch, dtype=torch.long, device=x.device)

    def step():
        model.zero_grad()
        with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
            out = model(x)
        F.cross_entropy(out.float(), labels).backward()

    step()
    model.zero_grad()
    gc.collect()  # what earlier tests left would go in the middle of the step
    return peak_bytes(step, x.is_cuda)


def resident(model):
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("mode", WALKS)
def test_gradients_are_as_good_as_eagers(block, mode):
    model, x = net(block), images((4, 3, 12, 12))
    exact, _ = train_step(eager_twin(model, torch.float64), x.double())
    eager, eager_buffers = train_step(eager_twin(model), x)
    ours, buffers = train_step(set_mode(model, mode, segment=3), x)
    assert_no_worse(errors(ours, exact), errors(eager, exact), 2)
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, eager_buffers[name], rtol=1e-5, atol=1e-6)


def deep():
    torch.manual_seed(0)
    return PreActResNet.from_depth(1001, "bottleneck", backend=BACKEND).to(
        DEVICE, memory_format=torch.channels_last
    )


def test_gradients_at_1001_layers():
    model, x = deep(), images((2, 3, 8, 8))
    exact, _ = train_step(eager_twin(model, torch.float64), x.double())
    theirs = errors(train_step(eager_twin(model), x)[0], exact)
    for mode in WALKS:
        ours, buffers = train_step(set_mode(model, mode), x)
        # One gradient's error is a draw; 2x holds up to the spread of the draws around it.
        assert_no_worse(errors(ours, exact), theirs, 2)
        assert all(b == 1 for n, b in buffers.items() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_running_statistics_are_the_same_bits_in_every_mode(block):
    model, x = net(block), images((4, 3, 12, 12))
    _, first = train_step(set_mode(model, "recompute"), x)
    for mode in WALKS:
        _, buffers = train_step(set_mode(model, mode), x)
        assert all(torch.equal(buffers[n], first[n]) for n in first), mode


@pytest.mark.parametrize(("stream", "limit"), [("half", 1.05), ("float32", 1.1)])
@pytest.mark.parametrize("mode", WALKS)
def test_walks_in_half_precision(mode, stream, limit, monkeypatch):
    """18 units a stage: more than are walked without an exact copy in between."""
    monkeypatch.setenv("RESNETV2_STREAM", stream)
    model, x = net(units=18), images((8, 3, 4, 4))
    exact, _ = train_step(eager_twin(model, torch.float64), x.double())
    kept, kept_buffers = train_step(set_mode(model, "recompute"), x, torch.bfloat16)
    ours, buffers = train_step(set_mode(model, mode), x, torch.bfloat16)
    assert sum(errors(ours, exact).values()) <= limit * sum(errors(kept, exact).values())
    same = all(torch.equal(buffers[name], kept_buffers[name]) for name in buffers)
    assert same == (stream == "half")


def test_a_half_precision_stream_comes_back():
    """x within 1 % everywhere, from the stream's beginning to past the first whole run of steps."""
    from resnetv2.core import run
    from resnetv2.core.chain import Chain
    from resnetv2.core.reading import Reading
    from resnetv2.core.spec import decode
    from resnetv2.kernels.dispatch import engine

    torch.manual_seed(0)
    units = [randomise(BottleneckPreActBlock(64, 64)).to(DEVICE) for _ in range(2 * run.ANCHORS)]
    params, layout, constants = run.describe(
        [Reading(unit.unit_modules()) for unit in units],
        torch.bfloat16,
        need_x=True,
        backend=BACKEND,
        memory="invert",
        segment=0,
    )
    chain = Chain(decode(layout, constants), params, engine(BACKEND, DEVICE, (torch.bfloat16,)))
    x = images((8, 64, 8, 8)).to(DEVICE, torch.bfloat16)
    keys = [(number, i) for number in range(len(units)) for i in (0, 2)]
    with torch.no_grad():
        out, kept, _ = chain.forward(x, 0, len(units), keys)
        anchors = [number for number, i in chain.spec.kept() if i == 0]
        assert anchors == [4, 8, 16]
        for number in reversed(range(len(units))):
            out = chain._previous(number, kept[number, 2], out)
            exact = kept[number, 0]
            assert (out - exact).float().norm() <= 1e-2 * exact.float().norm(), number
            out = exact if number in anchors else out


@modes
def test_output_dtype_is_eagers(mode):
    model, x = set_mode(net(units=2), mode), images((2, 3, 8, 8))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        stem = model.conv1(x)
        assert model.stage1(stem).dtype == eager_twin(model).stage1(stem).dtype == torch.bfloat16
    half = copy.deepcopy(model).bfloat16()
    assert half.stage1(stem).dtype == torch.bfloat16
    train_step(half, x.bfloat16())


@modes
def test_interpreter_agrees(mode):
    pytest.importorskip("triton")
    torch.manual_seed(0)
    model = PreActResNet("bottleneck", [3], widths=[8], stem_width=8, backend="triton")
    model = randomise(model).to(DEVICE)
    x = images((2, 3, 6, 6))
    exact, _ = train_step(eager_twin(model, torch.float64), x.double())
    eager, _ = train_step(eager_twin(model), x)
    ours, _ = train_step(set_mode(model, mode, segment=2), x)
    assert_no_worse(errors(ours, exact), errors(eager, exact), 2)


@pytest.mark.parametrize("backend", ["aten", "triton"])
def test_recomputed_last_convolution_is_the_forwards_bits(backend):
    from resnetv2.core.chain import Chain
    from resnetv2.core.reading import Reading
    from resnetv2.core.run import describe
    from resnetv2.core.spec import decode
    from resnetv2.kernels.dispatch import engine

    if backend == "triton":
        pytest.importorskip("triton")
    block = randomise(BottleneckPreActBlock(16, 16)).to(DEVICE)
    x = images((2, 16, 6, 6))
    params, layout, constants = describe(
        [Reading(block.unit_modules())],
        torch.float32,
        need_x=True,
        backend=backend,
        memory="invert",
        segment=0,
    )
    spec = decode(layout, constants)
    tools = engine(backend, DEVICE, (torch.float32,))
    chain = Chain(spec, params, tools)
    with torch.no_grad():
        _, kept, _ = chain.forward(x, 0, 1, ((0, 2),))
        h2, at = kept[0, 2], spec.positions[0]
        weight, stats = params[at.conv_weight[2]], chain.stats[2]
        runs = [
            tools.conv_forward(
                h2, weight, None, spec.units[0].convs[2].geometry, dtype=torch.float32,
                stats=stats, act=spec.units[0].act, residual=torch.zeros_like(x),
                subtract=subtract, with_moments=not subtract,
            )[0]
            for subtract in (False, True)
        ]  # fmt: skip
    assert torch.equal(runs[0], -runs[1])


@modes
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (torch.contiguous_format, "fp32"),
        (torch.channels_last, "bf16"),
        (torch.contiguous_format, "bf16"),
    ],
    ids=["nchw-fp32", "channels_last-bf16", "nchw-bf16"],
)
@pytest.mark.parametrize(("depth", "block"), [(32, "basic"), (47, "bottleneck")])
def test_kept_bytes_are_as_planned(mode, depth, block, dtype, layout):
    """In float32 and channels_last: ``test_plan_at_the_papers_depths``."""
    torch.manual_seed(0)
    model = PreActResNet.from_depth(depth, block, memory=mode, backend=BACKEND).to(
        DEVICE, memory_format=layout
    )
    predicted = plan(model, 8, image_size=16, optimizer_states=0, dtype=dtype).row(mode).peak
    autocast = torch.bfloat16 if dtype == "bf16" else None
    measured = step_bytes(model, 8, 16, autocast, layout) + resident(model)
    assert measured <= predicted <= 1.03 * measured


def test_group_norms_are_planned_and_keep_as_little():
    torch.manual_seed(0)
    model = PreActResNet.from_depth(
        38, "bottleneck", norm="group:4", act="silu", backend=BACKEND
    ).to(DEVICE, memory_format=torch.channels_last)
    planned = plan(model, 4, image_size=16, optimizer_states=0)
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    eager = step_bytes(eager_twin(model), 4, 16)
    limits = {"recompute": 0.45, "invert_h1": 0.3, "invert": 0.27, "segment": 0.25}
    for mode, limit in limits.items():
        step = step_bytes(set_mode(model, mode), 4, 16)
        measured = step + resident(model)
        assert measured <= planned.row(mode).peak <= 1.03 * measured
        assert step - gradients <= limit * eager, (mode, (step - gradients) / eager)
    if DEVICE.type == "cpu":
        assert abs(planned.eager - eager) <= 0.1 * eager


@pytest.fixture
def idle_h100(monkeypatch):
    """Kernels allocate what they do on an H100, in the host's memory, and are not run."""
    pytest.importorskip("triton")
    from resnetv2.kernels import launch, triton_engine

    triton_engine.TritonEngine()  # imports them all
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "_launch", lambda *_: None)
    device, real = launch.Device(132, "cuda", 90), launch.device_of
    for name, module in list(sys.modules.items()):
        if name.startswith("resnetv2.kernels.") and getattr(module, "device_of", None) is real:
            monkeypatch.setattr(module, "device_of", lambda _: device)
    execution.PROGRAMS.clear()
    yield
    execution.PROGRAMS.clear()


@modes
@pytest.mark.parametrize(("depth", "block"), [(56, "basic"), (83, "bottleneck")])
def test_kernels_allocate_what_is_planned(mode, depth, block, idle_h100):
    """Written operands, and the sums of a weight gradient's programs, as many as an H100 holds."""
    torch.manual_seed(0)
    model = PreActResNet.from_depth(depth, block, memory=mode, backend="triton")
    model = model.to(memory_format=torch.channels_last)
    predicted = plan(model, 8, image_size=16, optimizer_states=0, device="cuda").row(mode).peak
    measured = step_bytes(model, 8, 16) + resident(model)
    assert measured <= predicted <= 1.03 * measured


@modes
@pytest.mark.parametrize(("depth", "block"), [(110, "basic"), (164, "bottleneck")])
def test_plan_at_the_papers_depths(mode, depth, block):
    torch.manual_seed(0)
    model = PreActResNet.from_depth(depth, block, memory=mode, backend=BACKEND).to(
        DEVICE, memory_format=torch.channels_last
    )
    predicted = plan(model, 4, image_size=16, optimizer_states=0).row(mode).peak
    measured = step_bytes(model, 4, 16) + resident(model)
    assert measured <= predicted <= 1.03 * measured


def test_peak_at_1001_layers():
    """As planned, and against eager."""
    model = deep()
    gradients = sum(p.numel() * p.element_size() for p in model.parameters())
    eager = step_bytes(eager_twin(model), 4, 16)
    limits = {"recompute": 0.52, "invert_h1": 0.18, "invert": 0.10, "segment": 0.04}
    planned = plan(model, 4, image_size=16, optimizer_states=0)
    ratios = {}
    for mode in MEMORY_MODES:
        step = step_bytes(set_mode(model, mode), 4, 16)
        ratios[mode] = (step - gradients) / eager
        measured = step + resident(model)
        assert measured <= planned.row(mode).peak <= 1.03 * measured
    assert all(ratios[mode] <= limit for mode, limit in limits.items()), ratios


def test_auto_stays_within_its_budget():
    draw = random.Random(0)
    fits = refused = 0
    while fits < 3:
        depth, batch = 6 * draw.randint(1, 9) + 2, draw.randint(2, 12)
        budget = int(10 ** draw.uniform(6.2, 7.6))
        torch.manual_seed(0)
        model = PreActResNet.from_depth(depth, memory="auto", budget=budget, backend=BACKEND)
        model = model.to(DEVICE, memory_format=torch.channels_last)
        momentum = sum(p.numel() * p.element_size() for p in model.parameters())
        x = images((batch, 3, 16, 16))
        try:
            model(x)
        except BudgetError:
            refused += 1
            continue
        model.zero_grad()
        used = step_bytes(model, batch, 16) + resident(model) + momentum
        assert used <= budget, (depth, batch, budget, model.stage1.memory)
        fits += 1
    assert refused


def test_auto_needs_a_budget_without_a_gpu():
    model = PreActResNet.from_depth(8, memory="auto", backend=BACKEND)
    with pytest.raises(ValueError, match="needs a budget"):
        model(torch.randn(2, 3, 8, 8))


def test_refusal_names_what_would_fit():
    with pytest.raises(BudgetError, match=r"needs at least .*; the largest batch that fits is \d+"):
        plan(56, 128, "40MB")
    smallest = min(row.peak for row in plan(56, 16).rows)
    assert plan(56, 16, smallest).mode == "segment"
    with pytest.raises(BudgetError):
        plan(56, 16, smallest - 1)


def test_plan_takes_the_fastest_that_fits():
    rows = plan(83, 16, block="bottleneck").rows
    assert [row.mode for row in rows] == list(MEMORY_MODES)
    assert [row.peak for row in rows] == sorted((row.peak for row in rows), reverse=True)
    for row in rows:
        assert plan(83, 16, row.peak, block="bottleneck").mode == row.mode
    text = str(plan(83, 16, rows[1].peak, block="bottleneck"))
    assert "invert_h1 *" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("8GiB", 8 * 2**30), ("500 MB", 5 * 10**8), ("2e9", 2 * 10**9), (1000, 1000)],
)
def test_budgets_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "lots", "8 XB", "-1", 0, "ib"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(ValueError, match=r"budget|bytes"):
        parse_bytes(text)


@modes
def test_retain_graph_and_second_backward(mode):
    model, x = set_mode(net(units=3), mode), images((2, 3, 8, 8)).requires_grad_()
    loss = model(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        torch.autograd.grad(loss, x)


@modes
def test_double_backward(mode):
    model = set_mode(net(units=2).double(), mode)
    x = images((2, 3, 6, 6), dtype=torch.float64).requires_grad_()
    penalty = []
    for m in (model, eager_twin(model)):
        (dx,) = torch.autograd.grad(m(x).square().sum(), x, create_graph=True)
        penalty.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*penalty, rtol=1e-8, atol=1e-10)


@modes
def test_two_forwards_before_one_backward(mode):
    model = set_mode(net(units=3), mode)
    reference = eager_twin(model)
    a, b = images((2, 3, 8, 8)), images((2, 3, 8, 8), seed=1)
    for m in (model, reference):
        m.zero_grad()
        (m(a).square().sum() + m(b).sum()).backward()
    for p, q in zip(model.parameters(), reference.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3 * q.grad.abs().max().item())


@modes
def test_accumulation_and_eval_gradients(mode):
    model = set_mode(net(units=3), mode)
    reference = eager_twin(model)
    x = images((2, 3, 8, 8))
    results = []
    for m in (model, reference):
        m.zero_grad()
        m(x).sum().backward()
        m(x).sum().backward()
        m.eval()
        leaf = x.clone().requires_grad_()
        m(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in m.parameters())])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(
            ours, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item() + 1e-7
        )


@modes
def test_hook_on_a_block_runs_block_by_block(mode):
    model = set_mode(net(units=3), mode)
    x = images((2, 3, 8, 8))
    plain = model(x)
    model = set_mode(net(units=3), mode)
    seen = []
    model.stage1[1].register_forward_hook(lambda *args: seen.append(args[2].shape))
    hooked = model(x)
    assert len(seen) == 1
    torch.testing.assert_close(hooked, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", WALKS)
def test_output_changed_in_place_is_an_error_not_a_wrong_gradient(mode):
    stage = set_mode(net(units=3), mode).stage1
    out = stage(images((2, 8, 8, 8)).requires_grad_())
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@modes
def test_two_steps_are_bitwise_repeatable(mode):
    x = images((4, 3, 8, 8))
    runs = []
    for _ in range(2):
        model = set_mode(net(units=3), mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            train_step(model, x)
            optimizer.step()
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@modes
def test_compiles_whole(mode):
    model = set_mode(net(units=2), mode)
    x = images((2, 3, 8, 8))
    expected, _ = train_step(model, x)
    compiled = torch.compile(set_mode(net(units=2), mode), fullgraph=True, backend="aot_eager")
    got, _ = train_step(compiled, x)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)


@pytest.mark.parametrize("channels_last", [True, False], ids=["channels-last", "nchw"])
@modes
def test_on_a_cpu_the_bits_are_eagers(mode, channels_last):
    """ATen's path calls the kernels that eager calls, in an order that rounds the same way.

    Where the stream is walked back, x returns within a rounding; elsewhere nothing differs.
    """
    if DEVICE.type != "cpu":
        pytest.skip("a GPU runs the fused kernels")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = net().to(memory_format=layout)
    x = images((4, 3, 12, 12), channels_last=channels_last)
    eager, _ = train_step(eager_twin(model), x)
    ours, _ = train_step(set_mode(model, mode), x)
    if mode == "recompute":
        assert all(torch.equal(ours[name], eager[name]) for name in eager)
    for name, gradient in eager.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4 * scale)
