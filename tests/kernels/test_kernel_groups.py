"""The kernels of norms over groups of channels, against the float64 reference and eager."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
from tests.support.yardstick import assert_close_steps, images, step

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2 import PreActBlock
from resnetv2.blocks import Stage
from resnetv2.kernels import groups, input_grad, launch, moments, norm_act, norm_backward, reference
from resnetv2.kernels.operands import (
    IDENTITY,
    MEAN,
    RSTD,
    SCALE,
    SHIFT,
    Act,
    Activated,
    Grad,
    Norm,
    Partials,
)
from resnetv2.kernels.tiling import MAX_TILES, TILE_ROWS, row_tiling

EPS = 1e-5
SILU = Act("silu")
# (N, C, H, W) and groups.
SHAPES = {
    "odd-groups": ((3, 15, 7, 5), 3),
    "one-group": ((2, 17, 11, 9), 1),
    "instances": ((3, 19, 4, 5), 19),
    "one-image": ((1, 32, 8, 8), 8),
    "one-pixel-a-group": ((5, 6, 1, 1), 6),
    "two-blocks-of-channels": ((2, 80, 7, 5), 4),
    # More channels in a group, and more groups, than are looked at side by side.
    "wide-group": ((1, 300, 3, 2), 1),
    "many-groups": ((1, 520, 2, 1), 260),
}
HOW = ((F32, False), (BF16, True), (F32, True), (F16, False))
Case = tuple[tuple[int, ...], int]
Stream = tuple[torch.dtype, torch.dtype]
# Weight and bias of each channel, or of each image's.
EACH = (("(C,)", False), ("(N, C)", True))


@pytest.fixture(autouse=True)
def many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image is cut as on a device of several multiprocessors, into more tiles than one."""
    monkeypatch.setattr(launch, "INTERPRETER", launch.INTERPRETER._replace(multiprocessors=12))


def norm_of(case: Case, each: bool = False, dtype: torch.dtype = F32) -> Norm:
    """A group norm whose channels, and images if ``each``, all differ; some weights are 0."""
    (batch, channels, _, _), number = case
    weight, bias = per_channel(2, batch if each else 1, channels).to(dtype)
    weight[:, ::3] = 0
    return Norm(weight if each else weight[0], bias if each else bias[0], EPS, number)


def doubled(norm: Norm) -> Norm:
    return norm._replace(weight=exactly(norm.weight), bias=exactly(norm.bias))


