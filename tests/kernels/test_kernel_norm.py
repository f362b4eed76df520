"""The elementwise kernels and reductions around a norm, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.kernel_checks import (
    BF16,
    DEVICE,
    DTYPES_IN_TURN,
    F16,
    F32,
    STREAMS,
    activation,
    assert_accurate,
    assert_same_bits,
    assert_same_specials,
    exactly,
    in_turn,
    per_channel,
    poisoned_memory,  # noqa: F401
)

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import input_grad, launch, moments, norm_act, norm_backward, reference
from resnetv2.kernels.operands import (
    ACTS,
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    VAR,
    Act,
    Activated,
    Grad,
    Norm,
    Partials,
)
from resnetv2.kernels.ranks import gather_sums

SHAPES = {
    "one-row": (1, 17, 1, 1),
    "one-channel": (2, 1, 17, 3),
    "c3": (2, 3, 5, 7),
    "c16-whole-blocks": (4, 16, 16, 8),
    "c17": (3, 17, 11, 9),
    "c48": (3, 48, 5, 9),
    "c80": (2, 80, 7, 5),
}
acts = pytest.mark.parametrize("act", [Act(kind, 0.2) for kind in ACTS], ids=ACTS)
Stream = tuple[torch.dtype, torch.dtype]
shapes_in_turn = in_turn("shape, stream", SHAPES, STREAMS.items())
acts_in_turn = in_turn(
    "act, stream", {kind: Act(kind, 0.2) for kind in ACTS}, STREAMS.items(), each=2
)
dtypes = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
EPS = 1e-5
NORM = Norm(None, None, EPS)


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors are cut as on a device of several multiprocessors, into more tiles than one."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(multiprocessors=3))


def norm(channels: int) -> Tensor:
    """Statistics of a norm whose channels all differ."""
    weight, bias = per_channel(2, channels)
    mean, var = per_channel(channels), per_channel(channels).square() + 0.1
    rstd = (var + EPS).rsqrt()
    return torch.stack((mean, var, rstd, weight * rstd, bias - mean * weight * rstd))


def exactly_of(grad: Grad) -> Grad:
    """The same in float64."""
    q, h, coef = map(exactly, grad[:3])
    z = grad.z and Activated(
        grad.z.h.double(), grad.z.stats.double(), grad.z.act, exactly(grad.z.add)
    )
    return Grad(q, h, coef, z)


# --- moments, norm_stats ------------------------------------------------------------------------


@in_turn("shape, dtype", SHAPES, DTYPES_IN_TURN)
def test_statistics(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    affine = dtype != F16  # affine=False as well
    x = activation(shape, dtype, 0.5, 2.0)
    weight, bias = per_channel(2, shape[1]).to(dtype) if affine else (None, None)
    stats = moments.moments(x, Norm(weight, bias, EPS))
    # In a launch of its own, too: the same numbers, merged in another order.
    again = moments.norm_stats(moments.moments(x), weight, bias, EPS)
    torch.testing.assert_close(again, stats, rtol=1e-5, atol=1e-6)
    eager = reference.norm_stats(reference.moments(x), weight, bias, EPS)
    exact = reference.norm_stats(reference.moments(x.double()), exactly(weight), exactly(bias), EPS)
    deviations = x.double() - exact[MEAN].view(1, -1, 1, 1)
    share = shape[1] / x.numel()
    terms = {MEAN: share * x.double().norm(), VAR: share * deviations.square().norm()}
    terms[SHIFT] = (exact[MEAN] * exact[SCALE]).norm()
    for row in range(5):
        assert_accurate(
            stats[row], eager[row], exact[row], float(terms.get(row, 0.0)), f"row {row}"
        )


def test_tiles_of_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "MAX_TILES", 3)
    x = activation((3, 17, 17, 16), F32, 3.0)
    monkeypatch.setattr(norm_backward, "MAX_TILES", 3)
    partials = moments.moments(x)
    assert partials.data.shape[0] <= 3
    stats = moments.norm_stats(partials, None, None, EPS)
    exact = reference.norm_stats(reference.moments(x.double()), None, None, EPS)
    torch.testing.assert_close(stats.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(moments.moments(x, NORM), stats, rtol=1e-6, atol=1e-6)
    _, grads = norm_backward.act_backward(x, x, stats, Act("silu"))
    _, expected = reference.act_backward(x.double(), x.double(), stats.double(), Act("silu"))
    for mine, exactly_ in zip(grads, expected, strict=True):
        torch.testing.assert_close(mine.double(), exactly_, rtol=1e-5, atol=1e-4)


@dtypes
def test_statistics_far_from_zero(dtype: torch.dtype) -> None:
    """Statistics hold at |mean| >> std, where E[x^2] - E[x]^2 cancels."""
    x = activation((4, 24, 17, 13), dtype, 1e3, 1.0)
    exact = reference.norm_stats(reference.moments(x.double()), None, None, EPS)
    for stats in (
        moments.moments(x, NORM),
        moments.norm_stats(moments.moments(x), *NORM[:3]),
    ):
        for row, most in ((MEAN, 0.5), (VAR, 4.0), (RSTD, 3.0)):
            error = ((stats[row].double() - exact[row]) / exact[row]).abs().max()
            assert float(error) <= most * torch.finfo(F32).eps


def test_normalising_far_from_zero() -> None:
    x = activation((4, 24, 17, 13), F32, 1e3, 1.0)
    stats = moments.moments(x, NORM)
    z = norm_act.norm_act(x, stats, Act("identity"), F32)
    eager = F.batch_norm(x, None, None, training=True, eps=EPS)
    exact = F.batch_norm(x.double(), None, None, training=True, eps=EPS)
    assert_accurate(z, eager, exact)


@pytest.mark.parametrize("rows", [2, 3, 600])
def test_gradients_far_from_zero(rows: int) -> None:
    """A*q + B*h + C would cancel: with two rows a channel dx is a hundred thousandth of its terms.

    Held to eager's own backward.
    """
    x, dz = activation((rows, 64, 1, 1), F32, 1e3), activation((rows, 64, 1, 1), F32)
    weight, bias = per_channel(2, 64)
    results = []
    for dtype in (F32, torch.float64):
        leaves = [each.to(dtype).requires_grad_() for each in (x, weight, bias)]
        out = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
        results.append(torch.autograd.grad(out, leaves, dz.to(dtype)))
    stats = moments.moments(x, Norm(weight, bias, EPS))
    _, (coef, dweight, dbias) = norm_backward.act_backward(dz, x, stats, Act("identity"))
    found = input_grad.input_grad(Grad(dz, x, coef)), dweight, dbias
    xhat = (x.double() - stats[MEAN].view(1, -1, 1, 1)) * stats[RSTD].view(1, -1, 1, 1)
    terms = 0.0, float((dz * xhat).norm()), float(dz.norm())
    for name, *of, added in zip(("dx", "dweight", "dbias"), found, *results, terms, strict=True):
        assert_accurate(*of, added, name)


@pytest.mark.parametrize(
    ("rows", "tile_rows"), [(7, 64), (1234, 5), (4500, 2), (2048, 1024)], ids=str
)
def test_merge_of_any_tiling(rows: int, tile_rows: int) -> None:
    """Partials may come from any kernel's epilogue, up to some thousands of tiles."""
    x = torch.randn(rows, 19, dtype=torch.float64) * 2 + torch.linspace(-50, 50, 19)
    tiles = x.split(tile_rows)
    moments_ = [torch.stack((t.mean(0), (t - t.mean(0)).square().sum(0))) for t in tiles]
    partials = Partials(torch.stack(moments_).float().to(DEVICE), rows, tile_rows)
    stats = moments.norm_stats(partials, None, None, EPS).double().cpu()
    torch.testing.assert_close(stats[MEAN], x.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats[VAR], x.var(0, correction=0), rtol=1e-5, atol=1e-6)


