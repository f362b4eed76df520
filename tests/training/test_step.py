"""One training step: the bits of the plain loop, its sums and average, and the whole-step graph.

Where there is no GPU, ``Tape`` stands in for the CUDA graph.
"""

from __future__ import annotations

import copy
import gc
import io
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from resnetv2 import PreActResNet
from resnetv2.data.datasets import create_synthetic_dataset
from resnetv2.training import loop
from resnetv2.training import step as step_module
from resnetv2.training.average import averaged_model
from resnetv2.training.capture import CudaRecorder, StaticBatch
from resnetv2.training.optimizer import load_optimizer_state, optimizer_state
from resnetv2.training.run import train_resnet_v2
from resnetv2.training.step import WARMUP_STEPS, Step
from tests.support.tape import HostReads, Tape

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 5
BATCH = 6
NEEDS_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="a CUDA graph is captured on a GPU, there is none"
)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def new_model(device: torch.device) -> PreActResNet:
    torch.manual_seed(0)
    model = PreActResNet("basic", [1, 1], CLASSES, widths=[4, 8], stem_width=4, backend="aten").to(
        device
    )
    return model.to(memory_format=torch.channels_last)


def batches(device: torch.device, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(size, 3, 8, 8, generator=generator).to(device),
            torch.randint(CLASSES, (size,), generator=generator).to(device),
        )
        for size in sizes
    ]


RATES = [0.1, 0.2, 0.05, 0.3, 0.1, 0.02, 0.4, 0.1, 0.01, 0.2]


