"""A unit's kernels one by one: the calls that its chain makes of an engine, made again and timed.

The calls are captured while the chain really runs, with their arguments, so what is timed is what
a training step does. Each is repeated with cold caches (a buffer larger than they are is written
in between) and with warm ones.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from resnetv2.core.chain import Chain
from resnetv2.core.reading import Reading
from resnetv2.core.run import describe
from resnetv2.core.spec import decode
from resnetv2.kernels.aten_engine import AtenEngine
from resnetv2.kernels.dispatch import engine
from resnetv2.kernels.operands import Geometry
from resnetv2.measuring.cases import Case, device
from resnetv2.names import DTYPES
from resnetv2.planning.cost import Cost, Rates, call_costs, copy_rate, floor_seconds, multiply_rate

CALLS = ("moments", "norm_stats", "conv_forward", "conv_backward", "norm_conv_backward")
_DIRECTIONS = {
    "conv_forward": "forward",
    "conv_backward": "shortcut backward",
    "norm_conv_backward": "backward",
}
COLD_BYTES = 2**26  # written between samples; L2 caches are smaller
WARM_BYTES = 2**20  # copied for the rate of a warm cache


class KernelTime(NamedTuple):
    """One call: its name, seconds of each sample, and what it launches by the cost model."""

    name: str
    cold: list[float]
    warm: list[float]
    costs: list[Cost]

    @property
    def nbytes(self) -> int:
        return sum(cost.nbytes for cost in self.costs)

    @property
    def flops(self) -> int:
        return sum(cost.flops for cost in self.costs)

    def floor(self, rates: dict[str, float]) -> float:
        """Seconds: each launch's bytes at the faster of the copy rates, or its FLOPs, added up.

        What one operator of a call writes, the next finds in the cache, cold arguments or not.
        """
        copy = max(rates["copy cold"], rates["copy warm"])
        return floor_seconds(self.costs, Rates(copy, rates["multiply"], torch.float32, ""))


class _Capture:
    """An engine that does what ``real`` does and remembers each call of ``CALLS``."""

    def __init__(self, real: AtenEngine) -> None:
        self.real = real
        self.calls: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._norms: dict[int, tuple[Any, ...]] = {}  # what made each tensor of statistics

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.real, name)
        if name not in CALLS:
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            stats = kwargs.get("stats")
            if name == "conv_forward" and stats is not None and vars(stats):
                # ATen's norm has normalised already, for the first convolution that reads it.
                norm = self._norms[id(stats)]
                self.calls.append((name, self._norm_conv, (norm, *args), kwargs))
            elif name != "norm_stats":
                self.calls.append((name, function, args, kwargs))
            result = function(*args, **kwargs)
            if name == "norm_stats":
                self._norms[id(result)] = args
            return result

        return call

    def _norm_conv(self, taken: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        return self.real.conv_forward(*args, **{**kwargs, "stats": self.real.norm_stats(*taken)})


def device_rates(dtype: str) -> dict[str, float]:
    """Copy rates with cold and warm caches (bytes/s) and the rate of matrix products (FLOP/s)."""
    return {
        "copy cold": copy_rate(device(), 2 * COLD_BYTES),
        "copy warm": copy_rate(device(), WARM_BYTES),
        "multiply": multiply_rate(device(), DTYPES[dtype]),
    }


def measure(
    case: Case, samples: int, seconds: float, say: Callable[[str], None]
) -> list[KernelTime]:
    """Time the calls of one unit's forward and backward, those that compute something.

    samples: of each call and kind, fewer where they would take longer than ``seconds`` in all.
    """
    cuda = device().type == "cuda"
    dtype = DTYPES[case.dtype]
    module = case.build(backend="triton" if cuda else "aten")
    x, g = case.inputs(dtype)
    x = x.detach()
    params, layout, constants = describe(
        [Reading(module[0].unit_modules())],
        dtype, need_x=True, backend=module.backend, memory="recompute", segment=0,
    )  # fmt: skip
    spec = decode(layout, constants)
    params = [p.detach() for p in params]
    capture = _Capture(engine(module.backend, x.device, (dtype,)))
    with torch.no_grad():
        forward = Chain(spec, params, capture)  # type: ignore[arg-type]
        out, kept, _ = forward.forward(x, 0, 1, spec.kept())
        assert out is not None
        backward = Chain(spec, params, capture, forward.stats)  # type: ignore[arg-type]
        backward.backward(g.to(out.dtype), x, out, kept, [None] * len(params))
        flush = torch.empty(COLD_BYTES, dtype=torch.uint8, device=x.device)
        times = []
        for name, function, args, kwargs in capture.calls:
            label = _label(name, args, kwargs)
            costs = call_costs(label, function, *args, **kwargs)
            if not any(cost.nbytes for cost in costs):
                continue  # ATen's norm takes its moments itself
            say(label)

            call = functools.partial(function, *args, **kwargs)
            times.append(KernelTime(label, *_samples(call, flush, samples, seconds), costs))
    return times


def _label(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """ "3x3 64>64 forward + shortcut", say."""
    if name == "moments":
        return name
    place = next(place for place, value in enumerate(args) if isinstance(value, Geometry))
    # A bias, or None, stands between a forward's weight and its geometry.
    weight, geometry = args[place - 1 - (name == "conv_forward")], args[place]
    k, c, r, s = weight.shape
    stride = f" /{geometry.stride[0]}" if geometry.stride != (1, 1) else ""
    label = f"{r}x{s} {c * geometry.groups}>{k}{stride} {_DIRECTIONS[name]}"
    if kwargs.get("residual") is not None or kwargs.get("final"):
        label += " + shortcut"
    return label


def _samples(
    call: Callable[[], object], flush: torch.Tensor, samples: int, seconds: float
) -> tuple[list[float], list[float]]:
    cuda = flush.is_cuda

    def timed() -> float:
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for _ in range(3):
        call()
    cold: list[float] = []
    warm: list[float] = []
    end = time.perf_counter() + seconds
    while len(warm) < samples and (len(warm) < 5 or time.perf_counter() < end):
        flush.add_(1)
        cold.append(timed())
        call()
        warm.append(timed())
    return cold, warm
