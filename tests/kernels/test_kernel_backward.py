"""Both gradients of a 1x1 convolution in one launch, against the float64 reference."""

from __future__ import annotations

import dataclasses
from operator import attrgetter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.kernel_checks import (
    BF16,
    F16,
    F32,
    STREAMS,
    activation,
    assert_accurate,
    assert_same_bits,
    exactly,
    in_turn,
    per_channel,
    poisoned_memory,  # noqa: F401
)

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import conv_backward, launch, reference
from resnetv2.kernels.conv_backward import Gradients
from resnetv2.kernels.launch import Config
from resnetv2.kernels.operands import ACTS, Act, Geometry, Grad, running_stats

RELU = Act("relu")
# (N, C, H, W), K: the tile's products lie as (k, c) or, from 64 columns on, as (c, k).
CASES = {
    "c64-k16": ((2, 64, 8, 8), 16),
    "c16-k64": ((1, 16, 5, 13), 64),
    "c17-k70": ((5, 17, 3, 7), 70),
    "c80-k17": ((2, 80, 4, 5), 17),
    "c128-k72": ((1, 128, 9, 5), 72),
}
TILES = {
    "16x16x16": Config(16, 16, 16, num_stages=1),
    "32x64x16": Config(32, 64, 16, num_stages=2),
}


@dataclasses.dataclass
class Problem:
    """Operands of one convolution's backward, and its answers: the kernel's, eager's, exact."""

    shape: tuple[int, int, int, int]
    k: int
    stream: torch.dtype = F32
    dtype: torch.dtype = F32
    form: str = "ABC"
    act: Act = RELU
    with_bias: bool = False
    with_add: bool = False
    training: bool = True
    weight_dtype: torch.dtype = F32
    memory_format: torch.memory_format = torch.contiguous_format
    config: Config | None = None

    def __post_init__(self) -> None:
        n, c, height, width = self.shape
        self.h = activation(self.shape, self.stream)
        out = (n, self.k, height, width)
        waits = None if self.form == "q" else per_channel(4, self.k)
        gh = activation(out, self.stream) if self.form == "ABC" else None
        self.grad = Grad(activation(out, self.dtype), gh, waits)
        weight = (per_channel(self.k, c, 1, 1) / c**0.5).to(self.weight_dtype)
        self.weight = weight.to(memory_format=self.memory_format)
        affine = per_channel(c), per_channel(c)
        self.stats = running_stats(per_channel(c), per_channel(c).square() + 0.5, *affine, 1e-5)
        self.add = activation(self.shape, self.dtype) if self.with_add else None
        if self.config is None:
            # Any shape has a tile, though the dispatcher leaves some to two kernels.
            self.config = conv_backward.tile(
                self.grad, self.weight, self.h, Geometry(),
                dtype=self.dtype, act=self.act, add=self.add,
            ) or Config(64, 64 if c >= 64 else 32, 64, num_stages=2)  # fmt: skip

    def kernel(self, write: bool = True) -> Gradients:
        return conv_backward.conv_backward(
            self.grad, self.weight, self.h, Geometry(), dtype=self.dtype, stats=self.stats,
            act=self.act, add=self.add, write=write, training=self.training,
            with_bias=self.with_bias, config=self.config,
        )  # fmt: skip

    def oracle(self, exact: bool) -> Gradients:
        def of(value: Any) -> Any:
            return exactly(value) if exact else value

        grad, dtype = Grad(*map(of, self.grad)), torch.float64 if exact else self.dtype
        operands, rest = (of(self.weight), of(self.h)), {"dtype": dtype, "stats": of(self.stats)}
        q, sums = reference.conv_dgrad(
            grad, *operands, Geometry(), act=self.act, add=of(self.add),
            training=self.training, **rest,
        )  # fmt: skip
        dweight, dbias = reference.conv_wgrad(
            grad, *operands[::-1], Geometry(), act=self.act, with_bias=self.with_bias, **rest
        )
        assert sums is not None
        return Gradients(q, sums, dweight, dbias)

    def check(self, write: bool = True) -> None:
        found, eager, exact = self.kernel(write), self.oracle(False), self.oracle(True)
        assert found.dweight.stride() == self.weight.stride()
        assert (found.q is not None) == write
        assert (found.dbias is not None) == self.with_bias
        assert exact.q is not None
        stats = self.stats.double()
        distance = (self.h.double() - stats[0].view(1, -1, 1, 1)) * stats[2].view(1, -1, 1, 1)
        s1, s2 = (float(x.norm()) for x in (exact.q, exact.q * distance))
        g = reference.input_grad(Grad(*map(exactly, self.grad)))
        z = reference.norm_act(self.h.double(), stats, self.act, torch.float64)
        _, squares, _ = reference.convolution_backward(
            g.square(), z.square(), self.weight.double(), Geometry(), (False, True, False)
        )
        assert squares is not None
        terms = {
            "dweight": float(squares.sum().sqrt()),
            "dbias": float(g.norm()),
            "q": 0.0,
            "sums.dweight": s2,
            "sums.dbias": s1,
        }
        for name, size in terms.items():
            values = [attrgetter(name)(gradients) for gradients in (found, eager, exact)]
            if values[0] is not None:
                assert_accurate(*values, size, name)
        # What the sums give: A and mean are copied, B and C are S2 and S1 over the rows.
        rows = self.h.numel() // self.h.shape[1]
        of_rows = [found.sums.dweight * self.stats[2] / rows, found.sums.dbias / rows]
        expected = [self.stats[3], *(x * self.training for x in of_rows), self.stats[0]]
        torch.testing.assert_close(found.sums.coef, torch.stack(expected), rtol=1e-5, atol=1e-30)


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are split over rows as on a device of several multiprocessors."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(multiprocessors=3))


