"""A launcher refuses what its kernel would read wrongly, before anything is launched.

Each row replaces one argument of a call that is in order. The error has the argument's name, what
was expected and what came.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import launch
from resnetv2.kernels.conv_backward import conv_backward
from resnetv2.kernels.conv_dgrad import conv_dgrad
from resnetv2.kernels.conv_forward import conv_forward
from resnetv2.kernels.conv_wgrad import conv_wgrad
from resnetv2.kernels.groups import group_affine
from resnetv2.kernels.input_grad import input_grad
from resnetv2.kernels.launch import Config
from resnetv2.kernels.moments import conv_end, moments, norm_stats
from resnetv2.kernels.norm_act import norm_act
from resnetv2.kernels.norm_backward import act_backward, norm_grad
from resnetv2.kernels.operands import Act, Activated, Geometry, Grad, Norm, Partials
from tests.support.kernel_checks import DEVICE, activation, per_channel

F32 = torch.float32
RELU = Act("relu")
GEOMETRY = Geometry(padding=(1, 1))
N, C, K, SIZE = 2, 16, 24, 6


def x(channels: int = C, size: int = SIZE) -> Tensor:
    return activation((N, channels, size, size), F32)


def weight(channels: int = C) -> Tensor:
    return per_channel(K, channels, 3, 3)


def grad(channels: int = K, coefficients: int = K, size: int = SIZE) -> Grad:
    return Grad(x(channels, size), x(channels, size), per_channel(4, coefficients))


def waiting(of_h: int = K, of_stats: int = K, of_add: int = K) -> Grad:
    """For act' as well."""
    return grad()._replace(z=Activated(x(of_h), per_channel(5, of_stats), RELU, x(of_add)))


def partials(tiles: int = 3) -> Partials:
    return Partials(per_channel(tiles, 2, C).abs(), 3 * 4, 4)


def images(rows: int, channels: int = C) -> Tensor:
    """Statistics or coefficients of each image."""
    return per_channel(rows, N, channels)


def groups(channels: int, number: int = 4) -> Norm:
    return Norm(per_channel(channels), per_channel(N, channels), 1e-5, number)


class Change(NamedTuple):
    """An argument by name, what stands there instead, the error and its text."""

    name: str
    value: Callable[[], Any]
    error: type[Exception]
    text: str


# A launcher's arguments by name, all in order.
CALLS: dict[Any, Callable[[], dict[str, Any]]] = {
    conv_forward: lambda: {
        "h": x(), "weight": weight(), "bias": per_channel(K), "geometry": GEOMETRY, "dtype": F32,
        "stats": per_channel(5, C), "act": RELU, "residual": x(K),
        "residual_stats": per_channel(5, K), "out_dtype": F32,
    },
    conv_backward: lambda: {
        "grad": grad(), "weight": per_channel(K, C, 1, 1), "h": x(), "geometry": Geometry(),
        "dtype": F32, "stats": per_channel(5, C), "act": RELU, "add": x(),
        "config": Config(16, 16, 16),
    },
    conv_dgrad: lambda: {
        "grad": grad(), "weight": weight(), "h": x(), "geometry": GEOMETRY, "dtype": F32,
        "stats": per_channel(5, C), "act": RELU, "add": x(), "coef": per_channel(4, C),
        "identity": x(), "out_dtype": F32,
    },
    conv_wgrad: lambda: {
        "grad": grad(), "h": x(), "weight": weight(), "geometry": GEOMETRY, "dtype": F32,
        "stats": per_channel(5, C), "act": RELU,
    },
    moments: lambda: {"x": x(), "norm": Norm(per_channel(C), per_channel(C), 1e-5)},
    norm_stats: lambda: {
        "partials": partials(), "weight": per_channel(C), "bias": per_channel(C), "eps": 1e-5,
        "counts": per_channel(3).abs(),
    },
    norm_act: lambda: {"h": x(), "stats": per_channel(5, C), "act": RELU, "dtype": F32},
    act_backward: lambda: {
        "dz": x(), "h": x(), "stats": per_channel(5, C), "act": RELU, "add": x(),
        "training": True, "dtype": F32,
    },
    norm_grad: lambda: {
        "partials": partials(), "stats": per_channel(5, C), "training": True,
        "total": per_channel(1),
    },
    input_grad: lambda: {"grad": waiting(), "identity": x(K), "dtype": F32},
    conv_end: lambda: {
        "x": x(K), "bias": per_channel(N, K), "residual": x(K), "residual_stats": images(5, K),
        "act": RELU, "out_dtype": F32, "with_moments": True, "norm": groups(K),
    },
    group_affine: lambda: {"kept": per_channel(2, N, 4), "norm": groups(C), "channels": C},
}  # fmt: skip

