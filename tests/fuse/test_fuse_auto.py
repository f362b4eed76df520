"""``fuse(model, memory="auto", budget=...)``: the fastest mode whose step fits, for any model.

Promises: what is predicted is what PyTorch's allocator hands out; nothing of the model is touched
but the modes of its blocks; ``explain`` says what was chosen.
"""

from __future__ import annotations

import copy
import gc
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from resnetv2 import BudgetError, explain, fuse, plan, unfuse
from resnetv2.core.memory import format_bytes
from resnetv2.fuse.auto import FUSION, auto_memory, steps_of
from resnetv2.names import MEMORY_MODES
from resnetv2.planning.memory import peak_bytes
from tests.support.yardstick import DEVICE

pytestmark = pytest.mark.usefixtures("one_thread")


class Block(nn.Module):
    """A pre-activation bottleneck under names of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 4
        self.n1, self.c1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.n3, self.c3 = nn.BatchNorm2d(width), nn.Conv2d(width, channels, 1, bias=False)

    def forward(self, x):
        y = self.c1(F.relu(self.n1(x)))
        y = self.c2(F.relu(self.n2(y)))
        return x + self.c3(F.relu(self.n3(y)))


class Net(nn.Module):
    """Chains with other layers before, between and after them: most bytes are not the chains'."""

    def __init__(self, units: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.ReLU(True))
        self.first = nn.Sequential(*(Block(32) for _ in range(units)))
        self.down = nn.Sequential(nn.Conv2d(32, 64, 3, 2, 1), nn.GroupNorm(4, 64), nn.SiLU())
        self.second = nn.Sequential(*(Block(64) for _ in range(units)))
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x, scale=None):
        x = self.second(self.down(self.first(self.stem(x))))
        return self.fc(self.drop(x.mean((2, 3)) if scale is None else x.mean((2, 3)) * scale))


def net(memory="auto", budget="1GB", **options):
    torch.manual_seed(0)
    model = Net(**options).to(DEVICE, memory_format=torch.channels_last)
    # Under the interpreter "auto" would be Triton: slow, and not what allocates on a CPU.
    backend = "auto" if DEVICE.type == "cuda" else "aten"
    return fuse(model, memory=memory, budget=budget, backend=backend)


def images(batch=8):
    x = torch.randn(batch, 3, 16, 16, device=DEVICE)
    return x.contiguous(memory_format=torch.channels_last)


def step(model, x, autocast=False):
    model.zero_grad()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = model(x)
    F.cross_entropy(
        out.float(), torch.zeros(x.shape[0], dtype=torch.long, device=DEVICE)
    ).backward()


def chosen(model):
    hook = auto_memory(model)
    assert hook is not None
    return list(hook.chosen.values())


def mode_of(model):
    (mode,) = {m.__dict__[FUSION].memory for m in model.modules() if FUSION in m.__dict__}
    return mode


def resident(model):
    """Parameters, buffers and momentum."""
    tensors = [*model.parameters(), *model.buffers(), *model.parameters()]
    return sum(t.numel() * t.element_size() for t in tensors)


def planned(model, x, autocast=False):
    """Peak of a step in each mode, by mode."""
    steps = steps_of(model, (x,), {}, x.shape[0], x.device)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        return {mode: steps(x.shape[0], mode).peak + resident(model) for mode in MEMORY_MODES}


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_peak_is_as_predicted(mode, autocast):
    model, x = net(mode, None), images()
    predicted = planned(copy.deepcopy(model), x, autocast)[mode]
    step(model, x, autocast)
    model.zero_grad()
    gc.collect()  # what earlier tests left would go in the middle of the step
    measured = peak_bytes(lambda: step(model, x, autocast), x.is_cuda) + resident(model)
    # The loss, which is not the model's, holds logits and labels.
    assert measured - 1024 <= predicted <= 1.03 * measured


