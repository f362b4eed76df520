"""Programs: what is replayed has the bits of what is computed afresh, whatever changed between."""

import copy
import gc
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.blocks import Stage
from resnetv2.core import execution, parts
from resnetv2.core.program import Programs, record
from resnetv2.core.reading import read
from resnetv2.core.steps import Alloc, Call, Launch
from resnetv2.kernels import recording
from resnetv2.names import MEMORY_MODES
from tests.support.yardstick import (
    BACKENDS,
    DEVICE,
    assert_equal_steps,
    images,
    needs_triton,
    randomise,
    step,
)

pytestmark = pytest.mark.usefixtures("one_thread")
backends = pytest.mark.parametrize("backend", BACKENDS)


def stage(backend: str, memory: str = "recompute", units: int = 3, seed: int = 0) -> Stage:
    """A projection and some equal units."""
    torch.manual_seed(seed)
    blocks = [BottleneckPreActBlock(8, 16), *(BottleneckPreActBlock(16, 16) for _ in range(units))]
    return randomise(Stage(*blocks, backend=backend, memory=memory)).to(
        DEVICE, memory_format=torch.channels_last
    )


def afresh(model: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """A step of a copy that nothing was recorded for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execution, "PROGRAMS", Programs(limit=64))
        return step(copy.deepcopy(model), x, **options)


# --- what may change between two calls ------------------------------------------------------------


def in_place(model: Stage) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5).add_(0.1)


def replaced(model: Stage) -> None:
    model[1].conv1.weight = nn.Parameter(torch.randn_like(model[1].conv1.weight) / 4)
    model[2].bn1 = copy.deepcopy(model[2].bn1)


def moved(model: Stage) -> None:
    for p in model.parameters():
        p.data = p.data.clone()


def transposed(model: Stage) -> None:
    """Same memory, other strides."""
    weight = model[1].conv3.weight
    square = torch.randn(16, 16, device=weight.device) / 4
    model[1].conv3.weight = nn.Parameter(square[:, :4].reshape(16, 4, 1, 1).contiguous())
    model[2].conv2.weight.data = model[2].conv2.weight.data.transpose(0, 1)


def unaligned(model: Stage) -> None:
    """A parameter 4 bytes into a buffer, as optimizers and DDP lay them out."""
    for p in (model[1].bn2.weight, model[2].conv2.weight):
        flat = torch.empty(p.numel() + 1, device=p.device)
        p.data = flat[1:].as_strided(p.shape, p.stride()).copy_(p.data)


def evaluating(model: Stage) -> None:
    model[1].eval()


def frozen(model: Stage) -> None:
    model[0].requires_grad_(False)
    model[2].conv2.weight.requires_grad_(False)


def eps_and_momentum(model: Stage) -> None:
    model[1].bn1.eps, model[1].bn2.momentum, model[2].bn3.momentum = 0.1, 0.9, None


def other_layout(model: Stage) -> None:
    model.to(memory_format=torch.contiguous_format)


def other_memory(model: Stage) -> None:
    model.memory = "invert" if model.memory != "invert" else "recompute"


def without_statistics(model: Stage) -> None:
    model[1].bn2.track_running_stats = False
    model[1].bn2.running_mean = model[1].bn2.running_var = None


def other_activation(model: Stage) -> None:
    model[1].act = nn.SiLU()


def hooked(model: Stage) -> None:
    model[1].register_forward_hook(lambda module, args, out: out * 2)


CHANGES: list[Callable[[Stage], None]] = [
    in_place, replaced, moved, transposed, unaligned, evaluating, frozen, eps_and_momentum,
    other_layout, other_memory, without_statistics, other_activation, hooked,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_nothing_stale_is_replayed(change: Callable[[Stage], None]) -> None:
    model, x = stage("aten", units=2), images((2, 8, 4, 4))
    for _ in range(2):
        step(model, x)
    change(model)
    for _ in range(2):
        expected = afresh(model, x)
        assert_equal_steps(step(model, x), expected)


@needs_triton
def test_no_stale_kernels_are_replayed() -> None:
    """What a launch is given: addresses, their alignment, strides and constants.

    Changes upon changes, since a step in the interpreter takes long.
    """
    model, x = stage("triton", units=2), images((2, 8, 4, 4))
    step(model, x)
    for changes in (
        (moved, unaligned), (transposed, evaluating), (eps_and_momentum, other_activation)
    ):  # fmt: skip
        for change in changes:
            change(model)
        expected = afresh(model, x)
        assert_equal_steps(step(model, x), expected)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(st.sampled_from(CHANGES), min_size=1, max_size=3),
    memory=st.sampled_from(MEMORY_MODES),
    shapes=st.lists(st.sampled_from([(2, 8, 4, 4), (3, 8, 5, 3)]), min_size=2, max_size=3),
    autocast=st.sampled_from([None, torch.bfloat16]),
    basic=st.booleans(),
    units=st.sampled_from([1, 2, 16]),
)
def test_any_course_of_calls(changes, memory, shapes, autocast, basic, units) -> None:
    model = stage("aten", memory, units=2)
    if basic:
        model.append(PreActBlock(16, 16, backend="aten"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "UNITS", units)
        for change, shape in zip([lambda model: None, *changes], itertools.cycle(shapes)):
            change(model)
            for cast in (None, autocast):
                x = images(shape)
                expected = afresh(model, x, autocast=cast)
                assert_equal_steps(step(model, x, autocast=cast), expected)


@backends
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_parts_have_the_bits_of_the_whole(backend: str, memory: str) -> None:
    model, x = stage(backend, memory), images((2, 8, 4, 4))
    if memory == "segment":
        model.segment = 2
    whole = afresh(model, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "UNITS", 2)
        assert_equal_steps(afresh(model, x), whole)


@pytest.mark.parametrize("memory", ["recompute", "invert", "segment"])
def test_gradients_of_gradients_cross_parts(memory: str) -> None:
    """Where the stream is walked back, no part but the first keeps its input."""
    model = stage("aten", memory).double().eval()
    model.segment = 2
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.__class__ = nn.SiLU  # of some curvature
    eager = copy.deepcopy(model)
    for block in eager:
        block.backend = "eager"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "UNITS", 2)
        for each in (model, eager):
            x = images((2, 8, 4, 4), dtype=torch.float64).requires_grad_()
            (dx,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
            found.append(torch.autograd.grad(dx.square().sum(), [x, *each.parameters()]))
    for mine, theirs in zip(*found):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_two_forwards_before_the_backwards() -> None:
    model = stage("aten", "invert")
    inputs = [images((2, 8, 4, 4), seed).requires_grad_() for seed in range(2)]
    expected = [afresh(model.eval(), x.detach())["dx"] for x in inputs]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "UNITS", 2)
        outputs = [model(x) for x in inputs]
        for seed, out in enumerate(outputs):
            out.backward(images(out.shape, 500))
            torch.testing.assert_close(inputs[seed].grad, expected[seed], rtol=0, atol=0)


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_a_graph_can_be_walked_twice(memory: str) -> None:
    model, x = stage("aten", memory), images((2, 8, 4, 4)).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "UNITS", 2)
        out = model(x)
        first = torch.autograd.grad(out.sum(), [x, *model.parameters()], retain_graph=True)
        second = torch.autograd.grad(out.sum(), [x, *model.parameters()])
    for one, other in zip(first, second):
        assert torch.equal(one, other)


def test_parameters_moved_before_the_backward() -> None:
    """The backward reads the parameters that there are, as eager's does."""
    model, x = stage("aten"), images((2, 8, 4, 4))
    expected = afresh(model, x)
    x = x.clone().requires_grad_()
    out = model(x)
    moved(model)
    out.backward(images(out.shape, 500))
    assert torch.equal(x.grad, expected["dx"])


def test_a_weight_changed_before_the_backward_is_an_error() -> None:
    model, x = stage("aten"), images((2, 8, 4, 4)).requires_grad_()
    out = model(x)
    in_place(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_many_threads() -> None:
    """Each with a model of its own and all with one model."""
    shared, x = stage("aten").eval(), images((2, 8, 4, 4))
    expected = shared(x)
    found: list[Tensor] = []

    def work() -> None:
        for _ in range(5):
            found.append(shared(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    assert all(torch.equal(out, expected) for out in found)


# --- programs themselves --------------------------------------------------------------------------


def recorded(backend: str, memory: str = "recompute") -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        programs = Programs(limit=64)
        patch.setattr(execution, "PROGRAMS", programs)
        step(stage(backend, memory), images((2, 8, 6, 6)))
        return [program for program, *_ in programs._kept.values()]


@pytest.mark.parametrize("backend", [BACKENDS[1]])
@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_arena_holds_what_lives_at_a_time(backend: str, memory: str) -> None:
    """No two tensors share bytes while both live, and little is lost between them."""
    for program in recorded(backend, memory):
        uses: dict[int, list[int]] = {}
        for place, each in enumerate(program.steps):
            if isinstance(each, Launch):
                for a in each.args:
                    if getattr(a, "register", None) in program.offsets:
                        uses.setdefault(a.register, []).append(place)
        sizes = {number: alloc.nbytes for number, alloc in program.allocs().items()}
        for a, b in itertools.combinations(program.offsets, 2):
            if min(uses[a]) <= max(uses[b]) and min(uses[b]) <= max(uses[a]):
                first, second = sorted((a, b), key=program.offsets.__getitem__)
                assert program.offsets[first] + sizes[first] <= program.offsets[second]
        live = [
            sum(sizes[n] + 255 for n, at in uses.items() if min(at) <= place <= max(at))
            for place in range(len(program.steps))
        ]
        assert program.arena <= 1.25 * max(live, default=0)


@pytest.mark.parametrize("backend", [BACKENDS[1]])
def test_kernels_write_statistics_in_their_places(backend: str) -> None:
    """No copy joins them: every program zeroes its counters, and is launches otherwise."""
    for program in recorded(backend):
        zeros, *launches = (each for each in program.steps if not isinstance(each, Alloc))
        assert zeros.function is torch.ops.aten.zero_.default
        assert all(isinstance(each, Launch) for each in launches)


@pytest.mark.parametrize("backend", [BACKENDS[1]])
def test_no_two_launches_count_in_the_same_place(backend: str) -> None:
    """Nor beside it: a launch's begin where 16 bytes can be addressed."""
    for program in recorded(backend):
        (zeros,) = (each for each in program.steps if isinstance(each, Call))
        (register,) = zeros.results
        places = [
            (a.offset, 4 * math.prod(a.size))
            for each in program.steps
            if isinstance(each, Launch)
            for a in each.args
            if getattr(a, "register", None) == register
        ]
        assert places
        ends = [begin + size for begin, size in places]
        assert all(begin % 16 == 0 for begin, _ in places)
        assert all(end <= begin for end, (begin, _) in zip([0, *ends], places))
        assert ends[-1] <= program.allocs()[register].nbytes


def test_equal_parts_share_a_program() -> None:
    with pytest.MonkeyPatch.context() as patch:
        programs = Programs(limit=64)
        patch.setattr(execution, "PROGRAMS", programs)
        patch.setattr(parts, "UNITS", 2)
        step(stage("aten", units=9), images((2, 8, 4, 4)))
        assert len(programs) == 6  # first, middle and last part, forward and backward


def test_programs_are_bounded() -> None:
    programs = Programs(limit=2)
    for n in range(5):
        x = torch.ones(n + 1)
        (result,), _ = programs.run(n, lambda x: ([x + 1], None), [x], x.device)
        assert torch.equal(result, x + 1)
    assert len(programs) == 2


def test_results_may_be_inputs_and_views() -> None:
    x = torch.arange(6.0)

    def function(x: Tensor) -> tuple[list[Tensor], None]:
        y = torch.empty(6)
        y.copy_(x)
        return [x, y.view(2, 3), y.mul_(2)], None

    program, first, _ = record(function, [x], x.device)
    again = program([x.clone()])
    for one, other in zip(first, again):
        assert torch.equal(one, other)
    assert again[1].data_ptr() == again[2].data_ptr()


def test_what_is_tried_out_is_not_recorded() -> None:
    """Tiles may be timed while a chain is recorded."""

    def function(x: Tensor) -> tuple[list[Tensor], None]:
        with recording.paused():
            torch.ones(5).mul_(3)
        return [x + 1], None

    program, _, _ = record(function, [torch.ones(3)], torch.device("cpu"))
    assert len(program.steps) == 1


def test_a_tensor_from_elsewhere_is_refused() -> None:
    """A program would go on using the one that it was recorded with."""
    other = torch.ones(3)
    with pytest.raises(KeyError, match="none of its inputs"):
        record(lambda x: ([x + other], None), [torch.ones(3)], other.device)


def test_readings_do_not_keep_blocks_alive() -> None:
    import weakref

    block = PreActBlock(4, 4, backend="aten")
    block(images((2, 4, 3, 3)).cpu())
    assert read(block, "inside") is read(block, "inside")
    gone = weakref.ref(block)
    del block
    gc.collect()
    assert gone() is None
