"""What the kernel tests share: inputs, tensors held to the yardstick, and poisoned memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

from resnetv2.kernels.inspect.yardstick import allowed, distance

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
# The dtype of the activations, and the one in which convolutions multiply.
STREAMS = {"fp32": (F32, F32), "fp16": (F16, F16), "bf16": (BF16, BF16), "fp32-bf16": (F32, BF16)}
# Each second one is float32, whose tiles are others than those of half precision.
DTYPES_IN_TURN = (("fp32", F32), ("bf16", BF16), ("fp32", F32), ("fp16", F16))


def in_turn(
    names: str, first: Mapping[str, Any], second: Iterable[tuple[str, Any]], each: int = 1
) -> Any:
    """Parametrise ``names`` over ``first``, each with ``each`` values of ``second`` in turn.

    For options that do not meet within a kernel. All combinations would be kernels that say nothing
    new, and on a GPU each takes a second to compile.
    """
    turns = cycle(second)
    cases = {}
    for key, value in first.items():
        for _ in range(each):
            name, other = next(turns)
            cases[f"{key}-{name}"] = (value, other)
    return pytest.mark.parametrize(names, cases.values(), ids=cases)


def activation(
    shape: tuple[int, ...], dtype: torch.dtype, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Random values in channels_last memory."""
    x = (torch.randn(shape) * std + mean).to(dtype)
    return x.to(DEVICE, memory_format=torch.channels_last)


def per_channel(*shape: int) -> Tensor:
    """Random float32 values, as weights, biases and coefficients are."""
    return torch.randn(shape).to(DEVICE)


def exactly(x: Tensor | None) -> Tensor | None:
    """x in float64, for the reference's exact answer."""
    return None if x is None else x.double()


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, terms: float = 0.0, name: str = "result"
) -> None:
    """Hold a kernel's result to the yardstick, beside the reference's in the same dtype.

    terms: of a sum, the norm of what is added up.
    """
    assert actual.shape == exact.shape, name
    assert actual.dtype == eager.dtype, name
    error, own = distance(actual, exact), distance(eager, exact)
    # The interpreter rounds 0 to the smallest normal bfloat16.
    most = allowed(own, float(exact.double().norm()), actual.dtype, terms) + 1e-37
    # Never true of a NaN: memory that a kernel left unwritten is caught here too.
    assert error <= most, f"{name}: error {error:.3g}, eager's {own:.3g}, allowed {most:.3g}"


def assert_same_bits(first: Tensor, second: Tensor) -> None:
    """Equal bit for bit, NaN included."""
    assert first.dtype == second.dtype
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    assert torch.equal(first.contiguous().view(integers), second.contiguous().view(integers))


def assert_same_specials(actual: Tensor, expected: Tensor) -> None:
    """NaN and Inf stand where they are expected, and nowhere else."""
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isposinf(), expected.isposinf())
    assert torch.equal(actual.isneginf(), expected.isneginf())


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """``torch.empty`` gives NaN, so that an element which no kernel wrote shows."""
    torch.manual_seed(0)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)