def taken(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """What is kept and ``stats``, by the kernel."""
    found = moments.moments(x, norm)
    assert isinstance(found, tuple)
    assert not isinstance(found, Partials)
    return found


# --- statistics ---------------------------------------------------------------------------------


@in_turn("case, how", SHAPES, zip(("fp32", "bf16-each", "fp32-each", "fp16"), HOW))
def test_statistics(case: Case, how: tuple[torch.dtype, bool]) -> None:
    (shape, number), (dtype, each) = case, how
    norm = norm_of(case, each, dtype)
    x = activation(shape, dtype, 0.5, 2.0) + 3 * per_channel(1, shape[1], 1, 1).to(dtype)
    kept, stats = taken(x, norm)
    (own_kept, own), (exact_kept, exact) = (
        reference.moments(x, norm), reference.moments(x.double(), doubled(norm))
    )  # fmt: skip
    share = number / math.prod(shape[1:])
    assert_accurate(kept[0], own_kept[0], exact_kept[0], share * float(x.double().norm()), "mean")
    assert_accurate(kept[1], own_kept[1], exact_kept[1], name="rstd")
    terms = {MEAN: share * x.double().norm(), SHIFT: (exact[MEAN] * exact[SCALE]).norm()}
    for row in (MEAN, RSTD, SCALE, SHIFT):
        name = f"row {row}"
        assert_accurate(stats[row], own[row], exact[row], float(terms.get(row, 0.0)), name)
    assert_same_bits(groups.group_affine(kept, norm, shape[1]), stats)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("number", [1, 4, 24])
def test_statistics_far_from_zero(number: int, dtype: torch.dtype) -> None:
    """At |mean| >> std, where E[x^2] - E[x]^2 cancels, and of channels far from each other."""
    x = activation((2, 24, 17, 13), dtype, 1e3, 1.0)
    kept, _ = taken(x, Norm(None, None, EPS, number))
    (exact, _) = reference.moments(x.double(), Norm(None, None, EPS, number))
    error = ((kept.double() - exact) / exact).abs().amax((1, 2))
    assert float(error[0]) <= 0.5 * torch.finfo(F32).eps
    assert float(error[1]) <= 3.0 * torch.finfo(F32).eps


def test_without_weight_and_bias() -> None:
    x = activation((2, 6, 3, 4), F32)
    kept, stats = taken(x, Norm(None, None, EPS, 3))
    torch.testing.assert_close(stats[SCALE], stats[RSTD], rtol=0, atol=0)
    torch.testing.assert_close(stats[SHIFT], -stats[MEAN] * stats[RSTD])
    assert kept.shape == (2, 2, 3)


# --- a norm's forward and backward ----------------------------------------------------------------


def by_kernels(x: Tensor, dz: Tensor, norm: Norm) -> dict[str, Tensor]:
    _, stats = taken(x, norm)
    _, grads = norm_backward.act_backward(dz, x, stats, IDENTITY, norm=norm)
    return {
        "out": norm_act.norm_act(x, stats, IDENTITY, x.dtype),
        "dx": input_grad.input_grad(Grad(dz, x, grads.coef)),
        "dweight": grads.dweight,
        "dbias": grads.dbias,
    }


def by_eager(x: Tensor, dz: Tensor, norm: Norm) -> dict[str, Tensor]:
    """Of NCHW: for channels_last ATen takes E[x^2] - E[x]^2."""
    leaves = [each.detach().contiguous().requires_grad_() for each in (x, *norm[:2])]
    x, weight, bias = leaves
    if weight.dim() == 1:
        out = F.group_norm(x, norm.groups, weight, bias, norm.eps)
    else:
        each = zip(x.split(1), weight, bias)
        out = torch.cat([torch.group_norm(x, norm.groups, w, b, norm.eps) for x, w, b in each])
    return dict(
        zip(("out", "dx", "dweight", "dbias"), (out, *torch.autograd.grad(out, leaves, dz)))
    )


@pytest.mark.parametrize("mean", [0.5, 1e3])
@in_turn("case, each", SHAPES, EACH)
def test_as_eager(case: Case, each: bool, mean: float) -> None:
    """A norm and all its gradients, held to eager's own error."""
    x, dz = activation(case[0], F32, mean), activation(case[0], F32)
    norm = norm_of(case, each)
    found, eager = by_kernels(x, dz, norm), by_eager(x, dz, norm)
    exact = by_eager(x.double(), dz.double(), doubled(norm))
    xhat = F.group_norm(x.double(), norm.groups, eps=EPS)
    terms = {"dweight": float((dz * xhat).norm()), "dbias": float(dz.norm())}
    for name, value in found.items():
        assert_accurate(value, eager[name], exact[name], terms.get(name, 0.0), name)


@in_turn("case, stream", SHAPES, STREAMS.items())
def test_behind_a_convolution(case: Case, stream: Stream) -> None:
    """Its operand z, the sums of q = (dz + add)*act'(u), and g out of dz and of q."""
    (shape, _), (stream_dtype, dtype) = case, stream
    h, dz, add = activation(shape, stream_dtype, 0.5), *(activation(shape, dtype) for _ in range(2))
    identity, norm = activation(shape, stream_dtype), norm_of(case, each=shape[1] % 2 == 0)
    # Not its own: u's terms do not cancel then, which cost a rounding less where they are fused.
    _, stats = taken(activation(shape, stream_dtype, 1.0), norm)
    z, grads = norm_backward.act_backward(dz, h, stats, SILU, add, dtype=dtype, norm=norm)
    assert z is not None
    assert_same_bits(z, norm_act.norm_act(h, stats, SILU, dtype))
    wide, wide_stats = h.double(), stats.double()
    own_z, own = reference.act_backward(dz, h, stats, SILU, add, dtype=dtype, norm=norm)
    exact_z, exact = reference.act_backward(
        dz.double(), wide, wide_stats, SILU, add.double(), dtype=torch.float64, norm=doubled(norm)
    )
    assert_accurate(z, own_z, exact_z, name="z")
    q = reference.input_grad(
        Grad(dz.double(), z=Activated(wide, wide_stats, SILU, add.double()))
    )  # fmt: skip
    xhat = (wide - wide_stats[MEAN][:, :, None, None]) * wide_stats[RSTD][:, :, None, None]
    terms = {"dweight": float((q * xhat).norm()), "dbias": float(q.norm())}
    for name in ("dweight", "dbias"):
        of = (getattr(each_, name) for each_ in (grads, own, exact))
        assert_accurate(*of, terms[name], name)
    # Of sums that cancel, what is added up: per group, gamma times the sums.
    for row, name in enumerate(("A", "B", "C", "mean")):
        added = float(exact.coef[row].norm()) + terms["dweight"] * (0 < row < 3)
        assert_accurate(grads.coef[row], own.coef[row], exact.coef[row], added, name)
    waiting = Grad(dz, h, grads.coef, Activated(h, stats, SILU, add))
    exactly_ = Grad(
        dz.double(), wide, grads.coef.double(), Activated(wide, wide_stats, SILU, add.double())
    )
    for grad, of_exact in (
        (waiting, exactly_),
        (waiting._replace(z=None), exactly_._replace(z=None)),
        (waiting._replace(h=None, coef=None), exactly_._replace(h=None, coef=None)),
    ):
        g = input_grad.input_grad(grad, identity, stream_dtype)
        eager = reference.input_grad(grad, identity, stream_dtype)
        assert_accurate(g, eager, reference.input_grad(of_exact, identity.double()), name="g")


ENDS: dict[str, dict[str, bool]] = {
    "bias": {"bias": True},
    "preact": {"preact": True},
    "both-subtracted": {"bias": True, "preact": True, "subtract": True},
    "residual": {},
}


@in_turn("end, stream", ENDS, STREAMS.items())
@pytest.mark.parametrize("case", [SHAPES["odd-groups"], SHAPES["instances"]], ids=str)
def test_end_of_a_convolution(case: Case, end: dict[str, bool], stream: Stream) -> None:
    """A bias or an identity's norm of each image, and the statistics of what was written."""
    shape, _ = case
    out_dtype, dtype = stream
    x, residual = activation(shape, dtype), activation(shape, out_dtype, 0.5, 2.0)
    bias = per_channel(*shape[:2]) if end.get("bias") else None
    residual_stats = taken(residual, norm_of(case))[1] if end.get("preact") else None
    options: dict[str, Any] = {"act": SILU, "subtract": end.get("subtract", False)}
    exact, _ = reference.conv_end(
        x.double(), exactly(bias), residual=residual.double(),
        residual_stats=exactly(residual_stats), **options,
    )  # fmt: skip
    options |= {"residual": residual, "residual_stats": residual_stats, "out_dtype": out_dtype}
    eager, _ = reference.conv_end(x.clone(), bias, **options)
    norm = norm_of(case)
    out, found = moments.conv_end(x.clone(), bias, with_moments=True, norm=norm, **options)
    assert_accurate(out, eager, exact)
    assert isinstance(found, tuple)
    for mine, its in zip(found, taken(out, norm), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-6)
    # Another norm that reads it, or another part's, is told all rows.
    batch = Norm(None, None, EPS)
    again, stats = moments.conv_end(x.clone(), bias, with_moments=True, norm=batch, **options)
    assert_same_bits(again, out)
    assert_same_bits(stats, moments.moments(out, batch))
    again, tiles = moments.conv_end(x.clone(), bias, with_moments=True, **options)
    assert isinstance(tiles, Partials)
    assert tiles.rows == out.numel() // shape[1]
    torch.testing.assert_close(moments.norm_stats(tiles, *batch[:3]), stats)
    again, none = moments.conv_end(x.clone(), bias, **options)
    assert_same_bits(again, out)
    assert none is None


def test_images_do_not_meet() -> None:
    """An image's statistics and gradients have the same bits whatever the others hold."""
    case = SHAPES["odd-groups"]
    norm = norm_of(case, True)
    x, dz = activation(case[0], F32), activation(case[0], F32)
    others = x.clone()
    others[1:] = math.nan
    first, second = by_kernels(x, dz, norm), by_kernels(others, dz, norm)
    for name, value in first.items():
        assert_same_bits(value[0], second[name][0])
        assert second[name][1:].isnan().any() or name == "dbias"


def test_wide_dtypes_of_affine_parameters() -> None:
    """Weight and bias are read as they are, also one of each image beside one for all."""
    case = SHAPES["two-blocks-of-channels"]
    x, dz = activation(case[0], F32), activation(case[0], F32)
    norm = norm_of(case)._replace(bias=per_channel(*case[0][:2]).to(BF16).to(DEVICE))
    found = by_kernels(x, dz, norm)
    assert norm.bias is not None
    expected = by_kernels(x, dz, norm._replace(bias=norm.bias.float()))
    assert found["dweight"].shape == (80,)
    assert found["dbias"].shape == (2, 80)
    for name, value in found.items():
        assert_same_bits(value, expected[name])


# --- tiles, and a chain of them -------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 64, 256])
@pytest.mark.parametrize("number", [1, 3, 2000])
@pytest.mark.parametrize("channels", [18, 320])
def test_tiles_of_images(number: int, size: int, channels: int) -> None:
    """Each image's rows once; few tiles in all; of few rows only where programs are few."""
    device = launch.Device(132, "cuda", 90)
    tiling = row_tiling(size * size, channels, device, MAX_TILES, images=number)
    tile_rows = tiling.steps * tiling.block_m
    assert tile_rows * (tiling.tiles - 1) < size * size <= tile_rows * tiling.tiles
    columns = math.ceil(channels / tiling.block_c)
    assert tiling.grid == (number * tiling.tiles * columns,)
    assert number * tiling.tiles <= MAX_TILES + number
    whole = tile_rows >= min(TILE_ROWS, size * size)
    assert whole or number * math.ceil(tiling.tiles / 2) * columns < 2 * 132 + number * columns


def test_walking_back() -> None:
    """What is computed again of the kept mean and rstd has the forward's bits."""
    torch.manual_seed(0)
    norms = ("group:4", "batch", "layer")
    units = [PreActBlock(8, 8, norm=norm, act="silu", backend="triton") for norm in norms]
    found = []
    for memory in ("recompute", "invert"):
        stage = Stage(*copy.deepcopy(units), backend="triton", memory=memory).to(DEVICE)
        found.append(step(stage, images((2, 8, 5, 4))))
    assert_same_bits(found[0]["out"], found[1]["out"])
    assert_close_steps(*found)