# --- elementwise --------------------------------------------------------------------------------


def check_norm_act(
    shape: tuple[int, ...], act: Act, stream: torch.dtype, dtype: torch.dtype
) -> None:
    h, stats = activation(shape, stream), norm(shape[1])
    z = norm_act.norm_act(h, stats, act, dtype)
    eager = reference.norm_act(h, stats, act, dtype)
    exact = reference.norm_act(h.double(), stats.double(), act, torch.float64)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(z, eager, exact)


@shapes_in_turn
def test_norm_act_of_any_shape(shape: tuple[int, ...], stream: Stream) -> None:
    check_norm_act(shape, Act("relu"), *stream)


@acts_in_turn
def test_norm_act_of_any_act(act: Act, stream: Stream) -> None:
    check_norm_act((2, 17, 5, 3), act, *stream)


@dtypes
def test_norm_act_without_norm_casts(dtype: torch.dtype) -> None:
    h = activation((2, 17, 5, 3), F32)
    z = norm_act.norm_act(h, None, Act("relu"), dtype)
    assert z.data_ptr() != h.data_ptr()
    torch.testing.assert_close(z, h.to(dtype), rtol=0, atol=0)


def check_act_backward(
    shape: tuple[int, ...], act: Act, stream: torch.dtype, dtype: torch.dtype, add: bool
) -> None:
    h, dz, stats = activation(shape, stream), activation(shape, dtype), norm(shape[1])
    extra = activation(shape, dtype) if add else None
    z, grads = norm_backward.act_backward(dz, h, stats, act, extra, dtype=dtype)
    assert_same_bits(z, norm_act.norm_act(h, stats, act, dtype))
    without, again = norm_backward.act_backward(dz, h, stats, act, extra)
    assert without is None
    assert all(map(torch.equal, again, grads))
    grad = Grad(dz, z=Activated(h, stats, act, extra))
    own, exact = reference.input_grad(grad, None, F32), reference.input_grad(exactly_of(grad))
    # No rounding of q comes before its sums.
    eager_sums = reference.gradient_sums(own, h, stats)
    exact_sums = reference.gradient_sums(exact, h.double(), stats.double())
    xhat = (h.double() - stats[MEAN].view(1, -1, 1, 1)) * stats[RSTD].view(1, -1, 1, 1)
    found = grads.dbias, grads.dweight
    for i, terms in enumerate((exact, exact * xhat)):
        eager, truth = eager_sums.data[0][i], exact_sums.data[0][i]
        assert_accurate(found[i], eager, truth, float(terms.norm()), f"S{i + 1}")
    # A, B and C are those of the sums that stand beside them.
    sums = Partials(torch.stack(found).unsqueeze(0), h.numel() // h.shape[1], 1 << 30)
    torch.testing.assert_close(grads.coef, reference.norm_grad(sums, stats, True).coef)


@shapes_in_turn
def test_act_backward_of_any_shape(shape: tuple[int, ...], stream: Stream) -> None:
    check_act_backward(shape, Act("relu"), *stream, add=False)


@acts_in_turn
def test_act_backward_of_any_act(act: Act, stream: Stream) -> None:
    check_act_backward((2, 17, 5, 3), act, *stream, add=True)


ENDS = {
    "bias": (False, False, False),
    "residual": (True, False, False),
    "residual-of-preact": (True, True, False),
    "subtracted": (True, False, True),
}


@in_turn("end, stream", ENDS, STREAMS.items(), each=3)
@pytest.mark.parametrize("shape", [SHAPES["c17"], SHAPES["c16-whole-blocks"]], ids=str)
def test_end_of_a_convolution(
    shape: tuple[int, ...], end: tuple[bool, bool, bool], stream: Stream
) -> None:
    """Behind another library's product: as written, and its statistics."""
    added, preact, subtract = end
    out_dtype, dtype = stream
    x = activation(shape, dtype)
    bias = None if subtract else per_channel(shape[1])
    options = {
        "residual": activation(shape, out_dtype, 0.5, 2.0) if added else None,
        "residual_stats": norm(shape[1]) if preact else None,
        "act": Act("silu"),
        "subtract": subtract,
    }
    exact, _ = reference.conv_end(
        x.double(),
        exactly(bias),
        **{k: exactly(v) if isinstance(v, Tensor) else v for k, v in options.items()},
    )
    options |= {"out_dtype": out_dtype, "with_moments": True, "norm": NORM}
    eager, _ = reference.conv_end(x.clone(), bias, **options)
    out, stats = moments.conv_end(x, bias, **options)
    assert (out.data_ptr() == x.data_ptr()) == (out_dtype == dtype)
    assert_accurate(out, eager, exact)
    # Of the result as stored.
    truth = reference.norm_stats(reference.moments(out.double()), None, None, EPS)
    torch.testing.assert_close(stats.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["batch", "running"])
@pytest.mark.parametrize("tiles", [1, 5, 300, 2000])
def test_norm_grad(tiles: int, training: bool) -> None:
    data, stats = per_channel(tiles, 2, 21), norm(21)
    partials = Partials(data, tiles * 3 - 1, 3)
    results = norm_backward.norm_grad(partials, stats, training)
    eager = reference.norm_grad(partials, stats, training)
    exact = reference.norm_grad(partials._replace(data=data.double()), stats.double(), training)
    s1, s2 = data.double().norm(dim=0)
    b = s2 * stats[RSTD].double() / partials.rows
    c = s1 / partials.rows
    coef = torch.stack((torch.zeros_like(b), b, c))
    for name, *of, terms in zip(
        ("coef", "dweight", "dbias"), results, eager, exact, (coef, s2, s1), strict=True
    ):
        assert_accurate(*of, float(terms.norm()), name)
    if not training:
        assert not results[0][1:3].any()


def check_input_grad(
    shape: tuple[int, ...], stream: torch.dtype, dtype: torch.dtype, identity: bool, form: str
) -> None:
    q, h = activation(shape, dtype), activation(shape, stream)
    z = None
    if "z" in form:
        z = Activated(
            h, norm(shape[1]), Act("silu"), activation(shape, dtype) if identity else None
        )
    coef = per_channel(4, shape[1]) if "A" in form else None
    grad = Grad(q, h if "BC" in form else None, coef, z)
    extra = activation(shape, stream) if identity else None
    g = input_grad.input_grad(grad, extra, stream)
    eager = reference.input_grad(grad, extra, stream)
    exact = reference.input_grad(exactly_of(grad), exactly(extra))
    assert g.data_ptr() != q.data_ptr()
    assert g.is_contiguous(memory_format=torch.channels_last)
    assert_accurate(g, eager, exact)


@shapes_in_turn
def test_input_grad_of_any_shape(shape: tuple[int, ...], stream: Stream) -> None:
    check_input_grad(shape, *stream, identity=True, form="ABC")


FORMS = {
    f"{form}-{end}": (form, end == "identity")
    for form in ("q", "A", "ABC", "Az", "ABCz")
    for end in ("alone", "identity")
}


@in_turn("form, stream", FORMS, STREAMS.items(), each=2)
def test_input_grad_of_any_form(form: tuple[str, bool], stream: Stream) -> None:
    check_input_grad((2, 17, 5, 3), *stream, identity=form[1], form=form[0])


def test_end_of_a_convolution_without_anything_to_add() -> None:
    x = activation((2, 17, 5, 3), F32)
    assert moments.conv_end(x)[0] is x
    out, none = moments.conv_end(x, out_dtype=BF16)
    assert none is None
    assert torch.equal(out, x.to(BF16))
    out, stats = moments.conv_end(x, with_moments=True, norm=NORM)
    assert out is x
    assert_same_bits(stats, moments.moments(x, NORM))
    empty = activation((0, 17, 5, 3), F32)
    assert moments.conv_end(empty, residual=empty)[0].shape == empty.shape
    with pytest.raises(ValueError, match="residual"):
        moments.conv_end(x, residual=activation((2, 16, 5, 3), F32))


@pytest.mark.parametrize("waits", [False, True], ids=["q", "dz"])
def test_both_operands_of_a_convolution_at_once(waits: bool) -> None:
    """The bits of the two launches that write them one by one."""
    h, stats = activation((2, 17, 9, 7), F32), norm(17)
    gh = activation((2, 48, 5, 4), F32)
    of_z = Activated(gh, norm(48), Act("gelu")) if waits else None
    grad = Grad(activation((2, 48, 5, 4), BF16), gh, per_channel(4, 48), of_z)
    g, z = input_grad.written_operands(grad, h, stats, Act("silu"), BF16)
    assert_same_bits(g, input_grad.input_grad(grad, None, BF16))
    assert_same_bits(z, norm_act.norm_act(h, stats, Act("silu"), BF16))


def test_input_grad_has_the_dtype_of_q_unless_told() -> None:
    grad = Grad(activation((1, 3, 2, 2), BF16))
    assert input_grad.input_grad(grad).dtype == BF16


# --- promises -----------------------------------------------------------------------------------


@acts
def test_nan_and_inf_pass_as_in_eager(act: Act) -> None:
    h, dz, stats = activation((2, 16, 4, 4), F32), activation((2, 16, 4, 4), F32), norm(16)
    specials = torch.tensor([float("nan"), float("inf"), -float("inf")], device=DEVICE)
    h[0, :3, 0, 0] = specials
    dz[1, 3:6, 1, 1] = specials
    z = norm_act.norm_act(h, stats, act, F32)
    assert_same_specials(z, reference.norm_act(h, stats, act, F32))
    grad = Grad(dz, z=Activated(h, stats, act))
    assert_same_specials(input_grad.input_grad(grad), reference.input_grad(grad))
    _, grads = norm_backward.act_backward(dz, h, stats, act)
    _, eager_grads = reference.act_backward(dz, h, stats, act)
    for mine, its in zip(grads, eager_grads, strict=True):
        assert torch.equal(mine.isfinite(), its.isfinite())


def test_nan_and_inf_reach_the_statistics_of_their_channel_alone() -> None:
    x = activation((2, 5, 4, 4), F32)
    x[0, 1, 2, 2], x[1, 3, 0, 0] = float("nan"), float("inf")
    stats = moments.moments(x, NORM)
    bad = torch.tensor([False, True, False, True, False], device=DEVICE)
    assert torch.equal(stats[VAR].isnan(), bad)
    assert torch.equal(stats.isfinite().all(0), ~bad)


def test_the_same_inputs_give_the_same_bits() -> None:
    x, dz, stats = activation((3, 48, 9, 9), BF16), activation((3, 48, 9, 9), BF16), norm(48)

    def run() -> list[Tensor]:
        act = Act("gelu")
        z, (coef, dweight, dbias) = norm_backward.act_backward(dz, x, stats, act, dtype=BF16)
        return [
            moments.moments(x, NORM),
            moments.norm_stats(moments.moments(x), None, None, EPS),
            norm_act.norm_act(x, stats, act, BF16),
            z,
            coef,
            dweight,
            dbias,
            input_grad.input_grad(Grad(dz, x, coef, Activated(x, stats, act)), dz, F32),
        ]

    for first, second in zip(run(), run(), strict=True):
        assert_same_bits(first, second)


def test_inputs_stay_as_they_are() -> None:
    x, dz, stats = activation((2, 17, 5, 5), F32), activation((2, 17, 5, 5), F32), norm(17)
    before = [t.clone() for t in (x, dz, stats)]
    moments.moments(x)
    norm_act.norm_act(x, stats, Act("relu"), F32)
    norm_backward.act_backward(dz, x, stats, Act("relu"), x, dtype=F32)
    z = Activated(x, stats, Act("relu"), x)
    input_grad.input_grad(Grad(dz, x, stats[:4].contiguous(), z), x)
    for tensor, old in zip((x, dz, stats), before, strict=True):
        assert torch.equal(tensor, old)


def test_each_function_is_one_launch() -> None:
    x, stats = activation((2, 17, 5, 5), F32), norm(17)
    names: list[str] = []
    with launch.record(lambda name, grid, constants: names.append(name)):
        moments.moments(x, NORM)
        moments.norm_stats(moments.moments(x), None, None, EPS)
        norm_act.norm_act(x, stats, Act("relu"), BF16)
        _, (coef, _, dbias) = norm_backward.act_backward(x, x, stats, Act("relu"))
        norm_backward.norm_grad(gather_sums(dbias, dbias, lambda one: one[None]), stats, True)
        input_grad.input_grad(Grad(x, x, coef))
    assert names == [
        "_moments_kernel",
        "_moments_kernel",
        "_norm_stats_kernel",
        "_norm_act_kernel",
        "_act_backward_kernel",
        "_norm_grad_kernel",
        "_input_grad_kernel",
    ]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    # The yardstick is a root mean square: it needs more than a few numbers.
    shape=st.tuples(*(st.integers(*ends) for ends in ((1, 3), (16, 80), (1, 17), (1, 11)))),
    dtype=st.sampled_from([F32, F16, BF16]),
    act=st.builds(Act, st.sampled_from(ACTS), st.sampled_from([0.0, 0.01, 0.3])),
    mean=st.sampled_from([0.0, -3.0, 100.0]),
    seed=st.integers(0, 2**16),
)
def test_a_norm_forward_and_backward(
    shape: tuple[int, ...], dtype: torch.dtype, act: Act, mean: float, seed: int
) -> None:
    """Statistics, z, q, coefficients and dx in a row, each from the same inputs as eager's."""
    torch.manual_seed(seed)
    x, dz, identity = (activation(shape, dtype, m) for m in (mean, 0.0, 0.0))
    weight, bias = per_channel(2, shape[1])
    stats = moments.moments(x, Norm(weight, bias, EPS))
    x64, stats64 = x.double(), stats.double()

    exact = reference.norm_stats(reference.moments(x64), weight.double(), bias.double(), EPS)
    eager = reference.norm_stats(reference.moments(x), weight, bias, EPS)
    root = math.sqrt(shape[1])
    spread = exact[VAR].sqrt().max().item() * root
    assert_accurate(stats[MEAN], eager[MEAN], exact[MEAN], spread, "mean")
    assert_accurate(stats[VAR], eager[VAR], exact[VAR], spread * spread / root, "var")

    # Where a*h and b cancel, their size is what rounds.
    size = (stats64[SCALE] * x64.abs().amax((0, 2, 3))).abs() + stats64[SHIFT].abs()
    terms = size.max().item() * math.sqrt(x.numel())
    assert_accurate(
        norm_act.norm_act(x, stats, Act("identity"), dtype),
        reference.norm_act(x, stats, Act("identity"), dtype),
        reference.norm_act(x64, stats64, Act("identity"), torch.float64),
        terms,
        "z",
    )
    _, (coef, _, _) = norm_backward.act_backward(dz, x, stats, act, identity)
    q = Grad(dz, z=Activated(x, stats, act, identity))
    if mean == 0.0:
        assert_accurate(
            input_grad.input_grad(q),
            reference.input_grad(q),
            reference.input_grad(exactly_of(q)),
            terms,
            "q",
        )
    grad = Grad(input_grad.input_grad(q), x, coef)
    assert_accurate(
        input_grad.input_grad(grad, identity),
        reference.input_grad(grad, identity),
        reference.input_grad(Grad(*map(exactly, grad)), identity.double()),
        name="dx",
    )
