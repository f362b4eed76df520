"""float32 convolutions in TF32, as PyTorch computes them by default: operands rounded to nearest.

Promises: a result is the product of the operands' nearest TF32 numbers; so the error is that of a
rounding and has no bias. Matrix units, and the interpreter here, cut operands off, which without
the rounding is two to three times the error and a bias of 1.4 units of rounding. NaN and Inf pass.
That the compiled kernels round is in test_compile.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import reference
from resnetv2.kernels.conv_dgrad import conv_dgrad
from resnetv2.kernels.conv_forward import conv_forward
from resnetv2.kernels.conv_wgrad import conv_wgrad
from resnetv2.kernels.operands import Act, Geometry, Grad, running_stats
from tests.support.yardstick import DEVICE

UNIT = 2.0**-11  # the most that a rounding to TF32's 11 bits moves a number, relative to it
KERNELS = {"forward": conv_forward, "dgrad": conv_dgrad, "wgrad": conv_wgrad}
SIZES = {"1x1": (1, 64), "3x3": (3, 16)}  # kernel, channels

kernels = pytest.mark.parametrize("name", KERNELS)
sizes = pytest.mark.parametrize("size", SIZES)


@pytest.fixture(autouse=True)
def _tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


def rounded(x: Tensor) -> Tensor:
    """The nearest TF32 numbers, ties away from zero, in float64."""
    mantissa, exponent = torch.frexp(x.double())
    mantissa = torch.copysign(torch.floor(mantissa.abs() / UNIT + 0.5) * UNIT, mantissa)
    return torch.ldexp(mantissa, exponent)


def operands(size: str, draw: Any) -> tuple[Tensor, Tensor, Tensor, Geometry]:
    """h, weight, gradient of the output and geometry of a convolution."""
    kernel, channels = SIZES[size]
    activation = (2, channels, 9, 7)
    shapes = (activation, (channels, channels, kernel, kernel), activation)
    h, weight, g = (draw(shape).to(DEVICE) for shape in shapes)
    h, g = (t.contiguous(memory_format=torch.channels_last) for t in (h, g))
    return h, weight, g, Geometry(padding=(kernel // 2, kernel // 2))


def run(module: Any, name: str, h: Tensor, weight: Tensor, g: Tensor, geometry: Geometry) -> Tensor:
    """The convolution ``name`` by the kernel, or by the reference in float64."""
    function = KERNELS[name] if module is None else getattr(module, f"conv_{name}")
    options = {"dtype": h.dtype}
    if name == "forward":
        return function(h, weight, None, geometry, **options)[0]
    if name == "dgrad":
        return function(Grad(g), weight, h, geometry, **options)[0]
    return function(Grad(g), h, weight, geometry, **options)[0]


def normal(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=generator)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@sizes
@kernels
def test_product_of_the_nearest_tf32_numbers(name, size):
    *tensors, geometry = operands(size, normal(0))
    found = run(None, name, *tensors, geometry)
    expected = run(reference, name, *map(rounded, tensors), geometry)
    # What is left is the accumulation in float32.
    assert relative_error(found, expected) < UNIT / 16
    # Two operands, each of which moves evenly by up to a unit.
    exact = run(reference, name, *(t.double() for t in tensors), geometry)
    assert relative_error(found, exact) < (2 / 3) ** 0.5 * UNIT


@sizes
@kernels
def test_no_bias(name, size):
    """Of positive operands, where all errors of a rounding towards zero have one sign."""
    draw = normal(1)
    *tensors, geometry = operands(size, lambda shape: draw(shape).abs() + 0.1)
    found = run(None, name, *tensors, geometry)
    exact = run(reference, name, *(t.double() for t in tensors), geometry)
    assert abs(float((found / exact - 1).mean())) < UNIT / 16


def test_prologue_is_rounded():
    """act(a*h + b) is made in registers, and rounded there."""
    draw = normal(2)
    h, weight, _, geometry = operands("1x1", lambda shape: draw(shape).abs() + 0.1)
    channels = h.shape[1]
    numbers = [(draw((channels,)).abs() + 0.5).to(DEVICE) for _ in range(4)]
    stats = running_stats(-numbers[0], *numbers[1:], 1e-5)
    act = Act("relu")
    found, _ = conv_forward(h, weight, None, geometry, dtype=h.dtype, stats=stats, act=act)
    exact, _ = reference.conv_forward(
        h.double(), weight.double(), None, geometry,
        dtype=torch.float64, stats=stats.double(), act=act,
    )  # fmt: skip
    assert abs(float((found / exact - 1).mean())) < UNIT / 16


# All bits set is the NaN that a GPU makes, and the one whose bits overflow in an addition.
@pytest.mark.parametrize("bits", [0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000], ids=hex)
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_nan_and_inf_pass_through(bits):
    h, weight, g, geometry = operands("1x1", normal(3))
    special = torch.tensor([bits], dtype=torch.int32, device=DEVICE).view(torch.float32)
    h[0, 0, 0, 0] = special[0]
    found = run(None, "forward", h, weight, g, geometry)
    expected = run(reference, "forward", h, weight, g, geometry)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert not found.isfinite().all()
    assert found[1].isfinite().all()