@in_turn("case, stream", CASES, STREAMS.items(), each=2)
def test_both_gradients(case: Any, stream: tuple[torch.dtype, torch.dtype]) -> None:
    Problem(*case, *stream, memory_format=torch.channels_last).check()


@in_turn("kind, form", {kind: kind for kind in ACTS}, [(f, f) for f in ("q", "A", "ABC")])
def test_every_prologue(kind: str, form: str) -> None:
    Problem((2, 70, 5, 4), 9, F32, BF16, form, Act(kind, 0.2), with_bias=True).check()


@pytest.mark.parametrize("write", [True, False], ids=["q", "sums"])
@in_turn("config, dtype", TILES, [("bf16", BF16), ("fp16", F16)])
def test_tiles_and_endings(config: Config, dtype: torch.dtype, write: bool) -> None:
    """Several tiles along rows and channels, the last of each cut short; a further gradient."""
    Problem(
        (2, 70, 7, 5), 35, dtype, dtype, "ABC", with_bias=True, with_add=True,
        weight_dtype=dtype, training=write, config=config,
    ).check(write)  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 132])
def test_any_number_of_splits(multiprocessors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    device = launch.INTERPRETER._replace(multiprocessors=multiprocessors)
    monkeypatch.setattr(launch, "INTERPRETER", device)
    Problem((2, 64, 16, 9), 20, BF16, BF16, with_bias=True).check()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_backward, "is_wide", lambda *tensors: True)
    Problem(*CASES["c64-k16"]).check()


def test_nan_and_inf_pass_as_in_eager() -> None:
    problem = Problem(*CASES["c80-k17"])
    problem.h[0, 3, 2, 2] = float("nan")
    problem.h[1, 5, 0, 0] = float("inf")
    problem.grad.q[0, 1, 2, 4] = float("inf")
    found, eager = problem.kernel(), problem.oracle(False)
    assert found.q is not None
    assert eager.q is not None
    for one, other in (
        (found.q, eager.q),
        (found.dweight, eager.dweight),
        *zip(found.sums, eager.sums),
    ):
        assert torch.equal(one.isfinite(), other.isfinite())
        assert not one.isfinite().all()


def test_the_same_inputs_give_the_same_bits_in_one_launch() -> None:
    problem = Problem(*CASES["c64-k16"], BF16, BF16, with_bias=True)
    names: list[str] = []
    with launch.record(lambda name, grid, constants: names.append(name)):
        runs = [problem.kernel() for _ in range(2)]
    assert names == ["_conv_backward_kernel"] * 2
    first, second = ([run.q, *run.sums, run.dweight, run.dbias] for run in runs)
    for one, other in zip(first, second, strict=True):
        assert one is not None
        assert other is not None
        assert_same_bits(one, other)


def test_refuses_what_is_no_1x1() -> None:
    problem = Problem(*CASES["c64-k16"])
    with pytest.raises(ValueError, match="expects a 1x1 kernel, stride 1 and no padding, got 1x1"):
        conv_backward.conv_backward(
            Grad(problem.grad.q[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)),
            problem.weight, problem.h, Geometry((2, 2)), dtype=F32, stats=problem.stats, act=RELU,
        )  # fmt: skip


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 80, 7, 7))),
    k=st.integers(1, 80),
    form=st.sampled_from(["q", "A", "ABC"]),
    act=st.builds(Act, st.sampled_from(ACTS), st.just(0.1)),
    dtype=st.sampled_from([F32, F16, BF16]),
    bias=st.booleans(),
    add=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_convolution(
    shape: tuple[int, int, int, int],
    k: int,
    form: str,
    act: Act,
    dtype: torch.dtype,
    bias: bool,
    add: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    Problem(shape, k, dtype, dtype, form, act, bias, add).check()
