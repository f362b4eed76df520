"""How far from float64 a result may be: the one yardstick of the tests and the benchmarks.

    error <= 2 * (eager PyTorch's error) + 0.3 eps * (size of the result)

Errors and sizes are Euclidean norms over a tensor, eps is that of the result's dtype. To round
every element once costs 0.29 eps of the norm in the root mean square: the last term is that one
rounding, for results that eager happens to have exactly. A sum over rows may cancel, as the
gradient of a bias in front of a norm does, and is then no more exact than a rounding of its terms:
it has 0.3 eps of the norm of the terms on top, in the dtype in which it is accumulated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Where few draws exceed the yardstick, so many in all tell an error from luck.
MOST_DRAWS = 27
TIMES_EAGER = 2.0
ROUNDING = 0.3  # eps: 1/sqrt(12) is the root mean square of a rounding to the nearest


def distance(a: Tensor, b: Tensor) -> float:
    """The error of ``a`` against ``b``: the Euclidean norm of their difference, in float64."""
    return float((a.double() - b.double()).norm())


def slack(size: float, dtype: torch.dtype, terms: float = 0.0) -> float:
    """One rounding of a result of norm ``size``, and of a sum's terms, of norm ``terms``.

    dtype: of the result. Sums are accumulated in float32 at least.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return ROUNDING * (torch.finfo(dtype).eps * size + torch.finfo(wide).eps * terms)


def allowed(eager: float, size: float, dtype: torch.dtype, terms: float = 0.0) -> float:
    """The largest error that passes where eager PyTorch's is ``eager``; see ``slack``."""
    return TIMES_EAGER * eager + slack(size, dtype, terms)


class Draw(NamedTuple):
    """What one random input gave, by name.

    fused: None where only eager's usual error is asked for. exact: in float64. terms: per name the
    norm of what is added up to the tensor, where it is a sum over rows.
    """

    fused: dict[str, Tensor] | None
    eager: dict[str, Tensor]
    exact: dict[str, Tensor]
    terms: dict[str, float]


class _Errors:
    """One tensor's errors over draws, and what a draw's size and terms usually are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.fused: list[float] = []
        self.paired: list[float] = []  # eager's on the inputs that ``fused`` had
        self.eager: list[float] = []
        self.sizes: list[float] = []
        self.terms: list[float] = []

    def excess(self) -> float:
        """The error over what is allowed, in the better of two estimates of how large errors are.

        The root of the mean square over the inputs that both had is the sharper where errors are
        rounding. In half precision a ReLU's sign may flip at a value near 0, in eager as here, and
        one flip outweighs all rounding: where flips are rare, medians tell more. NaN is excess, and
        so is a tensor that no draw compared (a branch that was dropped): others have to be drawn.
        """
        if not self.fused or not all(map(math.isfinite, self.fused)):
            return math.inf
        size, terms = statistics.median(self.sizes), statistics.median(self.terms)
        found = []
        for usual, eager in ((_mean_square, self.paired), (statistics.median, self.eager)):
            most = allowed(usual(eager), size, self.dtype, terms)
            found.append(usual(self.fused) / most if most else math.inf if any(self.fused) else 0.0)
        return min(found)


def _mean_square(errors: list[float]) -> float:
    return statistics.fmean(e * e for e in errors) ** 0.5


class Yardstick:
    """Holds every recorded tensor to the yardstick, over several draws; integers must be equal."""

    def __init__(self) -> None:
        self.errors: dict[str, _Errors] = {}

    def add(self, draw: Draw) -> None:
        for name, expected in draw.eager.items():
            if draw.fused is not None:
                assert draw.fused.keys() == draw.eager.keys()
                mine = draw.fused[name]
                assert mine.dtype == expected.dtype, name
                assert mine.shape == expected.shape, name
            if not expected.is_floating_point():
                assert draw.fused is None or torch.equal(draw.fused[name], expected), name
                continue
            errors = self.errors.setdefault(name, _Errors(expected.dtype))
            exact = draw.exact[name]
            errors.eager.append(distance(expected, exact))
            if draw.fused is not None:
                errors.fused.append(distance(draw.fused[name], exact))
                errors.paired.append(errors.eager[-1])
            errors.sizes.append(float(exact.norm()))
            errors.terms.append(draw.terms.get(name, 0.0))

    def failures(self) -> list[str]:
        """What is further off than the yardstick allows, one line a tensor."""
        return [
            f"{name}: {errors.excess():.2f} of the allowed error; errors {errors.fused}, eager's "
            f"{errors.paired}, usually {statistics.median(errors.eager):.3e}"
            for name, errors in self.errors.items()
            if not errors.excess() <= 1
        ]

    def worst(self) -> tuple[str, float]:
        """The tensor that is furthest off, and its error over what is allowed."""
        found = {name: errors.excess() for name, errors in self.errors.items()}
        return max(found.items(), key=lambda item: item[1])


def judged(
    take: Callable[[int, bool], Draw], draws: int, eager_draws: int, most: int = MOST_DRAWS
) -> Yardstick:
    """Several draws, held to the yardstick: what is wrong are its ``failures``.

    Args:
        take: the draw of a seed; also of the fused side if its second argument is True.
        draws: how many are drawn at first. Where they fail, three times as many decide, up to
            ``most``: of a tensor of six numbers, one draw in fifty is off by luck.
        eager_draws: how many for eager, where they are more: its usual error.
    """
    yardstick = Yardstick()
    for seed in range(max(draws, eager_draws)):
        yardstick.add(take(seed, seed < draws))
    seed = max(draws, eager_draws)
    while draws < most and yardstick.failures():
        more = min(2 * draws, most - draws)
        for _ in range(more):
            yardstick.add(take(seed, True))
            seed += 1
        draws += more
    return yardstick