SHAPE_16 = f"({N}, 16, {SIZE}, {SIZE})"
SHAPE_24 = f"({N}, 24, {SIZE}, {SIZE})"
NO_FLOAT = "must be float32, float16 or bfloat16, got torch.float64"


def _activation(name: str, channels: int) -> list[Change]:
    shape = SHAPE_16 if channels == C else SHAPE_24
    return [
        Change(name, lambda: x(channels + 1), ValueError,
               f"{name} must have shape {shape}, got ({N}, {channels + 1}, {SIZE}, {SIZE})"),
        *_layout(name, channels),
    ]  # fmt: skip


def _layout(name: str, channels: int) -> list[Change]:
    return [
        Change(name, lambda: x(channels).contiguous(), ValueError,
               f"{name} must be a 4-D tensor in channels_last memory, got shape ({N}, {channels}"),
        Change(name, lambda: x(channels).double(), TypeError, f"{name} {NO_FLOAT}"),
    ]  # fmt: skip


def _per_channel(name: str, rows: int, channels: int) -> list[Change]:
    expected = f"{name} must be a contiguous ({rows}, {channels}) tensor"
    return [
        Change(name, lambda: per_channel(rows, 8), ValueError, f"{expected}, got ({rows}, 8)"),
        Change(name, lambda: per_channel(channels, rows).t(), ValueError,
               f"{expected}, got ({rows}, {channels}) with strides (1, {rows})"),
        Change(name, lambda: per_channel(rows, channels).double(), TypeError,
               f"{name} must be float32, got torch.float64"),
    ]  # fmt: skip


def _vector(name: str, size: int, dtype: str = "float32, float16 or bfloat16") -> list[Change]:
    expected = f"{name} must be a contiguous ({size},) tensor"
    return [
        Change(name, lambda: per_channel(size + 1), ValueError, f"{expected}, got ({size + 1},)"),
        Change(name, lambda: per_channel(2 * size + 1)[::2][:size] if size > 1 else per_channel(),
               ValueError, expected),
        Change(name, lambda: per_channel(size).double(), TypeError,
               f"{name} must be {dtype}, got torch.float64"),
    ]  # fmt: skip


_OTHER_CONVOLUTIONS = [
    Change("geometry", lambda g=other: g, NotImplementedError, "no kernel for dilated, grouped or")
    for other in (
        GEOMETRY._replace(dilation=(2, 2)),
        GEOMETRY._replace(groups=2),
        GEOMETRY._replace(extra=(1, 1)),
        GEOMETRY._replace(extra=(0, -1)),
    )
]
_CONVOLUTION = [
    *_OTHER_CONVOLUTIONS,
    Change("dtype", lambda: torch.float64, NotImplementedError, "no kernel multiplies in"),
    Change("weight", lambda: weight(8), ValueError,
           "weight must have shape (K, 16, R, S), got (24, 8, 3, 3)"),
    Change("weight", lambda: weight()[..., 0], ValueError,
           "weight must have shape (K, 16, R, S), got (24, 16, 3)"),
    Change("weight", lambda: weight().double(), TypeError, f"weight {NO_FLOAT}"),
    Change("weight", lambda: per_channel(K, C, 9, 9), ValueError,
           "fits nowhere in h of 6x6, got an output of 0x0"),
    Change("h", lambda: x()[0], ValueError, "h must have shape (N, C, H, W), got (16, 6, 6)"),
]  # fmt: skip
_OUT_DTYPE = Change("out_dtype", lambda: torch.float64, TypeError, f"out_dtype {NO_FLOAT}")