class Run:
    """A model and its ``Step``, built from nothing or from another run's checkpoint."""

    def __init__(
        self,
        device: torch.device,
        graph: bool,
        *,
        decay: float | None = None,
        scaler: bool = False,
        sgd: dict[str, Any] | None = None,
        checkpoint: bytes | None = None,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        self.model = new_model(device) if model is None else model
        self.ema = None if decay is None else averaged_model(self.model, decay)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            **{"lr": 0.1, "momentum": 0.9, "fused": True, **(sgd or {})},
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaler, growth_interval=4)
        if checkpoint is not None:
            self.load(checkpoint)
        recorder = Tape if device.type == "cpu" else CudaRecorder
        self.step = Step(
            self.model,
            self.optimizer,
            scaler=self.scaler,
            ema=self.ema,
            graph=graph,
            recorder=recorder,
            **options,
        )
        self.losses: list[Tensor] = []

    def train(self, data: list[tuple[Tensor, Tensor]], rates: list[float]) -> Run:
        for (images, labels), rate in zip(data, rates, strict=True):
            self.step(images, labels, rate)
            self.losses.append(self.step.loss)
        return self

    def save(self) -> bytes:
        state = {
            "model": self.model.state_dict(),
            "optimizer": optimizer_state(self.optimizer),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, checkpoint: bytes) -> None:
        state = torch.load(io.BytesIO(checkpoint), weights_only=True)
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])

    def state(self) -> dict[str, Tensor]:
        """Everything that a step changes, by name."""
        state = {f"model {name}": value for name, value in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            state[f"momentum {name}"] = self.optimizer.state[parameter]["momentum_buffer"]
            assert parameter.grad is not None
            state[f"gradient {name}"] = parameter.grad
        if self.ema is not None:
            state |= {f"ema {name}": value for name, value in self.ema.state_dict().items()}
        if self.scaler.is_enabled():
            saved = self.scaler.state_dict()
            state["scale"] = torch.tensor([saved["scale"], saved["_growth_tracker"]])
        state["losses"] = torch.stack(self.losses)
        return {name: value.detach().clone() for name, value in state.items()}


def assert_same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different, different


@pytest.mark.parametrize("nesterov", [False, True], ids=["momentum", "nesterov"])
def test_a_plain_step_has_the_bits_of_the_loop_written_by_hand(
    device: torch.device, nesterov: bool
) -> None:
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": nesterov}
    model = new_model(device)
    optimizer = torch.optim.SGD(model.parameters(), **options)
    data = batches(device, [BATCH] * 3)
    losses, correct = [], 0
    for (images, labels), rate in zip(data, RATES):
        optimizer.param_groups[0]["lr"] = rate
        logits = model(images.contiguous(memory_format=torch.channels_last)).float()
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        correct += int((logits.argmax(1) == labels).sum())

    mine = new_model(device)
    step = Step(mine, torch.optim.SGD(mine.parameters(), **options))
    kept = []
    for (images, labels), rate in zip(data, RATES):
        step(images, labels, rate)
        kept.append(step.loss)
    assert_same_bits(mine.state_dict(), model.state_dict())
    assert [float(loss) for loss in kept] == losses  # each step's loss is a tensor of its own
    total = sum(loss * BATCH for loss in losses)
    assert step.sums.tolist() == [pytest.approx(total, rel=1e-12), correct, 3 * BATCH]
    assert step.graph_reason is None
    assert not step.graphed
    step.reset()
    assert (step.loss_sum, step.correct, step.seen) == (0, 0, 0)


def test_the_loss_is_the_smoothed_one_that_is_trained(device: torch.device) -> None:
    run = Run(device, False, label_smoothing=0.2)
    images, labels = batches(device, [BATCH])[0]
    logits = new_model(device)(images.contiguous(memory_format=torch.channels_last))
    target = F.one_hot(labels, CLASSES) * 0.8 + 0.2 / CLASSES
    smoothed = -(target * logits.log_softmax(1)).sum(1).mean()
    run.step(images, labels, 0.1)
    torch.testing.assert_close(run.step.loss, smoothed.detach())
    assert abs(smoothed - F.cross_entropy(logits, labels)) > 1e-3  # smoothing matters here


def test_average_of_weights_and_running_statistics_with_counters_copied(
    device: torch.device,
) -> None:
    """Decays 2/11, 3/12, then 0.3: the first updates forget the initial weights sooner."""
    run = Run(device, False, decay=0.3)
    expected: dict[str, Tensor] = {}
    for index, (images, labels) in enumerate(batches(device, [BATCH] * 5), 1):
        run.step(images, labels, 0.1)
        decay = 0.0 if index == 1 else min(0.3, index / (9 + index))
        for name, value in run.model.state_dict().items():
            if name.endswith("num_batches_tracked"):
                expected[name] = value.clone()
            else:
                before = expected.get(name, torch.zeros(())).double()
                expected[name] = decay * before + (1 - decay) * value.double()
        assert run.ema is not None
        for name, value in run.ema.module.state_dict().items():
            torch.testing.assert_close(value, expected[name].to(value.dtype), msg=name)
    assert int(run.ema.n_averaged) == 5


def test_average_needs_a_function_for_lists() -> None:
    model = new_model(torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(ValueError, match="multi_avg_fn"):
        Step(model, optimizer, ema=AveragedModel(model))


COURSES: dict[str, dict[str, Any]] = {
    "plain": {"sgd": {"momentum": 0.9}},
    "nesterov with decay": {"sgd": {"nesterov": True, "weight_decay": 1e-2}},
    "ema and smoothing": {"decay": 0.8, "label_smoothing": 0.1},
    "scaler": {"scaler": True, "decay": 0.8},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("course", COURSES)
def test_the_host_reads_nothing_in_a_step(course: str) -> None:
    device = torch.device("cpu")
    run = Run(device, False, **COURSES[course])
    for images, labels in batches(device, [BATCH] * 3):
        with HostReads():
            run.step(images, labels, 0.1)


@pytest.mark.parametrize("course", COURSES)
def test_a_graphed_run_takes_the_ungraphed_ones_course(device: torch.device, course: str) -> None:
    data = batches(device, [BATCH] * 8)
    graphed = Run(device, True, **COURSES[course]).train(data, RATES[:8])
    ungraphed = Run(device, False, **COURSES[course]).train(data, RATES[:8])
    assert graphed.step.graph_reason is None
    assert graphed.step.graphed
    assert_same_bits(graphed.state(), ungraphed.state())
    assert graphed.step.sums.tolist() == ungraphed.step.sums.tolist()
    counters = [b for name, b in graphed.model.named_buffers() if name.endswith("tracked")]
    assert counters
    assert all(counter == 8 for counter in counters)  # no step of warming up beyond these


def test_the_graph_is_captured_once_after_the_warm_up(device: torch.device) -> None:
    run = Run(device, True)
    data = batches(device, [BATCH] * 8)
    graphed = []
    for (images, labels), rate in zip(data, RATES):
        run.step(images, labels, rate)
        graphed.append(run.step.graphed)
    assert graphed == [False] * WARMUP_STEPS + [True] * (8 - WARMUP_STEPS)
    if device.type == "cpu":
        tape = run.step._recorder
        assert isinstance(tape, Tape)
        assert (tape.ran, tape.captures, tape.replayed) == (3, 1, 5)


def test_a_replay_follows_the_learning_rate_and_moves_nothing(device: torch.device) -> None:
    run = Run(device, True, sgd={"momentum": 0.0, "weight_decay": 0.0})
    data = batches(device, [BATCH] * 8)
    run.train(data[:5], RATES[:5])
    addresses = [p.data_ptr() for p in run.model.parameters()]
    gradients = [p.grad.data_ptr() for p in run.model.parameters() if p.grad is not None]
    before = copy.deepcopy(run.model).requires_grad_(False)
    images, labels = data[5]
    run.step(images, labels, 0.0)
    for mine, theirs in zip(run.model.parameters(), before.parameters()):
        assert torch.equal(mine, theirs)
    run.step(images, labels, 0.25)
    for mine, theirs in zip(run.model.parameters(), before.parameters()):
        assert mine.grad is not None
        torch.testing.assert_close(mine, theirs - 0.25 * mine.grad, rtol=1e-6, atol=1e-7)
    run.train(data[6:], RATES[6:8])
    assert [p.data_ptr() for p in run.model.parameters()] == addresses
    assert [p.grad.data_ptr() for p in run.model.parameters() if p.grad is not None] == gradients


def test_other_batches_run_ungraphed_in_between(device: torch.device) -> None:
    data = batches(device, [4, *[BATCH] * 5, 2, BATCH, 1, BATCH])
    graphed = Run(device, True, decay=0.8).train(data, RATES)
    ungraphed = Run(device, False, decay=0.8).train(data, RATES)
    assert graphed.step.graphed
    assert_same_bits(graphed.state(), ungraphed.state())
    assert graphed.step.seen == sum(len(labels) for _, labels in data)
    if device.type == "cpu":
        tape = graphed.step._recorder
        assert isinstance(tape, Tape)
        assert (tape.ran, tape.captures, tape.replayed) == (4 + 2, 1, 4)


def test_images_from_elsewhere_and_in_another_layout_are_copied(device: torch.device) -> None:
    data = batches(torch.device("cpu"), [BATCH] * 6)
    mixed = [
        (images.contiguous(memory_format=torch.channels_last) if i % 2 else images, labels)
        for i, (images, labels) in enumerate(data)
    ]
    here = [(images.to(device), labels.to(device)) for images, labels in data]
    graphed = Run(device, True).train(mixed, RATES[:6])
    ungraphed = Run(device, False).train(here, RATES[:6])
    assert_same_bits(graphed.state(), ungraphed.state())


@pytest.mark.parametrize("second", [True, False], ids=["to graphed", "to ungraphed"])
@pytest.mark.parametrize("first", [True, False], ids=["from graphed", "from ungraphed"])
@pytest.mark.parametrize("steps", [0, 2, 5])
def test_checkpoints_pass_between_graphed_and_ungraphed_runs(
    device: torch.device, first: bool, second: bool, steps: int
) -> None:
    data = batches(device, [BATCH] * 10)
    options: dict[str, Any] = {"decay": 0.8, "scaler": True}
    whole = Run(device, False, **options).train(data, RATES)
    begun = Run(device, first, **options).train(data[:steps], RATES[:steps])
    ended = Run(device, second, checkpoint=begun.save(), **options)
    ended.losses = begun.losses
    ended.train(data[steps:], RATES[steps:])
    assert ended.step.graphed == second
    assert_same_bits(ended.state(), whole.state())


def test_a_state_loaded_into_a_graphed_run_is_captured_anew(device: torch.device) -> None:
    data = batches(device, [BATCH] * 6)
    run = Run(device, True, decay=0.8).train(data[:2], RATES[:2])
    checkpoint = run.save()
    run.train(data[2:], RATES[2:6])
    assert run.step.graphed
    expected = run.state()
    run.load(checkpoint)
    run.losses = run.losses[:2]
    run.train(data[2:], RATES[2:6])
    assert_same_bits(run.state(), expected)
    assert run.step.graphed


def test_an_optimizers_state_holds_numbers_and_no_switches(device: torch.device) -> None:
    run = Run(device, True).train(batches(device, [BATCH] * 5), RATES[:5])
    assert isinstance(run.optimizer.param_groups[0]["lr"], Tensor)
    group = optimizer_state(run.optimizer)["param_groups"][0]
    assert group["lr"] == pytest.approx(RATES[4], rel=1e-7)
    assert not any(isinstance(value, Tensor) for value in group.values())
    assert "fused" not in group
    assert group["momentum"] == 0.9


def test_loaded_momentum_lies_as_the_weights_do() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3))
    optimizer = torch.optim.SGD([weight], momentum=0.9)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    moved = nn.Parameter(weight.detach().to(memory_format=torch.channels_last))
    other = torch.optim.SGD([moved], momentum=0.9, fused=True)
    load_optimizer_state(other, optimizer_state(optimizer))
    momentum = other.state[moved]["momentum_buffer"]
    assert torch.equal(momentum, weight.grad)
    assert momentum.stride() == moved.stride()
    assert other.param_groups[0]["fused"]
    with pytest.raises(ValueError, match="expected the state of 1 parameter groups, got that of 0"):
        load_optimizer_state(other, {"state": {}, "param_groups": []})


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_first_step_that_overflows_leaves_momentum_zero(
    device: torch.device, poisoned: None
) -> None:
    model = new_model(device)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9, fused=True)
    scaler = torch.amp.GradScaler(device.type, init_scale=1e38)
    step = Step(model, optimizer, scaler=scaler)
    before = copy.deepcopy(model)
    images, labels = batches(device, [BATCH])[0]
    step(images * 100, labels, 0.1)
    assert scaler.get_scale() < 1e38
    for mine, theirs in zip(model.parameters(), before.parameters()):
        assert torch.equal(mine, theirs)
        momentum = optimizer.state[mine]["momentum_buffer"]
        assert torch.equal(momentum, torch.zeros_like(mine))


