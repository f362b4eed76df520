"""The convolution's weight gradient against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.kernel_checks import (
    BF16,
    DEVICE,
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

from resnetv2.kernels import conv_wgrad, launch, reference
from resnetv2.kernels.operands import ACTS, IDENTITY, Act, Geometry, Grad
from resnetv2.kernels.wgrad_config import WgradConfig

# (N, C, H, W), K, kernel, stride, padding
CASES = {
    "1x1-c64-k16": ((2, 64, 8, 8), 16, (1, 1), (1, 1), (0, 0)),
    "1x1-c16-k64": ((1, 16, 5, 13), 64, (1, 1), (1, 1), (0, 0)),
    "1x1-c3-k17": ((5, 3, 3, 7), 17, (1, 1), (1, 1), (0, 0)),
    "1x1-c80-k48": ((2, 80, 4, 5), 48, (1, 1), (1, 1), (0, 0)),
    "1x1-stride2": ((2, 17, 7, 9), 33, (1, 1), (2, 2), (0, 0)),
    "1x1-padded": ((1, 17, 3, 4), 3, (1, 1), (1, 1), (1, 2)),
    "3x3-c16-k16": ((3, 16, 8, 16), 16, (3, 3), (1, 1), (1, 1)),
    "3x3-c17-k3": ((2, 17, 5, 7), 3, (3, 3), (1, 1), (1, 1)),
    "3x3-c48-k17": ((1, 48, 9, 6), 17, (3, 3), (1, 1), (1, 1)),
    "3x3-c3-k64": ((2, 3, 11, 5), 64, (3, 3), (1, 1), (1, 1)),
    "3x3-c64-k65": ((1, 64, 4, 4), 65, (3, 3), (1, 1), (1, 1)),
    "3x3-stride2": ((2, 16, 17, 9), 32, (3, 3), (2, 2), (1, 1)),
    "3x3-unpadded": ((2, 5, 6, 7), 7, (3, 3), (1, 1), (0, 0)),
    "3x3-one-pixel": ((4, 9, 1, 1), 6, (3, 3), (1, 1), (1, 1)),
    "7x7-stem": ((1, 3, 17, 17), 20, (7, 7), (2, 2), (3, 3)),
    "5x3-uneven": ((2, 6, 9, 8), 5, (5, 3), (1, 2), (2, 0)),
}
RELU = Act("relu")
Case = tuple[tuple[int, int, int, int], int, tuple[int, int], tuple[int, int], tuple[int, int]]


class Problem:
    """Operands of one weight gradient, and its answers: the kernel's, eager's, exact."""

    def __init__(
        self,
        case: Case,
        stream: torch.dtype = F32,
        dtype: torch.dtype = F32,
        *,
        form: str = "ABC",
        act: Act | None = RELU,
        bias: bool = False,
        weight_dtype: torch.dtype = F32,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        shape, k, kernel, stride, padding = case
        n, c, height, width = shape
        self.geometry = Geometry(stride, padding)
        out = (n, k, *self.geometry.output_size((height, width), kernel))
        self.h = activation(shape, stream)
        q = activation(out, dtype)
        gh = activation(out, stream) if form == "ABC" else None
        self.grad = Grad(q, gh, None if form == "q" else per_channel(4, k))
        weight = torch.empty(k, c, *kernel, device=DEVICE, dtype=weight_dtype)
        self.weight = weight.to(memory_format=memory_format)
        self.stats = None if act is None else per_channel(5, c)
        self.options = {"act": act or IDENTITY, "with_bias": bias}
        self.dtype = dtype

    def kernel(self) -> tuple[Tensor, Tensor | None]:
        return conv_wgrad.conv_wgrad(
            self.grad, self.h, self.weight, self.geometry,
            dtype=self.dtype, stats=self.stats, **self.options,
        )  # fmt: skip

    def eager(self) -> tuple[Tensor, Tensor | None]:
        return reference.conv_wgrad(
            self.grad, self.h, self.weight, self.geometry,
            dtype=self.dtype, stats=self.stats, **self.options,
        )  # fmt: skip

    def exact(self) -> tuple[Tensor, Tensor | None]:
        return reference.conv_wgrad(
            Grad(*map(exactly, self.grad)), self.h.double(), self.weight.double(), self.geometry,
            dtype=torch.float64, stats=exactly(self.stats), **self.options,
        )  # fmt: skip

    def check(self) -> None:
        (dweight, dbias), (eager, eager_bias) = self.kernel(), self.eager()
        exact, exact_bias = self.exact()
        assert dweight.stride() == self.weight.stride()
        assert_accurate(dweight, eager, exact, self.terms())
        if self.options["with_bias"]:
            assert dbias is not None
            assert eager_bias is not None
            assert exact_bias is not None
            terms = float(reference.input_grad(Grad(*map(exactly, self.grad))).norm())
            assert_accurate(dbias, eager_bias, exact_bias, terms, "dbias")
        else:
            assert dbias is None

    def terms(self) -> float:
        """The norm of what is added up over rows: the products of g and z."""
        g = reference.input_grad(Grad(*map(exactly, self.grad)))
        z = reference.norm_act(
            self.h.double(), exactly(self.stats), self.options["act"], torch.float64
        )
        _, squares, _ = reference.convolution_backward(
            g.square(), z.square(), self.weight.double(), self.geometry, (False, True, False)
        )
        assert squares is not None
        return float(squares.sum().sqrt())


@pytest.fixture(autouse=True)
def several_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are split over rows as on a device of several multiprocessors."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(multiprocessors=3))


@in_turn("case, stream", CASES, STREAMS.items())
def test_with_both_prologues(case: Case, stream: tuple[torch.dtype, torch.dtype]) -> None:
    Problem(case, *stream, memory_format=torch.channels_last).check()


@in_turn("case, dtype", CASES, [("fp16", F16), ("bf16", BF16)])
def test_of_written_operands(case: Case, dtype: torch.dtype) -> None:
    """As the dispatcher calls it for a 3x3: z and g as they lie in memory, and a bias."""
    Problem(case, dtype, dtype, form="q", act=None, bias=True, weight_dtype=dtype).check()


@in_turn("kind, form", {kind: kind for kind in ACTS}, [(f, f) for f in ("q", "A", "ABC")])
def test_every_prologue(kind: str, form: str) -> None:
    Problem(
        ((2, 6, 5, 4), 9, (3, 3), (1, 1), (1, 1)), F32, BF16,
        form=form, act=Act(kind, 0.2), bias=True,
    ).check()  # fmt: skip


@pytest.mark.parametrize("multiprocessors", [1, 7, 132])
@pytest.mark.parametrize("case", ["1x1-c16-k64", "3x3-c17-k3"])
def test_any_number_of_splits(
    case: str, multiprocessors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = launch.INTERPRETER._replace(multiprocessors=multiprocessors)
    monkeypatch.setattr(launch, "INTERPRETER", device)
    Problem(CASES[case], BF16, BF16, bias=True).check()


@pytest.mark.parametrize(
    "config",
    [
        WgradConfig(64, 128, 128, 1, 8, 2),
        WgradConfig(32, 64, 128, 1, 4, 2),
        WgradConfig(64, 64, 16, 1, 4, 2),
        WgradConfig(64, 16, 64, 3, 4, 1),
        WgradConfig(16, 16, 16, 2, 4, 1),
    ],
    ids=lambda c: "x".join(map(str, c)),
)
def test_every_kind_of_tile(config: WgradConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_wgrad, "config_of", lambda *shape, **options: config)
    Problem(((1, 20, 7, 6), 24, (3, 3), (1, 1), (1, 1)), BF16, BF16, bias=True).check()


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_wgrad, "is_wide", lambda *tensors: True)
    Problem(CASES["3x3-stride2"]).check()


# --- promises -----------------------------------------------------------------------------------


def test_the_border_is_zero_after_the_activation() -> None:
    """act(b) is not 0: a padded position must not give it."""
    problem = Problem(((1, 4, 3, 3), 4, (3, 3), (1, 1), (1, 1)), form="q")
    problem.h.zero_()
    assert problem.stats is not None
    problem.stats[4] = 5.0
    problem.grad.q.fill_(1.0)
    dweight, _ = problem.kernel()
    # Rows of the output that see the tap inside the image: 2 of 3 at the rim, 3 in the middle.
    seen = torch.tensor([2.0, 3.0, 2.0], device=DEVICE)
    torch.testing.assert_close(dweight, 5 * torch.outer(seen, seen).expand(4, 4, 3, 3))


def test_nan_and_inf_pass_as_in_eager() -> None:
    problem = Problem(CASES["3x3-c17-k3"])
    problem.h[0, 3, 2, 2] = float("nan")
    problem.h[1, 5, 0, 0] = float("inf")
    # Away from the border: there, an Inf in g times the padding's 0 is a NaN here, as in any
    # product of matrices, and nothing in convolutions that skip the padding.
    problem.grad.q[0, 1, 2, 4] = float("inf")
    dweight, _ = problem.kernel()
    eager, _ = problem.eager()
    assert torch.equal(dweight.isfinite(), eager.isfinite())
    assert not dweight.isfinite().all()


def test_a_row_of_another_split_does_not_leak() -> None:
    """Rows past the end are masked in both operands: Inf times a masked 0 would be a NaN."""
    problem = Problem(((1, 16, 1, 9), 16, (1, 1), (1, 1), (0, 0)), form="q", act=None)
    problem.h[0, :, 0, 8] = float("inf")
    problem.grad.q[0, :, 0, 8] = 1.0
    dweight, _ = problem.kernel()
    assert dweight.isposinf().all()


@pytest.mark.parametrize("case", ["1x1-c64-k16", "3x3-c48-k17"])
def test_the_same_inputs_give_the_same_bits(case: str) -> None:
    problem = Problem(CASES[case], BF16, BF16, bias=True)
    for first, second in zip(problem.kernel(), problem.kernel(), strict=True):
        assert first is not None
        assert second is not None
        assert_same_bits(first, second)


def test_one_launch_with_bias() -> None:
    names: list[str] = []
    with launch.record(lambda name, grid, constants: names.append(name)):
        Problem(CASES["3x3-c16-k16"], bias=True).kernel()
    assert names == ["_conv_wgrad_kernel"]


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, top) for top in (3, 80, 11, 11))),
    k=st.integers(1, 80),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3])),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padded=st.booleans(),
    form=st.sampled_from(["q", "A", "ABC"]),
    act=st.none() | st.builds(Act, st.sampled_from(ACTS), st.just(0.1)),
    dtype=st.sampled_from([F32, F16, BF16]),
    bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_convolution(
    shape: tuple[int, int, int, int],
    k: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padded: bool,
    form: str,
    act: Act | None,
    dtype: torch.dtype,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    reach = tuple(size // 2 for size in kernel)
    padding = reach if padded or shape[2] < kernel[0] or shape[3] < kernel[1] else (0, 0)
    case = (shape, k, kernel, stride, (padding[0], padding[1]))
    Problem(case, dtype, dtype, form=form, act=act, bias=bias).check()
