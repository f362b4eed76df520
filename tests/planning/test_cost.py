"""The cost model: bytes and launches of a chain's kernels, and the floor of a step's time."""

import functools

import pytest
import torch
from click.testing import CliRunner

from resnetv2 import BottleneckPreActBlock, PreActBlock, PreActResNet
from resnetv2.cli.plan import plan as plan_command
from resnetv2.core.reading import Reading
from resnetv2.core.run import run_chain
from resnetv2.names import MEMORY_MODES
from resnetv2.planning import cost as module
from resnetv2.planning.cost import (
    Rates,
    chain_costs,
    floor_seconds,
    h100_rates,
    measure_rates,
    step_costs,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("block", [PreActBlock, BottleneckPreActBlock])
def test_cost_is_what_the_interpreter_counts(block):
    """Bytes of activations and weights, without values per channel, and the kernels in order."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("bytes are counted in Triton's interpreter")
    from resnetv2.kernels.inspect import counting

    torch.manual_seed(0)
    units = [block(32, 32).unit_modules()]
    x = torch.randn(2, 32, 16, 16).to(memory_format=torch.channels_last).requires_grad_()
    with counting.count() as forward:
        out = run_chain([Reading(unit) for unit in units], x, backend="triton", memory="recompute")
    with counting.count() as backward:
        out.backward(torch.randn_like(out))
    predicted, _ = chain_costs(units, x, torch.float32, triton=True)
    activation = 8 * 2 * 16 * 16  # elements of the smallest
    for counted, costs in ((forward, predicted.forward), (backward, predicted.backward)):
        moved = sum(
            tensor.read + tensor.written
            for launch in counted.launches
            for name, tensor in launch.tensors.items()
            if name != "workspace_ptr" and (tensor.numel >= activation or len(tensor.shape) == 4)
        )
        assert sum(cost.nbytes for cost in costs) == moved
        # Counters are zeroed once a program, by ATen.
        assert ["zero_", *(launch.name for launch in counted.launches)] == [
            cost.kernel for cost in costs
        ]


# Bytes of activations in w channels times rows, and launches, of a unit in mid-chain.
UNITS = {
    BottleneckPreActBlock: {"forward": (18, 4), "backward": (36, 6)},
    PreActBlock: {"forward": (9, 4), "backward": (21, 7)},
}


@pytest.mark.parametrize("block", UNITS)
def test_bytes_and_launches_of_a_unit(block):
    """With an H100's tiles: what a second unit adds to a chain of one."""
    pytest.importorskip("triton")
    channels = 64 if block is BottleneckPreActBlock else 16
    x = torch.empty(128, channels, 32, 32, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last)
    unit = block(channels, channels).unit_modules()
    one, two = (chain_costs([unit] * n, x, torch.bfloat16, triton=True)[0] for n in (1, 2))
    width = 16 * 128 * 32 * 32 * 2
    for direction, expected in UNITS[block].items():
        once, twice = (getattr(costs, direction) for costs in (one, two))
        moved = sum(c.nbytes for c in twice) - sum(c.nbytes for c in once)
        assert (round(moved / width), len(twice) - len(once)) == expected


def test_modes_cost_what_they_compute_again():
    with torch.device("meta"):
        model = PreActResNet.from_depth(29, "bottleneck")
    rates = Rates(1e9, 1e9, torch.float32, "")
    count = functools.partial(step_costs, model, 4, triton=True)
    floors = [floor_seconds(count(memory=mode).all, rates) for mode in MEMORY_MODES]
    assert floors == sorted(set(floors))


@pytest.mark.parametrize("triton", [True, False])
def test_flops_are_the_convolutions(triton):
    """Of a basic unit: each convolution forward, and twice as many backward."""
    if triton:
        pytest.importorskip("triton")
    x = torch.empty(2, 16, 8, 8, device="meta")
    predicted, _ = chain_costs(
        [PreActBlock(16, 16).unit_modules()], x, torch.float32, triton=triton
    )
    once = 2 * 2 * (2 * 8 * 8) * 16 * 16 * 9
    assert sum(cost.flops for cost in predicted.forward) == once
    assert sum(cost.flops for cost in predicted.backward) == 2 * once


def test_h100_has_no_float64_rate_here():
    with pytest.raises(ValueError, match="expected float32, float16 or bfloat16"):
        h100_rates(torch.float64)


def test_plan_prints_floors_per_mode():
    command = "--depth 29 --block bottleneck --batch-size 8 --dtype bf16 --time --rates h100"
    result = CliRunner().invoke(plan_command, command.split())
    assert result.exit_code == 0, result.output
    floors = result.output[result.output.index("launches") :]
    with torch.device("meta"):
        model = PreActResNet.from_depth(29, "bottleneck")
    for mode in MEMORY_MODES:
        step = step_costs(model, 8, 32, torch.bfloat16, mode, triton=True)
        seconds = floor_seconds(step.all, h100_rates(torch.bfloat16))
        line = next(x for x in floors.splitlines() if x.startswith(f"{mode} "))
        assert line.endswith(f"{1e3 * seconds:.2f} ms")
        assert f" {len(step.all)} " in line
    assert "data sheet of an H100 SXM" in floors


@pytest.mark.parametrize("name", ["preact_resnet50", "preact_resnet18", "wide_resnet16_8"])
def test_a_forwards_flops_by_shapes_are_its_kernels(name):
    """What ``--list-models`` prints within seconds, and ``plan`` counts kernel by kernel."""
    with torch.device("meta"):
        model = module.MODELS[name].build()
    size = module.IMAGE_SIZES[model.stem]
    kernels = module.step_costs(model, 1, size, triton=False).forward
    assert module.forward_flops(model, (size, size)) == sum(cost.flops for cost in kernels)


class Clock:
    """Time that passes only while a run takes it."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)

    def run(self, *seconds):
        """A function whose runs take these seconds, the last ones ever after."""
        left = iter(seconds)

        def run():
            self.now += next(left, seconds[-1])

        return run


def test_a_rate_is_the_best_of_many_runs(monkeypatch):
    """Others have the cores for the first third of a second."""
    clock = Clock(monkeypatch)
    runs = module._timed(clock.run(*[0.2] * 4, 0.05), torch.device("cpu"))
    assert runs.best == pytest.approx(0.05)
    assert runs.number == 4 + 1 + 20
    assert runs.spread == pytest.approx(1)


def test_timing_ends_where_runs_are_long(monkeypatch):
    clock = Clock(monkeypatch)
    assert module._timed(clock.run(10.0), torch.device("cpu")).number == 1


@pytest.mark.parametrize(
    ("load", "spread", "loaded"),
    [(0.0, 1.02, False), (0.0, 1.9, True), (50.0, 1.02, True)],
    ids=["idle", "uneven", "busy"],
)
def test_rates_of_a_loaded_machine_are_said_to_be_so(load, spread, loaded, monkeypatch):
    monkeypatch.setattr(module, "_load", lambda: load)
    monkeypatch.setattr(module, "_timed", lambda *_: module.Runs(0.01, spread, 30))
    source = measure_rates("cpu").source
    assert f"best of 30, the median {spread:.2f} times as long" in source
    assert ("this machine is loaded" in source) == loaded