def _hooked(model: nn.Module) -> None:
    model.fc.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]


def _parameter_hooked(model: nn.Module) -> None:
    next(model.parameters()).register_hook(lambda gradient: None)


REASONS: dict[str, tuple[dict[str, Any], Callable[[nn.Module], None] | None, str]] = {
    "not fused": ({"sgd": {"fused": False}}, None, "SGD reads the learning rate on the host"),
    "a module's hook": ({}, _hooked, "a hook on fc would not be called"),
    "a gradient's hook": ({}, _parameter_hooked, "would not be called"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_be_captured_runs_ungraphed_and_says_why(
    device: torch.device, case: str
) -> None:
    options, prepare, reason = REASONS[case]
    data = batches(device, [BATCH] * 5)
    runs = []
    for graph in (True, False):
        model = new_model(device)
        if prepare is not None:
            prepare(model)
        runs.append(Run(device, graph, model=model, **options))
    assert runs[0].step.graph_reason is not None
    assert reason in runs[0].step.graph_reason
    assert "\n" not in runs[0].step.graph_reason
    for run in runs:
        run.train(data, RATES[:5])
    assert not runs[0].step.graphed
    assert_same_bits(runs[0].state(), runs[1].state())
    assert isinstance(runs[0].optimizer.param_groups[0]["lr"], float)


def test_without_a_gpu_the_reason_says_so() -> None:
    model = new_model(torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), fused=True)
    step = Step(model, optimizer, graph=True)
    assert step.graph_reason == "a CUDA graph needs a GPU, the model is on cpu"


def test_a_hook_that_comes_during_the_warm_up_is_noticed(device: torch.device) -> None:
    run = Run(device, True)
    data = batches(device, [BATCH] * 5)
    run.train(data[:2], RATES[:2])
    calls: list[int] = []
    run.model.fc.register_forward_hook(lambda *_: calls.append(1))
    run.train(data[2:], RATES[2:5])
    assert len(calls) == 3
    assert run.step.graph_reason == "a hook on fc would not be called at a replay"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_gloo_is_a_reason_and_the_wrapped_model_trains_as_the_bare_one() -> None:
    device = torch.device("cpu")
    wrapped = DistributedDataParallel(new_model(device))
    run = Run(device, True, model=wrapped, decay=0.8)
    assert run.step.graph_reason == "gloo reduces gradients on the host: it needs nccl"
    bare = Run(device, False, decay=0.8)
    data = batches(device, [BATCH] * 3)
    run.train(data, RATES[:3])
    bare.train(data, RATES[:3])
    assert_same_bits(wrapped.module.state_dict(), bare.model.state_dict())
    assert run.ema is not None
    assert bare.ema is not None
    assert_same_bits(run.ema.state_dict(), bare.ema.state_dict())


@pytest.mark.usefixtures("one_process")
def test_a_wrapped_model_is_captured_after_eleven_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    wrapped = DistributedDataParallel(new_model(device))
    # One process has nothing to reduce: gloo does as well for the tape as NCCL for a graph.
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    run = Run(device, True, model=wrapped, decay=0.8)
    data = batches(device, [BATCH] * 14)
    rates = [*RATES, *RATES[:4]]
    run.train(data, rates)
    tape = run.step._recorder
    assert isinstance(tape, Tape)
    assert (tape.ran, tape.captures, tape.replayed) == (11, 1, 3)
    bare = Run(device, False, decay=0.8).train(data, rates)
    assert_same_bits(wrapped.module.state_dict(), bare.model.state_dict())


class HostReader(nn.Module):
    """Reads a value on the host half-way through the model, draws numbers before it does."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.inner = new_model(device)
        self.register_buffer("calls", torch.zeros((), device=device))

    def forward(self, images: Tensor) -> Tensor:
        self.calls = self.calls + 1
        noise = torch.randn(images.shape, device=images.device)
        logits: Tensor = self.inner(images + 0.1 * noise)
        return logits * (1.0 if logits.sum().item() < 1e30 else 0.0)


@pytest.mark.parametrize("scaler", [False, True], ids=["plain", "scaler"])
def test_a_capture_that_fails_leaves_no_trace(device: torch.device, scaler: bool) -> None:
    data = batches(device, [BATCH] * 6)
    states = []
    for graph in (True, False):
        run = Run(device, graph, model=HostReader(device), decay=0.8, scaler=scaler)
        torch.manual_seed(3)
        run.train(data, RATES[:6])
        states.append({**run.state(), "random": torch.get_rng_state()})
        if graph:
            assert run.step.graph_reason is not None
            assert run.step.graph_reason.startswith("capturing failed: ")
            assert "\n" not in run.step.graph_reason
            assert not run.step.graphed
            assert isinstance(run.optimizer.param_groups[0]["lr"], float)
    rates = [state.pop("random") for state in states]
    assert torch.equal(*rates)
    assert_same_bits(*states)


@pytest.mark.parametrize("part", ["optimizer.step", "scaler.update"])
def test_a_capture_that_fails_late_is_undone_too(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """In the optimizer or after it, where it and the scaler are half-way."""
    device = torch.device("cpu")
    data = batches(device, [BATCH] * 6)
    ungraphed = Run(device, False, scaler=True).train(data, RATES[:6])
    run = Run(device, True, scaler=True)
    run.train(data[:WARMUP_STEPS], RATES[:WARMUP_STEPS])
    owner, name = part.split(".")
    right = getattr(getattr(run, owner), name)
    faults = [RuntimeError("not while capturing\nnor later")]

    def failing() -> None:
        if faults:
            raise faults.pop()
        right()

    monkeypatch.setattr(getattr(run, owner), name, failing)
    run.train(data[WARMUP_STEPS:], RATES[WARMUP_STEPS:6])
    assert run.step.graph_reason == "capturing failed: RuntimeError: not while capturing"
    assert_same_bits(run.state(), ungraphed.state())


class Replacer(nn.Module):
    """Counts its calls in a buffer that is another tensor each time."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.inner = new_model(device)
        self.register_buffer("calls", torch.zeros((), device=device))

    def forward(self, images: Tensor) -> Tensor:
        self.calls = self.calls + 1
        logits: Tensor = self.inner(images)
        return logits


class HostDrawer(Replacer):
    """Draws a number on the host."""

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits * (1 + torch.rand(()).numpy().item())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Replacer, "Replacer.calls is replaced, not changed in place"),
        (HostDrawer, "random numbers are drawn on the host, where a replay draws none"),
    ],
    ids=["a buffer replaced", "random on the host"],
)
def test_what_no_replay_would_follow_is_a_reason(
    device: torch.device, kind: type[Replacer], reason: str
) -> None:
    data = batches(device, [BATCH] * 6)
    states = []
    for graph in (True, False):
        torch.manual_seed(0)
        run = Run(device, graph, model=kind(device)).train(data, RATES[:6])
        states.append(run.state())
        assert run.step.graph_reason == (f"capturing failed: {reason}" if graph else None)
    assert_same_bits(*states)