def _grad(shape: str) -> list[Change]:
    return [
        Change("grad", lambda: grad()._replace(h=x(K, 5)), ValueError,
               f"grad.h must have shape {SHAPE_24}, got (2, 24, 5, 5)"),
        Change("grad", lambda: grad(coefficients=C), ValueError,
               "grad.coef must be a contiguous (4, 24) tensor, got (4, 16)"),
        Change("grad", lambda: Grad(x(K).contiguous()), ValueError,
               "grad.q must be a 4-D tensor in channels_last memory"),
        Change("grad", lambda: Grad(x(K).double()), TypeError, f"grad.q {NO_FLOAT}"),
        *([Change("grad", lambda: grad(size=5), ValueError,
                  f"grad.q must have shape {shape}, got (2, 24, 5, 5)"),
           Change("grad", waiting, ValueError, "grad.z must be None")] if shape else []),
    ]  # fmt: skip


CHANGES: dict[Any, list[Change]] = {
    conv_forward: [
        *_CONVOLUTION, *_layout("h", C), *_vector("bias", K), *_per_channel("stats", 5, C),
        *_activation("residual", K), *_per_channel("residual_stats", 5, K), _OUT_DTYPE,
        Change("stats", lambda: images(5), ValueError, "stats must be a contiguous (5, 16) tensor"),
        Change("bias", lambda: per_channel(N, K), ValueError, "a contiguous (24,) tensor"),
        Change("norm", lambda: Norm(None, None, 0.0, 4), NotImplementedError, "groups need"),
    ],
    conv_backward: [
        *_layout("h", C), *_grad(SHAPE_24), *_per_channel("stats", 5, C), *_activation("add", C),
        Change("geometry", lambda: GEOMETRY, ValueError, "expects a 1x1 kernel, stride 1"),
        Change("config", lambda: None, ValueError, "no tile for a weight of (24, 16, 1, 1)"),
    ],
    conv_dgrad: [
        *_CONVOLUTION, *_layout("h", C), *_grad(SHAPE_24), *_per_channel("stats", 5, C),
        *_per_channel("coef", 4, C), *_activation("add", C), *_activation("identity", C),
        _OUT_DTYPE,
    ],
    conv_wgrad: [*_CONVOLUTION, *_layout("h", C), *_grad(SHAPE_24), *_per_channel("stats", 5, C)],
    moments: [
        *_layout("x", C),
        Change("x", lambda: x()[:0], ValueError, "at least one value per channel"),
        Change("norm", lambda: Norm(per_channel(K), None, 0.0), ValueError,
               "norm.weight must be a contiguous (16,) tensor, got (24,)"),
        Change("norm", lambda: Norm(per_channel(N, C), None, 0.0), ValueError,
               "norm.weight must be a contiguous (16,) tensor, got (2, 16)"),
        Change("norm", lambda: Norm(None, per_channel(3, C), 0.0, 4), ValueError,
               "norm.bias must be a contiguous (16,) or (2, 16) tensor, got (3, 16)"),
        Change("norm", lambda: Norm(None, None, 0.0, 3), ValueError,
               "norm.groups must divide 16 channels, got 3"),
    ],
    conv_end: [
        *_layout("x", K), *_activation("residual", K), _OUT_DTYPE,
        Change("bias", lambda: per_channel(3, K), ValueError,
               "bias must be a contiguous (24,) or (2, 24) tensor, got (3, 24)"),
        Change("residual_stats", lambda: per_channel(5, 3, K), ValueError,
               "residual_stats must be a contiguous (5, 2, 24) tensor, got (5, 3, 24)"),
        Change("norm", lambda: groups(K, 7), ValueError, "norm.groups must divide 24 channels"),
    ],
    group_affine: [
        Change("kept", lambda: per_channel(2, N, 5), ValueError,
               "kept must be a contiguous (2, 2, 4) tensor, got (2, 2, 5)"),
        Change("kept", lambda: per_channel(2, N, 4).double(), TypeError, "must be float32"),
        Change("kept", lambda: per_channel(2, 4), ValueError,
               "kept must be a contiguous (2, N, 4) tensor, got (2, 4)"),
        Change("channels", lambda: K, ValueError, "norm.weight must be a contiguous (24,)"),
        Change("norm", lambda: Norm(None, None, 0.0), ValueError, "norm.groups must be"),
    ],
    norm_stats: [
        *_vector("weight", C), *_vector("bias", C), *_vector("counts", 3, "float32"),
        Change("partials", lambda: partials(4), ValueError,
               "partials.data must be a contiguous (3, 3, C) tensor for 12 rows in tiles of 4"),
    ],
    norm_act: [
        *_layout("h", C), *_per_channel("stats", 5, C),
        Change("dtype", lambda: torch.float64, TypeError, f"dtype {NO_FLOAT}"),
    ],
    act_backward: [
        *_activation("dz", C), *_layout("h", C), *_activation("add", C),
        *_per_channel("stats", 5, C), Change("dtype", lambda: torch.float64, TypeError, NO_FLOAT),
        Change("stats", lambda: images(5), ValueError, "stats per image need their norm"),
        Change("stats", lambda: per_channel(5, 3, C), ValueError,
               "stats must be a contiguous (5, 2, 16) tensor, got (5, 3, 16)"),
    ],
    norm_grad: [
        *_per_channel("stats", 5, C), *_vector("total", 1, "float32"),
        Change("partials", lambda: partials(4), ValueError,
               "partials.data must be a contiguous (3, 2, C) tensor for 12 rows in tiles of 4"),
    ],
    input_grad: [
        *_grad(""), *_activation("identity", K),
        Change("grad", lambda: waiting(of_h=C), ValueError, "grad.z.h must have shape"),
        Change("grad", lambda: waiting(of_add=C), ValueError, "grad.z.add must have shape"),
        Change("grad", lambda: waiting(of_stats=C), ValueError, "grad.z.stats must be a contig"),
        Change("grad", lambda: waiting()._replace(coef=images(4, K)), ValueError,
               "grad.coef and grad.z.stats must both be per channel or, with h, per image"),
        Change("grad", lambda: grad()._replace(h=None, coef=images(4, K)), ValueError, "with h"),
        Change("dtype", lambda: torch.float64, TypeError, f"dtype {NO_FLOAT}"),
    ],
}  # fmt: skip
ROWS = [(launcher, change) for launcher, changes in CHANGES.items() for change in changes]


@pytest.mark.parametrize("launcher", CALLS, ids=lambda launcher: launcher.__name__)
def test_arguments_in_order_are_taken(launcher: Any) -> None:
    launcher(**CALLS[launcher]())


@pytest.mark.parametrize(
    ("launcher", "change"),
    ROWS,
    ids=[f"{launcher.__name__}-{change.name}-{i}" for i, (launcher, change) in enumerate(ROWS)],
)
def test_an_argument_that_is_not_is_named(launcher: Any, change: Change) -> None:
    arguments = CALLS[launcher]() | {change.name: change.value()}
    launched: list[str] = []
    with (
        launch.record(lambda name, grid, constants: launched.append(name)),
        pytest.raises(change.error, match=re.escape(change.text)),
    ):
        launcher(**arguments)
    assert launched == []


def test_a_plain_dgrad_reads_the_shape_of_h_alone() -> None:
    """Without statistics h may lie in any layout."""
    h = torch.empty(N, C, SIZE, SIZE, device=DEVICE)
    conv_dgrad(Grad(x(K)), weight(), h, GEOMETRY, dtype=F32)
