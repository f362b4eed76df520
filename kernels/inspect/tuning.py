"""Which implementation and tile of a convolution is fastest on this device (``choices``).

    tasks = tasks_of(lambda: step_costs(model, ...))     # a step on tensors without memory
    for task in tasks:
        found = Tuner(task, device).tune()
        choices.write(name, found.choices)

A task is a convolution of one shape and direction, with all calls of the engine that a step makes
for it. Candidates are the cost model's own way, each implementation, and tiles beside those that
are launched; the two gradients share what is written for them, so they are timed together. A
candidate's results are held against float64, eager PyTorch's error beside them, before it is timed.
"""

from __future__ import annotations

import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_with_path

from .. import choices, launch
from ..aten_engine import AtenEngine
from ..choices import (
    APART,
    ATEN,
    BOTH,
    DGRAD,
    FORWARD,
    FUSED,
    WGRAD,
    WRITTEN,
    Choice,
    implementation,
)
from ..dispatch import stand_in
from ..fallback import FallbackWarning
from ..integers import next_power_of_2
from ..launch import Config, KernelError
from ..operands import Dgrad, Geometry, Norm, running_stats
from ..triton_engine import TritonEngine
from ..wgrad_config import WgradConfig
from .accuracy import ELEMENTWISE, named
from .yardstick import Draw, judged

BACKWARD = "backward"
# What is chosen must be so much faster than what the cost model has: less is the clock's noise.
_GAIN = 0.98
# Tiles are tried of implementations that take at most so many times the fastest's time.
_WORTH = 1.5
# Milliseconds that a candidate warms up and is timed for: a network's shapes in seconds.
_WARMUP, _REPEAT = 5, 20
# Draws that decide where the first is off: of these sizes few are so by luck.
_DRAWS = 9

_OPERATION = {
    "_conv_forward_kernel": FORWARD,
    "_conv_dgrad_kernel": DGRAD,
    "_conv_wgrad_kernel": WGRAD,
    "_conv_backward_kernel": BOTH,
}
Candidate = Mapping[str, Choice]


@dataclass(frozen=True)
class Like:
    """A tensor's place in a call: all but its values. number: the same where the tensor is."""

    number: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call(NamedTuple):
    """A method of the engine, and its arguments by name with a ``Like`` for each tensor."""

    method: str
    arguments: tuple[tuple[str, Any], ...]


class Task(NamedTuple):
    """A convolution in one direction, FORWARD or BACKWARD, and how often each call is made."""

    direction: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    geometry: Geometry
    dtype: torch.dtype
    calls: tuple[tuple[Call, int], ...] = ()

    def __str__(self) -> str:
        return choices.key(self.direction, *self[1:5])


class _Watching(TritonEngine):
    """The kernels' engine, which notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def _note(self, method: str, **arguments: Any) -> None:
        numbers: dict[int, int] = {}

        def like(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            number = numbers.setdefault(id(value), len(numbers))
            return Like(number, tuple(value.shape), tuple(value.stride()), value.dtype)

        self.calls[Call(method, tuple(tree_map(like, arguments).items()))] += 1

    def conv_forward(self, h, weight, bias, geometry, **options):  # type: ignore[no-untyped-def]
        self._note("conv_forward", h=h, weight=weight, bias=bias, geometry=geometry, **options)
        return super().conv_forward(h, weight, bias, geometry, **options)

    def conv_backward(self, g, h, weight, geometry, **options):  # type: ignore[no-untyped-def]
        self._note("conv_backward", g=g, h=h, weight=weight, geometry=geometry, **options)
        return super().conv_backward(g, h, weight, geometry, **options)

    def norm_conv_backward(self, grad, h, stats, act, weight, geometry, **options):  # type: ignore[no-untyped-def]
        self._note(
            "norm_conv_backward",
            grad=grad, h=h, stats=stats, act=act, weight=weight, geometry=geometry, **options,
        )  # fmt: skip
        return super().norm_conv_backward(grad, h, stats, act, weight, geometry, **options)


def _of_images(given: dict[str, Any]) -> bool:
    """Whether a call's statistics or bias are of each image."""
    ranks = {"stats": 3, "residual_stats": 3, "bias": 2}
    return any(given.get(name) and len(given[name].shape) == rank for name, rank in ranks.items())


