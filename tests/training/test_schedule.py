"""Learning rates by step number, and which parameters are decayed."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    SequentialLR,
)

from resnetv2 import PreActResNet
from resnetv2.training.schedule import SCHEDULES, default_warmup, learning_rate, optimizer_groups


def rates(
    total: int, lr: float = 1.0, warmup: int | None = None, schedule: str = "step"
) -> list[float]:
    return [learning_rate(step, total, lr, warmup, schedule) for step in range(total)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, float, int]:
    """Steps of a run, its highest rate and a warm-up that fits."""
    total = draw(st.integers(1, 100))
    return total, draw(st.floats(1e-6, 1e3)), draw(st.integers(0, total))


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.01),
        (399, 0.01),
        (400, 0.1),
        (31_999, 0.1),
        (32_000, 0.01),
        (47_999, 0.01),
        (48_000, 0.001),
        (63_999, 0.001),
    ],
)
def test_step_is_the_papers(step: int, rate: float) -> None:
    assert learning_rate(step, 64_000) == pytest.approx(rate, rel=1e-15)


def test_step_keeps_its_proportions() -> None:
    found = rates(320)
    assert [found.count(value) for value in (1.0, 0.1, 0.01)] == [158, 82, 80]
    assert found[:3] == [0.1, 0.1, 1.0]
    assert learning_rate(7, 100, 1.0, 8) == 0.1
    assert learning_rate(0, 100, 1.0, 0) == 1.0
    assert default_warmup(10**9) == 400


def torch_rates(
    total: int, scheduler: Callable[[torch.optim.Optimizer], LRScheduler]
) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = scheduler(optimizer)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(("total", "warmup"), [(100, 30), (7, 2), (390, 117)])
def test_one_cycle_is_torchs(total: int, warmup: int) -> None:
    expected = torch_rates(
        total,
        lambda optimizer: OneCycleLR(
            optimizer, 0.3, total, pct_start=warmup / total, cycle_momentum=False
        ),
    )
    assert rates(total, 0.3, warmup, "one-cycle") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("total", "warmup"), [(100, 5), (8, 2), (390, 20)])
def test_cosine_is_torchs(total: int, warmup: int) -> None:
    expected = torch_rates(
        total,
        lambda optimizer: SequentialLR(
            optimizer,
            [
                LinearLR(optimizer, 1 / warmup, 1.0, warmup - 1),
                CosineAnnealingLR(optimizer, total - warmup),
            ],
            [warmup],
        ),
    )
    assert rates(total, 0.3, warmup, "cosine") == pytest.approx(expected, rel=1e-9)


def test_constant_warms_up_linearly() -> None:
    assert rates(6, 1.0, 4, "constant") == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates(3, 1.0, None, "constant") == [1, 1, 1]


@pytest.mark.parametrize("schedule", SCHEDULES)
@settings(max_examples=50, deadline=None)
@given(run=runs())
def test_rates_are_positive_and_at_most_lr(schedule: str, run: tuple[int, float, int]) -> None:
    total, lr, warmup = run
    for chosen in (warmup, None):
        found = rates(total, lr, chosen, schedule)
        assert min(found) > 0
        assert max(found) <= lr * (1 + 1e-15)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
@settings(max_examples=50, deadline=None)
@given(run=runs())
def test_one_peak_that_is_lr(schedule: str, run: tuple[int, float, int]) -> None:
    total, lr, warmup = run
    found = rates(total, lr, warmup, schedule)
    peak = max(warmup - 1, 0)
    assert found[peak] == lr
    assert found[: peak + 1] == sorted(found[: peak + 1])
    assert found[peak:] == sorted(found[peak:], reverse=True)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
@settings(max_examples=50, deadline=None)
@given(run=runs())
def test_no_jumps(schedule: str, run: tuple[int, float, int]) -> None:
    """A cosine's slope is at most pi/2 of what it covers; a line's is less."""
    total, lr, warmup = run
    peak = max(warmup - 1, 0)
    for step, (rate, following) in enumerate(
        itertools.pairwise(rates(total, lr, warmup, schedule))
    ):
        length = peak if step < peak else total - 1 - peak
        assert abs(following - rate) <= lr * math.pi / 2 / length * (1 + 1e-9)


def test_the_last_steps_are_small() -> None:
    assert rates(100, 1.0, None, "one-cycle")[-1] == 1 / 250_000
    assert rates(100, 1.0, None, "cosine")[-1] < 1e-3
    assert rates(100)[-1] == 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_after_the_end_it_stays_low(schedule: str) -> None:
    assert learning_rate(500, 100, 1.0, None, schedule) <= rates(100, 1.0, None, schedule)[-1]


@pytest.mark.parametrize(
    ("schedule", "warmup"), [("step", 24), ("cosine", 195), ("one-cycle", 1170), ("constant", 0)]
)
def test_default_warmup_of_ten_epochs_of_cifar(schedule: str, warmup: int) -> None:
    assert default_warmup(3900, schedule) == warmup
    assert rates(3900, 0.1, None, schedule) == rates(3900, 0.1, warmup, schedule)


def test_unknown_schedule() -> None:
    message = "schedule must be one of step, cosine, one-cycle, constant, got 'linear'"
    with pytest.raises(ValueError, match=message):
        learning_rate(0, 10, schedule="linear")
    with pytest.raises(ValueError, match=message):
        learning_rate(0, 10, warmup_steps=2, schedule="linear")


def test_all_parameters_are_decayed_in_the_models_order() -> None:
    model = PreActResNet.from_depth(8)
    (group,) = optimizer_groups(model, 1e-4)
    assert group["weight_decay"] == 1e-4
    assert [id(p) for p in group["params"]] == [id(p) for p in model.parameters()]


def test_norms_and_biases_are_not_decayed() -> None:
    """One step on gradients of 0: what is decayed shrinks by lr * weight_decay, the rest stays."""
    model = PreActResNet.from_depth(8)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(optimizer_groups(model, 0.5, decay_all=False), lr=0.5)
    optimizer.step()
    values = {name: {*p.detach().unique().tolist()} for name, p in model.named_parameters()}
    weights = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    assert values == {name: {0.75} if name in weights else {1.0} for name in values}
    assert weights < values.keys()


class Tied(nn.Module):
    """A weight used twice, a norm with a weight of three dimensions, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = nn.LayerNorm([2, 4, 4])
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(()))


@pytest.mark.parametrize("decay_all", [True, False], ids=["all", "weights"])
def test_each_parameter_is_in_one_group(decay_all: bool) -> None:
    model = Tied()
    groups = optimizer_groups(model, 1e-4, decay_all)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [[names[id(p)] for p in group["params"]] for group in groups]
    weights = ["frozen", "first.weight"]
    rest = ["scale", "first.bias", "second.bias", "norm.weight", "norm.bias"]
    assert sorted(itertools.chain(*found)) == sorted(weights + rest)
    assert found == (
        [[name for name, _ in model.named_parameters()]] if decay_all else [weights, rest]
    )


def test_an_empty_group_is_left_out() -> None:
    (group,) = optimizer_groups(nn.BatchNorm2d(3), 1e-4, decay_all=False)
    assert group["weight_decay"] == 0
    (group,) = optimizer_groups(nn.Conv2d(3, 3, 1, bias=False), 1e-4, decay_all=False)
    assert group["weight_decay"] == 1e-4
