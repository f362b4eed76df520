"""What the last program to arrive merges has the same bits in whatever order programs arrive."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

import triton
import triton.language as tl

from resnetv2 import BottleneckPreActBlock, PreActBlock
from resnetv2.kernels import (
    choices,
    configs,
    conv_backward,
    conv_dgrad,
    conv_forward,
    conv_wgrad,
    launch,
    merging,
    moments,
    norm_backward,
)
from resnetv2.kernels.inspect import counting
from resnetv2.kernels.launch import Config
from resnetv2.kernels.operands import Act, Geometry, Grad, Norm
from resnetv2.kernels.wgrad_config import WgradConfig
from tests.support.interpreter import programs_in_order
from tests.support.kernel_checks import (
    BF16,
    DEVICE,
    F32,
    activation,
    assert_same_bits,
    per_channel,
    poisoned_memory,  # noqa: F401
)
from tests.support.yardstick import assert_equal_steps, images, randomise, step

pytestmark = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="programs are ordered in Triton's interpreter"
)

# 10 tiles of 16 rows, and so three groups of at most four, by two blocks of channels.
SHAPE = (2, 20, 5, 16)
TILE = Config(16, 16, 16, num_stages=1)
RELU = Act("relu")


def _longer() -> Tensor:
    """For kernels whose tiles are wider."""
    return activation((8, *SHAPE[1:]), F32, 3.0)


def _forward(h: Tensor) -> list[Tensor]:
    norm = Norm(per_channel(24), per_channel(24), 1e-5)
    weight = per_channel(24, 20, 1, 1)
    out, stats = conv_forward.conv_forward(
        h, weight, None, Geometry(), dtype=BF16, with_moments=True, norm=norm, config=TILE
    )
    assert isinstance(stats, Tensor)
    return [out, stats]


def _dgrad(h: Tensor) -> list[Tensor]:
    q, grads = conv_dgrad.conv_dgrad(
        Grad(activation((2, 24, 5, 16), BF16)), per_channel(24, 20, 1, 1), h, Geometry(),
        dtype=BF16, stats=per_channel(5, 20), act=RELU, config=TILE,
    )  # fmt: skip
    assert q is not None
    assert grads is not None
    return [q, *grads]


def _wgrad(h: Tensor) -> list[Tensor]:
    weight = per_channel(24, 20, 1, 1)
    dweight, dbias = conv_wgrad.conv_wgrad(
        Grad(activation((2, 24, 5, 16), BF16)), h, weight, Geometry(),
        dtype=BF16, with_bias=True,
    )  # fmt: skip
    assert dbias is not None
    return [dweight, dbias]


def _backward(h: Tensor) -> list[Tensor]:
    q, sums, dweight, dbias = conv_backward.conv_backward(
        Grad(activation((2, 24, 5, 16), BF16)), per_channel(24, 20, 1, 1), h, Geometry(),
        dtype=BF16, stats=per_channel(5, 20), act=RELU, with_bias=True, config=TILE,
    )  # fmt: skip
    assert q is not None
    assert dbias is not None
    return [q, *sums, dweight, dbias]


def _of_groups(h: Tensor) -> list[Tensor]:
    norm = Norm(per_channel(20), per_channel(len(h), 20), 1e-5, 4)
    found = moments.moments(h, norm)
    assert isinstance(found, tuple)
    return list(found)


def _groups_backward(h: Tensor) -> list[Tensor]:
    norm = Norm(per_channel(20), per_channel(len(h), 20), 1e-5, 4)
    stats = per_channel(5, len(h), 20)
    return list(norm_backward.act_backward(h, h, stats, Act("silu"), norm=norm)[1])


CALLS: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "moments": lambda h: [moments.moments(_longer(), Norm(None, None, 1e-5))],  # type: ignore[list-item]
    "forward": _forward,
    "dgrad": _dgrad,
    "wgrad": _wgrad,
    "backward": _backward,
    "act-backward": lambda h: list(
        norm_backward.act_backward(_longer(), _longer(), per_channel(5, 20), Act("silu"))[1]
    ),
    "groups": lambda h: _of_groups(_longer()),
    "groups-backward": lambda h: _groups_backward(_longer()),
}


def _shuffled(programs: int, seed: int = 0) -> Sequence[int]:
    return random.Random(programs + seed).sample(range(programs), programs)


@pytest.fixture
def many_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are cut into many tiles, and those merged in groups."""
    device = launch.INTERPRETER._replace(multiprocessors=30)
    monkeypatch.setattr(launch, "INTERPRETER", device)
    monkeypatch.setattr(merging, "_SMALLEST_GROUP", 1)
    monkeypatch.setattr(configs, "conv", lambda *shape: TILE)
    tile = WgradConfig(16, 16, 64, 1, 4, 1)
    monkeypatch.setattr(conv_wgrad, "config_of", lambda *shape, **options: tile)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_any_order_of_programs(call: Callable[[Tensor], list[Tensor]], many_programs: None) -> None:
    h = activation(SHAPE, F32, 3.0)
    found = []
    for order in (range, lambda n: range(n)[::-1], _shuffled):
        torch.manual_seed(0)
        programs: list[int] = []

        def ordered(number: int, order: Any = order, programs: list[int] = programs) -> Any:
            programs.append(number)
            return order(number)

        with programs_in_order(ordered):
            found.append(call(h))
        assert max(programs) >= 2 * 10
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one.isfinite().all()
            assert_same_bits(one, other)


BLOCKS = {
    "basic": lambda: PreActBlock(8, 8, backend="triton"),
    "wide-basic": lambda: PreActBlock(8, 12, 2, backend="triton"),
    "bottleneck": lambda: BottleneckPreActBlock(8, 32, backend="triton"),
    "groups": lambda: PreActBlock(8, 12, 2, norm="group:4", backend="triton"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_ten_steps_have_the_same_bits(
    name: str, many_programs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step of a block, its programs in another order each time."""
    if name.startswith("wide"):
        monkeypatch.setattr(choices, "WIDE", {(1, 1): 512, (3, 3): 1})
    torch.manual_seed(0)
    block = randomise(BLOCKS[name]()).to(DEVICE)
    x = images((3 if name == "groups" else 1, 8, 4, 12))
    first = None
    for run in range(10):
        most: list[int] = []

        def ordered(number: int, run: int = run, most: list[int] = most) -> Sequence[int]:
            most.append(number)
            return _shuffled(number, run)

        with programs_in_order(ordered):
            found = step(copy.deepcopy(block), x)
        assert max(most) >= 3
        first = first or found
        assert_equal_steps(found, first)


@triton.jit
def _sum_kernel(x_ptr, total_ptr, N: tl.constexpr):
    if N == 1:
        tl.atomic_add(total_ptr, 1)
    else:
        tl.atomic_add(total_ptr + tl.arange(0, N) * 0, tl.load(x_ptr + tl.arange(0, N)))


@pytest.mark.parametrize(
    ("dtype", "size", "allowed"),
    [(torch.int32, 1, True), (torch.float32, 1, False), (torch.int32, 4, False)],
    ids=["ticket", "float", "tensor"],
)
def test_tickets_are_the_only_atomics(dtype: torch.dtype, size: int, allowed: bool) -> None:
    """Whoever adds numbers up atomically adds them in another order every time."""
    x, total = torch.ones(size, dtype=dtype), torch.zeros(1, dtype=dtype)
    with counting.count():
        if allowed:
            _sum_kernel[(3,)](x, total, N=size)
            assert int(total) == 3
        else:
            with pytest.raises(triton.runtime.errors.InterpreterError, match="no ticket"):
                _sum_kernel[(3,)](x, total, N=size)