def tasks_of(step: Callable[[], object]) -> list[Task]:
    """The convolutions that the chains of ``step()`` compute, as the cost model has them.

    Those that have one implementation only (groups, dilation, asymmetric padding, behind a group
    norm) are left out.
    """
    watching = _Watching()
    with stand_in(watching), choices.forced({}):
        step()
    found: dict[Task, list[tuple[Call, int]]] = {}
    for call, count in watching.calls.items():
        given = dict(call.arguments)
        geometry = given["geometry"]
        if geometry != Geometry(geometry.stride, geometry.padding) or _of_images(given):
            continue
        direction = FORWARD if call.method == "conv_forward" else BACKWARD
        task = Task(direction, given["h"].shape, given["weight"].shape, geometry, given["dtype"])
        found.setdefault(task, []).append((call, count))
    return [task._replace(calls=tuple(calls)) for task, calls in found.items()]


def _tensors(call: Call, seed: int, device: torch.device, exact: bool) -> dict[str, Any]:
    """The arguments of a call with random values, the same for a seed; in float64 if ``exact``."""
    generator = torch.Generator(device).manual_seed(seed)
    weights: list[Tensor] = []  # of the norm whose statistics are an argument themselves
    made: dict[int, Tensor] = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def values(path: Sequence[Any], like: Like) -> Tensor:
        name = getattr(path[-1], "name", getattr(path[-1], "key", ""))
        if name.endswith("stats"):
            mean, deviation, weight, bias = draw(4, like.shape[1])
            if len(path) == 1 and name == "stats":
                weights.append(weight)
            return running_stats(mean, deviation.square() + 0.5, weight, bias, 1e-5)
        # A weight's sums over C*R*S are of the size of what they are summed from.
        scale = math.prod(like.shape[1:]) ** -0.5 if name == "weight" else 1.0
        return draw(*like.shape) * scale

    def fill(path: Sequence[Any], like: Any) -> Any:
        if isinstance(like, torch.dtype):
            return torch.float64 if exact else like
        if not isinstance(like, Like):
            return like
        if like.number not in made:
            rounded = values(path, like).to(like.dtype)
            dtype = torch.float64 if exact else like.dtype
            empty = torch.empty_strided(like.shape, like.stride, dtype=dtype, device=device)
            made[like.number] = empty.copy_(rounded)
        return made[like.number]

    filled = dict(tree_map_with_path(fill, dict(call.arguments)))
    if call.method == "norm_conv_backward" and filled["norm"].weight is not None:
        filled["norm"].weight.copy_(weights[0])  # what the statistics were made of
    return filled


def _run(engine: AtenEngine, call: Call, arguments: dict[str, Any]) -> Any:
    """What a call gives; of moments, the statistics."""
    waits = arguments.get("add")
    if isinstance(waits, Dgrad) and engine.name != "triton":
        given = {name: arguments[name] for name in ("h", "dtype", "act")}
        found = engine.conv_backward(
            g=waits.g, weight=waits.weight, geometry=waits.geometry, stats=None,
            need_input=True, need_weight=False, need_bias=False, **given,
        )  # fmt: skip
        assert found.grad is not None
        arguments = {**arguments, "add": found.grad.q}
    result = getattr(engine, call.method)(**arguments)
    if call.method == "conv_forward" and result[1] is not None:
        norm = arguments.get("norm") or Norm(None, None, 1e-5)
        return result[0], engine.norm_stats(result[1], *norm[:3])
    return result