def test_it_takes_the_fastest_that_fits_and_says_so():
    x = images()
    peaks = planned(net(), x)
    assert sorted(peaks.values(), reverse=True) == list(peaks.values())
    for mode, peak in peaks.items():
        model = net(budget=peak)
        assert "memory auto: chosen at the first training step, to fit" in str(explain(model))
        step(model, x)
        assert mode_of(model) == mode
        (row,) = chosen(model)
        assert (row.mode, row.peak) == (mode, peak)
        text = f"memory auto: {mode} for inputs of 8x3x16x16, predicted peak {format_bytes(peak)}, "
        assert text in str(explain(model))
    least = min(peaks.values())
    needs = f"a step of batch 8 needs at least {format_bytes(least)}"
    with pytest.raises(BudgetError, match=rf"{needs}.*; the largest batch that fits is [4-7]"):
        net(budget=least - 1000)(x)


def test_it_chooses_again_for_other_inputs():
    few, many = images(2), images(8)
    model = net(budget=planned(net(), many)["segment"])
    for x, mode in ((few, "recompute"), (many, "segment"), (few, "recompute")):
        step(model, x)
        assert mode_of(model) == mode
    assert [row.mode for row in chosen(model)] == ["recompute", "segment"]
    with torch.no_grad():
        model(images(1))
    assert len(chosen(model)) == 2, "without gradients nothing is kept"


def test_nothing_else_changes():
    """Choosing leaves buffers, gradients and random numbers alone: the step has the same bits."""
    fixed, automatic, x = net("recompute", None), net(), images()
    for model in (fixed, automatic):
        torch.manual_seed(1)
        step(model, x)
    for (name, a), b in zip(fixed.state_dict().items(), automatic.state_dict().values()):
        assert torch.equal(a, b), name
    for a, b in zip(fixed.parameters(), automatic.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_copies_and_files_choose_too():
    model, x = net(), images(2)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        step(other, x)
        assert mode_of(other) == "recompute"
        assert len(chosen(other)) == 1
    assert chosen(model) == []


def test_it_is_taken_back():
    model = net()
    fuse(model, memory="invert")
    assert auto_memory(model) is None
    assert "memory auto" not in str(explain(model))
    fuse(model, memory="auto", budget="1GB")
    unfuse(model)
    assert auto_memory(model) is None
    assert not model._forward_pre_hooks_with_kwargs


def test_keywords_and_compiled():
    model, x = net(), images(2)
    model(x=x, scale=torch.tensor(2.0, device=DEVICE))
    torch.compile(model, backend="eager")(x)
    assert [row.mode for row in chosen(model)] == ["recompute"] * 2


def test_a_forward_that_needs_values():
    class Asks(Net):
        def forward(self, x, scale=None):
            return super().forward(x / x.abs().max().item())

    model = fuse(Asks(1), memory="auto", budget="1GB", backend="aten").to(DEVICE)
    with pytest.raises(ValueError, match=r"cannot follow the forward of Asks .*: name a memory"):
        model(images(2))
    assert mode_of(model) == "recompute"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "auto", "budget": "lots"}, "expected bytes like"),
        ({"memory": "auto", "budget": 0}, "must be positive"),
        ({"memory": "invert", "budget": "1GB"}, 'budget is for memory "auto"'),
        ({"memory": "least"}, "memory must be one of .*, auto, got 'least'"),
    ],
    ids=["no-bytes", "nothing", "another-mode", "no-mode"],
)
def test_bad_budgets_are_refused(options, message):
    model = Net(1)
    with pytest.raises(ValueError, match=message):
        fuse(model, **options)
    assert type(model.first[0]) is Block


def test_no_budget_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("a GPU's free memory is the budget")
    with pytest.raises(ValueError, match="needs a budget where there is no GPU"):
        fuse(Net(1), memory="auto")


def test_plan_names_it_for_other_models():
    with pytest.raises(
        TypeError, match=r"expected a PreActResNet, .* got Net: fuse\(model, memory="
    ):
        plan(Net(1), 8)