def test_ctrl_c_in_a_capture_is_passed_on_with_the_state_as_it_was() -> None:
    device = torch.device("cpu")
    data = batches(device, [BATCH] * 6)
    run = Run(device, True)
    run.train(data[:WARMUP_STEPS], RATES[:WARMUP_STEPS])
    before = copy.deepcopy(run.model.state_dict())
    forward = run.model.forward

    def interrupted(images: Tensor) -> Tensor:
        forward(images)
        raise KeyboardInterrupt

    run.model.forward = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.step(*data[WARMUP_STEPS], 0.1)
    assert_same_bits(run.model.state_dict(), before)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_after_a_fallback_nothing_is_kept(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []

    class Watched(StaticBatch):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(weakref.ref(self.images))

    monkeypatch.setattr(step_module, "StaticBatch", Watched)
    run = Run(device, True, model=HostReader(device))
    made.append(weakref.ref(run.step._recorder))
    run.train(batches(device, [BATCH] * 5), RATES[:5])
    gc.collect()
    assert len(made) == 2
    assert [reference() for reference in made] == [None, None]


class FusedSGD(torch.optim.SGD):
    """As a run makes it on a GPU."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "fused": True})


def test_a_run_captures_its_steps_on_a_gpu_unless_told_not_to(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its losses and weights are those of the run that captures nothing. On a CPU "auto" is off."""
    data = create_synthetic_dataset(num_samples=40, image_size=8, num_classes=2)
    options = {"depth": 8, "batch_size": 8, "epochs": 2, "device": str(device), "backend": "aten"}
    graph = "auto"
    if device.type == "cpu":
        assert train_resnet_v2(data, **options).step_losses
        assert "graph" not in capsys.readouterr().out
        monkeypatch.setattr(torch.optim, "SGD", FusedSGD)
        graph = "on"
    steps: list[Step] = []

    def recorded(*args: Any, **given: Any) -> Step:
        steps.append(Step(*args, recorder=Tape if device.type == "cpu" else None, **given))
        return steps[-1]

    monkeypatch.setattr(loop, "Step", recorded)
    found = [train_resnet_v2(data, graph=word, **options) for word in (graph, "off")]
    assert [step.graphed for step in steps] == [True, False]
    assert len(found[0].step_losses) == 8
    assert found[0].step_losses == found[1].step_losses
    assert_same_bits(found[0].model.state_dict(), found[1].model.state_dict())


def test_where_a_run_was_asked_to_capture_and_cannot_it_says_why(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = create_synthetic_dataset(num_samples=20, image_size=8, num_classes=2)
    train_resnet_v2(data, depth=8, batch_size=8, epochs=1, device="cpu", graph="on", backend="aten")
    assert "not graphed: a CUDA graph needs a GPU, the model is on cpu" in capsys.readouterr().out
