"""A unit's steps on the kernels, held to the yardstick: ATen's beside them, and float64.

Of a sum over rows, the terms are independent draws here, so that the norm of what is added up is
that of the sum: the yardstick's ``terms``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import launch, reference
from ..aten_engine import AtenEngine, ConvGrads
from ..operands import NormGrads
from ..triton_engine import TritonEngine
from .cases import DTYPES, Random, Unit, steps
from .yardstick import MOST_DRAWS, Draw, Yardstick, judged

# What a step returns beside sums over rows.
ELEMENTWISE = ("result", "gradient")


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# The rows of a tensor of statistics, by their number.
_STATS = {5: ("mean", "var", "rstd", "scale", "shift"), 2: ("mean of groups", "rstd of groups")}


def named(result: Any, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a step's result by name.

    like: another engine's; a gradient that still waits for its coefficients is written in the dtype
    that it has there.
    """
    if isinstance(result, Tensor):
        if result.dim() == 4:
            return {"result": result}
        return dict(zip(_STATS[result.shape[0]], result, strict=True))
    if isinstance(result, ConvGrads):
        found = {"dweight": result.dweight, "dgamma": result.dgamma, "dbeta": result.dbeta}
        if result.grad is not None:
            dtype = result.grad.q.dtype if like is None else like["gradient"].dtype
            found["gradient"] = reference.input_grad(result.grad, None, dtype)
        return {name: value for name, value in found.items() if value is not None}
    if isinstance(result, NormGrads):
        a, b, c, mean = result.coef
        return {"A": a, "B": b, "C": c, "center": mean, "dgamma": result.dweight,
                "dbeta": result.dbias}  # fmt: skip
    parts = [named(part) for part in result if part is not None]
    return {name: value for part in parts for name, value in part.items()}


class Steps:
    """The steps of a unit in a dtype, checked one by one.

    Args:
        unit: with small sizes. dtype: a name in ``cases.DTYPES``. device: where the kernels run.
    """

    def __init__(self, unit: Unit, dtype: str, device: torch.device) -> None:
        self.unit, self.dtype, self.device = unit, dtype, device
        self.kernels: dict[str, list[str]] = {}
        self.failures: dict[str, str] = {}
        self._drawn: dict[int, dict[str, Draw]] = {}

    def labels(self) -> list[str]:
        """The steps, run once: ``kernels`` then has what each launches, ``failures`` its error."""
        return [*self._draws(0), *self.failures]

    def check(self, label: str) -> Yardstick:
        """A step's results held to the yardstick, with further draws where the first fails."""
        return judged(lambda seed, _: self._draws(seed)[label], 1, 1, MOST_DRAWS)

    def _draws(self, seed: int) -> dict[str, Draw]:
        if seed not in self._drawn:
            compute, stream, tf32 = DTYPES[self.dtype]
            with _tf32(tf32), torch.no_grad():
                self._drawn[seed] = dict(self._run(seed, compute, stream))
        return self._drawn[seed]

    def _run(
        self, seed: int, compute: torch.dtype, stream: torch.dtype
    ) -> Iterator[tuple[str, Draw]]:
        def on(engine: AtenEngine, exact: bool = False) -> Iterator:  # type: ignore[type-arg]
            tensors = Random(seed, self.device, exact)
            return steps(self.unit, compute, stream, tensors, engine)

        three = zip(on(_triton()), on(AtenEngine()), on(AtenEngine(), True), strict=True)
        for (label, fused), (_, eager), (_, exact) in three:
            launched: list[str] = []
            expected, truth = named(eager()), named(exact())
            try:
                with launch.record(lambda name, *_, to=launched: to.append(name)):
                    found = named(fused(), expected)
            except Exception as error:  # whatever a kernel raises is a result
                self.failures[label] = f"{type(error).__name__}: {error}".splitlines()[0]
                return  # its draws are no longer those of the others
            self.kernels[label] = sorted({*launched})
            terms = {n: float(v.norm()) for n, v in truth.items() if n not in ELEMENTWISE}
            yield label, Draw(found, expected, truth, terms)


@functools.cache
def _triton() -> TritonEngine:
    return TritonEngine()
