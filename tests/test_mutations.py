"""Tests of the tests: errors that are hard to see, each put into the library, make a test fail.

Each mutation is patched into an engine and a test of another module is called: it has to fail, and
at the tensor that the mutation changes. That it passes without is its own module's business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from resnetv2.kernels import reference
from resnetv2.kernels.aten_engine import AtenEngine, ConvGrads
from resnetv2.kernels.triton_engine import TritonEngine
from tests import test_blocks
from tests.support import yardstick
from tests.support.yardstick import BACKENDS, DEVICE, needs_triton

pytestmark = pytest.mark.usefixtures("one_thread")

EPS = torch.finfo(torch.float32).eps
ENGINES: dict[str, type[AtenEngine]] = {"aten": AtenEngine, "triton": TritonEngine}
# Of a convolution's backward, and the tensor of a block with biases at which a test has to fail.
GRADIENTS = {
    "grad": "dx",
    "dweight": "grad conv1.weight",
    "dbias": "grad conv2.bias",
    "dgamma": "grad bn1.weight",
    "dbeta": "grad bn1.bias",
}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails draws as often as it may, which takes seconds in the interpreter."""
    monkeypatch.setattr(yardstick, "MOST_DRAWS", 3)


def noisy(x: Tensor | None) -> Tensor | None:
    """x with relative noise of 2 eps, root mean square."""
    if x is None or x.dtype != torch.float32:
        return x
    return x * (1 + 2 * EPS * torch.randn_like(x))


def scaled(x: Tensor | None) -> Tensor | None:
    return None if x is None else x * (1 + 1e-5)


def shifted(x: Tensor) -> Tensor:
    """Rows (N*H*W) 1, 2, ... and the last one once more."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    moved = torch.cat((rows[1:], rows[-1:]))
    return moved.view(x.shape[0], *x.shape[2:], -1).permute(0, 3, 1, 2)


def mutate(
    monkeypatch: pytest.MonkeyPatch, backend: str, name: str, change: Callable[[Any], Any]
) -> None:
    """Have an engine's method ``name`` return ``change`` of its result."""
    kind = ENGINES[backend]
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: change(method(*args, **kwargs)))


def mutate_gradient(
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    field: str,
    change: Callable[[Tensor | None], Tensor | None],
) -> None:
    def changed(result: ConvGrads) -> ConvGrads:
        value = getattr(result, field)
        if field == "grad":
            return result._replace(grad=value and value._replace(q=change(value.q)))
        return result._replace(**{field: change(value)})

    for name in ("conv_backward", "norm_conv_backward"):
        mutate(monkeypatch, backend, name, changed)


def assert_caught(tensor: str, backend: str) -> None:
    """``test_training_step_float32[basic-bias]`` fails, at ``tensor`` among others."""
    with pytest.raises(AssertionError, match=rf"(?m)^{tensor}: .* of the allowed error"):
        test_blocks.test_training_step_float32("basic-bias", backend)


def noisy_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with noise on the first, float32, tensor that it returns."""

    @functools.wraps(function)  # the tests look the reference up by its name
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        first, *others = function(*args, **kwargs)
        return (noisy(first), *others)

    return wrapper


@needs_triton
@pytest.mark.parametrize("name", ["conv_forward", "conv_dgrad", "conv_wgrad"])
@pytest.mark.parametrize("size", ["1x1", "3x3"])
def test_noise_on_a_kernels_output(name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_forward_plain``, ``test_dgrad_plain`` and ``test_with_both_prologues`` fail."""
    from tests.kernels import test_kernel_conv, test_kernel_wgrad

    def run() -> None:
        # Sums of few terms: where eager adds up 150 its own error is 2 eps.
        if name == "conv_wgrad":
            case = {"1x1": "1x1-c80-k48", "3x3": "3x3-c16-k16"}[size]
            test_kernel_wgrad.Problem(test_kernel_wgrad.CASES[case]).check()
            return
        test = {
            "conv_forward": test_kernel_conv.test_forward_plain,
            "conv_dgrad": test_kernel_conv.test_dgrad_plain,
        }[name]
        test(test_kernel_conv.SHAPES[f"{size}-stride2"], torch.float32)

    module: Any = test_kernel_conv
    if name == "conv_wgrad":
        module = test_kernel_wgrad.conv_wgrad
    monkeypatch.setattr(module, name, noisy_result(getattr(module, name)))
    with pytest.raises(AssertionError, match=r"^result: "):
        run()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the bits are eager's on a CPU")
@pytest.mark.parametrize("name", ["conv2d", "convolution_backward"])
def test_noise_on_atens_output(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``test_on_a_cpu_the_bits_are_eagers`` fails."""
    from tests.planning import test_memory

    function = getattr(reference, name)
    changed = noisy_result(function)
    if name == "conv2d":
        changed = lambda *args: noisy(function(*args))  # noqa: E731
    monkeypatch.setattr(reference, name, changed)
    with pytest.raises(AssertionError):
        test_memory.test_on_a_cpu_the_bits_are_eagers("recompute", True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_statistics_of_shifted_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = ENGINES[backend]
    moments = kind.moments
    channels_last = torch.channels_last
    monkeypatch.setattr(
        kind,
        "moments",
        lambda self, x, *norm: moments(
            self, shifted(x).contiguous(memory_format=channels_last), *norm
        ),
    )
    assert_caught("buffer bn1.running_mean", backend)


@pytest.mark.parametrize(
    ("backend", "field"),
    [
        *(("aten", field) for field in GRADIENTS),
        pytest.param("triton", "dweight", marks=needs_triton),
    ],
)
def test_gradient_scaled_by_1e_minus_5(
    backend: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutate_gradient(monkeypatch, backend, field, scaled)
    assert_caught(GRADIENTS[field], backend)