def seconds_on(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A clock: seconds of a function on the device."""

    def on_gpu(run: Callable[[], Any]) -> float:
        found = triton.testing.do_bench(run, warmup=_WARMUP, rep=_REPEAT, return_mode="median")
        return float(found) / 1e3

    def on_cpu(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return on_gpu if device.type == "cuda" else on_cpu


def neighbours(kernel: str, constants: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """The tiles worth trying beside one that was launched, of a kernel that convolves."""
    if constants["PRECISION"] == "ieee" and constants["DTYPE"] == triton.language.float32:
        return []  # no matrix unit's: all operands pass through registers
    operation, m = _OPERATION[kernel], constants["BLOCK_M"]
    warps, stages = constants["num_warps"], constants["num_stages"]
    if operation == WGRAD:
        k, j = constants["BLOCK_K"], constants["BLOCK_J"]
        first = WgradConfig(m, k, j, constants["J_TILES"], warps, stages)
        near = [
            first._replace(block_m=m // 2),
            first._replace(block_m=m * 2),
            first._replace(num_stages=3 - stages),
            first._replace(block_k=k // 2),
            first._replace(block_j=j // 2),
        ]
        return [
            tuple(t) for t in near if 16 <= t.block_m <= 128 and min(t.block_k, t.block_j) >= 16
        ]
    n, k = constants["BLOCK_N"], constants["BLOCK_K"]
    if operation == BOTH:
        ahead = 2 if constants["AHEAD"] else 1
        own = Config(m, n, k, warps, ahead)
        some = [
            own._replace(block_m=m // 2),
            own._replace(block_m=m * 2),
            own._replace(num_stages=3 - ahead),
        ]
        return [tuple(t) for t in some if 16 <= t.block_m <= 128]
    conv = constants["CONV"]
    widest = max(16, min(64, next_power_of_2(conv.K if operation == FORWARD else conv.C)))
    least = 16 if launch.INTERPRET else 64
    sizes = [(m // 2, n), (m * 2, n), (m, n // 2), (m, n * 2), (m * 2, n // 2), (m // 2, n * 2)]
    return [
        tuple(Config(rows, columns, k, warps, stages, constants["UNROLL"]))
        for rows, columns in sizes
        if least <= rows <= 256 and 16 <= columns <= widest and rows * columns <= 128 * 64
    ][:5]


class RefusedError(Exception):
    """Why a candidate is not timed: it is wrong, or cannot be had here."""


class Found(NamedTuple):
    """What a task's candidates took.

    choices: the fastest's, by ``choices.key``. before, after: seconds of the cost model's way and
    of the fastest, both of all calls. name: the fastest's. seconds: by name. refused: the others'
    reasons, by name.
    """

    choices: dict[str, Choice]
    before: float
    after: float
    name: str
    seconds: dict[str, float]
    refused: dict[str, str]


class Tuner:
    """Times the candidates of one task.

    Args:
        device: where. timer: of a function of no arguments, in seconds. check: whether results are
            held against float64: not where a stand-in computes none.
    """

    def __init__(
        self,
        task: Task,
        device: torch.device,
        timer: Callable[[Callable[[], Any]], float] | None = None,
        check: bool = True,
    ) -> None:
        self.task, self.device, self.check = task, device, check
        self.timer = timer or seconds_on(device)
        self.engine = TritonEngine()
        self.seconds: dict[str, float] = {}
        self.refused: dict[str, str] = {}
        self._expected: dict[tuple[Call, int], tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        # What a candidate launches: the tile of each convolution's kernel that came first.
        self._launched: dict[str, tuple[str, dict[str, Any]]] = {}

    def tune(self) -> Found:
        """Time all candidates.

        Raises:
            RefusedError: none can be had.
        """
        with torch.no_grad(), warnings.catch_warnings():
            # A tile that this device cannot have is no candidate.
            warnings.simplefilter("error", FallbackWarning)
            timed = self._implementations()
            if not timed:
                raise RefusedError("; ".join(dict.fromkeys(self.refused.values())))
            fastest = min(seconds for _, seconds, _ in timed)
            best = timed[0]
            for candidate, seconds, launched in timed:
                if seconds <= _WORTH * fastest:
                    candidate, seconds = self._with_tiles(candidate, seconds, launched)
                if seconds < best[1] * (_GAIN if best is timed[0] else 1):
                    best = candidate, seconds, launched
        name = next(iter(self.seconds)) if best is timed[0] else _name(best[0])
        return Found(self._kept(best[0]), timed[0][1], best[1], name, self.seconds, self.refused)

    def _kept(self, candidate: Candidate) -> dict[str, Choice]:
        at = self.task[1:5]
        return {
            choices.key(operation, *at): choice._replace(seconds=self.seconds)
            for operation, choice in candidate.items()
        }

    def _implementations(self) -> list[tuple[Candidate, float, dict[str, Any]]]:
        """Each implementation with the cost model's tiles, that model's own way first."""
        found = []
        for candidate in _candidates(self.task):
            if BOTH in candidate and BOTH not in self._launched:
                continue  # a kernel for each, as it was
            seconds = self._time(candidate)
            if seconds is not None:
                found.append((candidate, seconds, dict(self._launched)))
        return found

    def _with_tiles(
        self, candidate: Candidate, seconds: float, launched: Mapping[str, Any]
    ) -> tuple[Candidate, float]:
        """The candidate with the best tile of each kernel that it launches, one after the other."""
        for operation, (kernel, constants) in launched.items():
            for tile in neighbours(kernel, constants):
                chosen = candidate.get(operation, Choice(FUSED))
                other = {**candidate, operation: chosen._replace(tile=tile)}
                found = self._time(other)
                if found is not None and found < seconds * _GAIN:
                    candidate, seconds = other, found
        return candidate, seconds

    def _time(self, candidate: Candidate) -> float | None:
        """Seconds of all calls, or None where the candidate is refused."""
        name = _name(candidate)
        self._launched = {}

        def note(kernel: str, grid: object, constants: dict[str, Any]) -> None:
            if kernel in _OPERATION:
                self._launched.setdefault(_OPERATION[kernel], (kernel, constants))

        try:
            with choices.forced(candidate):
                with launch.record(note):
                    self._hold()
                total = 0.0
                for call, count in self.task.calls:
                    arguments = _tensors(call, 0, self.device, False)
                    total += count * self.timer(partial(_run, self.engine, call, arguments))
        except (RefusedError, KernelError, FallbackWarning, torch.OutOfMemoryError) as error:
            self.refused[name] = str(error).partition("\n")[0]
            return None
        self.seconds[name] = total
        return total

    def _hold(self) -> None:
        """Run each call, and hold its results against float64."""
        for call, _ in self.task.calls:
            if not self.check:
                _run(self.engine, call, _tensors(call, 0, self.device, False))
                continue
            held = judged(partial(self._draw, call), 1, 1, _DRAWS)
            name, excess = held.worst()
            if not excess <= 1:
                raise RefusedError(f"wrong: {name} is off by {excess:.3g} of the allowed error")

    def _draw(self, call: Call, seed: int, _: bool) -> Draw:
        if (call, seed) not in self._expected:
            aten = AtenEngine()
            eager, exact = (
                named(_run(aten, call, _tensors(call, seed, self.device, wide)))
                for wide in (False, True)
            )
            self._expected[call, seed] = eager, exact
        eager, exact = self._expected[call, seed]
        found = named(_run(self.engine, call, _tensors(call, seed, self.device, False)), eager)
        terms = {n: float(v.norm()) for n, v in exact.items() if n not in ELEMENTWISE}
        return Draw(found, eager, exact, terms)


def _candidates(task: Task) -> list[Candidate]:
    """The implementations of a task: the cost model's first."""
    usual = implementation(task.weight, task.geometry)
    found: list[Candidate]
    if task.direction == FORWARD:
        hows = [FUSED, WRITTEN, ATEN]
        if not any(dict(call.arguments).get("stats") for call, _ in task.calls):
            hows.remove(FUSED if usual == WRITTEN else WRITTEN)  # there is no prologue
        found = [{FORWARD: Choice(how)} for how in hows]
        return sorted(found, key=lambda each: each[FORWARD].how != usual)
    pairs = [(FUSED, FUSED), (WRITTEN, WRITTEN), (ATEN, ATEN), (WRITTEN, ATEN), (ATEN, WRITTEN)]
    found = [{DGRAD: Choice(dgrad), WGRAD: Choice(wgrad)} for dgrad, wgrad in pairs]
    found.insert(1, {**found[0], BOTH: Choice(APART)})
    return sorted(found, key=lambda each: {c.how for c in each.values()} != {usual})


def _name(candidate: Candidate) -> str:
    """ "fused", or "dgrad written 64x64x32, wgrad aten"."""
    words = {operation: _words(choice) for operation, choice in candidate.items()}
    if len({*words.values()}) == 1 and (len(words) == 1 or DGRAD in words):
        return next(iter(words.values()))
    return ", ".join(f"{operation} {text}" for operation, text in words.items())


def _words(choice: Choice) -> str:
    if choice.tile is None:
        return str(choice.how)
    return f"{choice.how} {'x'.join(str(int(n)) for n in choice.tile)}"


def with_neighbours(step: Callable[[], object]) -> None:
    """Run a step, and again with each tile that would be tried for its convolutions."""
    launched: list[tuple[str, Any]] = []

    def note(kernel: str, grid: object, constants: dict[str, Any]) -> None:
        if kernel in _OPERATION:
            launched.append((kernel, constants))

    with launch.record(note):
        step()
    for kernel, constants in launched:
        for tile in neighbours(kernel, constants):
            with choices.forced({_OPERATION[kernel]: Choice(None, tile)}):
                step()
