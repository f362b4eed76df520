"""Bytes and FLOPs of every kernel of a training step, and the time that they cannot go below.

They are read off the programs that a chain runs (``core.meta``), kernel by kernel (Triton) or
operator by operator (ATen).

Every activation and weight of a launch counts once, as with a cache of unlimited size. Left out
are values per channel, and the sums that a weight gradient's programs leave for its reduction. A
kernel's floor is the larger of its bytes over the device's copy rate and its FLOPs over the
device's rate of matrix multiplication; launches take their own time on top.
"""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..core.memory import format_bytes, planned_gpu
from ..core.meta import MetaPrograms, chain_parts, on_meta
from ..core.modules import UnitModules
from ..core.program import Program, record
from ..core.reading import Reading
from ..core.shapes import Shape
from ..core.table import text_table
from ..kernels import recording
from ..kernels.operands import Geometry
from ..kernels.reference import memory_format_of
from ..models import IMAGE_SIZES, MODELS, PreActResNet
from ..names import MEMORY_MODES


class Rates(NamedTuple):
    """The rates of a device. copy: bytes/s, read plus written. multiply: FLOP/s of a matrix product
    in ``dtype``. source: where the figures come from, for people to read, a line or two."""

    copy: float
    multiply: float
    dtype: torch.dtype
    source: str


# NVIDIA's data sheet, dense; fp32 without TF32, as convolutions run by PyTorch's default in "ieee".
_H100_FLOPS = {torch.float32: 67e12, torch.float16: 989e12, torch.bfloat16: 989e12}


def h100_rates(dtype: torch.dtype = torch.bfloat16) -> Rates:
    """The data sheet's rates of an H100 SXM: 3.35 TB/s, 989 TFLOP/s in bf16 and fp16.

    Raises:
        ValueError: ``dtype`` is not one of float32, float16, bfloat16.
    """
    if dtype not in _H100_FLOPS:
        raise ValueError(f"expected float32, float16 or bfloat16, got {dtype}")
    return Rates(3.35e12, _H100_FLOPS[dtype], dtype, "data sheet of an H100 SXM")


def copy_rate(device: torch.device | str, nbytes: int) -> float:
    """Bytes/s, read plus written, of the best of many copies of ``nbytes`` on ``device``."""
    rate, _ = _copies(device, nbytes)
    return rate


def multiply_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of the best of many matrix products in ``dtype`` on ``device``."""
    rate, _ = _products(device, dtype)
    return rate


def _copies(device: torch.device | str, nbytes: int) -> tuple[float, Runs]:
    device = torch.device(device)
    source = torch.empty(nbytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source).copy_(source)
    copies = max(1, 2**26 // nbytes)  # small buffers several times, above the clock's resolution

    def copy() -> None:
        for _ in range(copies):
            target.copy_(source)

    runs = _timed(copy, device)
    return 2 * nbytes * copies / runs.best, runs


def _products(device: torch.device | str, dtype: torch.dtype) -> tuple[float, Runs]:
    device = torch.device(device)
    size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    runs = _timed(lambda: a @ b, device)
    return 2 * size**3 / runs.best, runs


MEMORY_BYTES = 2**27  # a buffer that no cache near the cores holds
CACHE_BYTES = 2**20  # one that a core's cache holds


# A machine whose cores have this much other work, or whose runs differ by so much, is loaded.
_BUSY_SHARE = 0.5
_STEADY = 1.5


def measure_rates(device: torch.device | str, dtype: torch.dtype = torch.float32) -> Rates:
    """The rates of ``device`` as measured now: the best of many runs.

    On a CPU, whose caches hold a layer's activations, copies of a buffer in the cache count if
    they are faster: what is added up from these rates is a floor. ``source`` says how far the
    median run is from the best one, and whether the machine was busy with other work.
    """
    device = torch.device(device)
    waiting = 0.0 if device.type == "cuda" else _load()
    sizes = (MEMORY_BYTES,) if device.type == "cuda" else (MEMORY_BYTES, CACHE_BYTES)
    copied = max((_copies(device, nbytes) for nbytes in sizes), key=lambda found: found[0])
    multiplied = _products(device, dtype)
    spreads = [runs.spread for _, runs in (copied, multiplied)]
    source = f"measured on this {device.type}, " + " and ".join(
        f"{name}: best of {runs.number}, the median {runs.spread:.2f} times as long"
        for name, (_, runs) in (("copies", copied), ("products", multiplied))
    )
    cores = os.cpu_count() or 1
    if waiting > _BUSY_SHARE * cores or max(spreads) > _STEADY:
        source += (
            f"\nthis machine is loaded ({waiting:.1f} other processes for {cores} cores): "
            "the rates may be too low and the floors too high; measure again when it is idle"
        )
    return Rates(copied[0], multiplied[0], dtype, source)


def _load() -> float:
    """Processes that ran or waited for a core in the last minute, on average; 0 if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        return 0.0


class Runs(NamedTuple):
    """Timed runs of one function. best: seconds. spread: the median over the best."""

    best: float
    spread: float
    number: int


# A timing ends once so many runs in a row were no faster, or after so many seconds.
_IN_VAIN = 20
_SHORTEST, _LONGEST = 0.3, 3.0


def _timed(run: Callable[[], object], device: torch.device) -> Runs:
    seconds: list[float] = []
    best, since = float("inf"), 0
    started = time.perf_counter()
    while True:
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        end = time.perf_counter()
        seconds.append(end - start)
        since = 0 if seconds[-1] < 0.99 * best else since + 1
        best = min(best, seconds[-1])
        # At least the shortest: clocks and threads take a while to wake up.
        enough = since >= _IN_VAIN and end - started > _SHORTEST
        if enough or end - started > _LONGEST:
            return Runs(best, statistics.median(seconds) / best, len(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Cost(NamedTuple):
    """One kernel, or operator of ATen.

    step: what it belongs to ("stage 1 forward"). nbytes: read plus written. flops: of a
    convolution, else 0.
    """

    step: str
    kernel: str
    nbytes: int
    flops: int

    def floor(self, rates: Rates) -> float:
        """Seconds below which the kernel cannot go on a device of these rates."""
        return max(self.nbytes / rates.copy, self.flops / rates.multiply)


class StepCost(NamedTuple):
    """The kernels of a training step, without the optimizer: forward and backward apart."""

    forward: list[Cost]
    backward: list[Cost]

    @property
    def all(self) -> list[Cost]:
        """Both, in order."""
        return self.forward + self.backward


def modes_table(
    model: nn.Module,
    batch_size: int,
    image_size: int,
    dtype: torch.dtype,
    rates: Rates,
    *,
    triton: bool,
) -> str:
    """Launches, bytes, FLOPs and the floor in milliseconds of a step, one line per memory mode."""
    names = ("mode", "launches", "bytes", "FLOPs", "forward", "backward", "floor")
    rows = []
    for mode in MEMORY_MODES:
        cost = step_costs(model, batch_size, image_size, dtype, mode, triton=triton)
        forward, backward = (floor_seconds(part, rates) for part in cost)
        rows.append(
            (
                mode,
                str(len(cost.all)),
                format_bytes(sum(c.nbytes for c in cost.all)),
                f"{sum(c.flops for c in cost.all) / 1e9:.1f} G",
                *(f"{1e3 * s:.2f} ms" for s in (forward, backward, forward + backward)),
            )
        )
    text = [text_table(names, rows, [False] + [True] * (len(names) - 1))]
    text.append(
        f"{rates.copy / 1e9:.1f} GB/s copied, {rates.multiply / 1e9:.0f} GFLOP/s "
        f"({str(rates.dtype).removeprefix('torch.')}): {rates.source}"
    )
    text.append(
        "floor: the larger of a kernel's bytes and FLOPs over these rates, added up; without "
        "launches' own time and the optimizer"
    )
    return "\n".join(text)


def models_table() -> str:
    """The standard nets by name: blocks, parameters, and FLOPs of a forward of one image."""
    names = ("model", "block", "units per stage", "image", "parameters", "FLOPs")
    rows = []
    for name, net in MODELS.items():
        with torch.device("meta"):
            model = net.build()
        size = IMAGE_SIZES[net.stem]
        rows.append(
            (
                name,
                net.block,
                ", ".join(map(str, net.units)),
                f"{size}x{size}",
                f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
                f"{forward_flops(model, (size, size)) / 1e9:.2f} G",
            )
        )
    note = (
        "parameters: with the classifier of 1,000 classes (224x224) or 10; FLOPs: of the "
        "convolutions in a forward of one image, a multiplication and an addition counted as two"
    )
    return f"{text_table(names, rows, [False, False, False, False, True, True])}\n{note}"


def forward_flops(model: PreActResNet, image_size: tuple[int, int]) -> int:
    """FLOPs of the convolutions in a forward of one image: ``step_costs``' sum, by shapes alone."""

    def flops(conv: nn.Conv2d, size: tuple[int, int]) -> int:
        return 2 * math.prod(size) * conv.weight.numel()

    conv = model.conv1
    size = Geometry(conv.stride, conv.padding).output_size(image_size, conv.kernel_size)  # type: ignore[arg-type]
    total = flops(conv, size)
    if model.stem == "imagenet":
        size = Geometry((2, 2), (1, 1)).output_size(size, (3, 3))
    for block in itertools.chain(*model.stages):
        unit = block.unit_modules()  # type: ignore[operator]
        for i, conv in enumerate(unit.convs):
            size = unit.geometry(i).output_size(size, conv.kernel_size)
            total += flops(conv, size)
        if unit.projection is not None:
            total += flops(unit.projection, size)
    return total


def floor_seconds(costs: Sequence[Cost], rates: Rates) -> float:
    """Sum of the kernels' floors: each runs after the other."""
    return sum(cost.floor(rates) for cost in costs)


def call_costs(step: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Cost]:
    """The launches of ``function(*args, **kwargs)``; its arguments may hold tensors anywhere."""
    flat, tree = tree_flatten((args, kwargs))
    places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]

    def run(*tensors: Tensor) -> tuple[list[Tensor], None]:
        values = list(flat)
        for place, tensor in zip(places, tensors):
            values[place] = tensor
        args, kwargs = tree_unflatten(values, tree)
        results = tree_flatten(function(*args, **kwargs))[0]
        return [value for value in results if isinstance(value, Tensor)], None

    inputs = [on_meta(flat[place].detach()) for place in places]
    with torch.no_grad(), recording.for_gpu(planned_gpu()):
        program, _, _ = record(run, inputs, torch.device("meta"))
    return _costs(step, program)


def _costs(step: str, program: Program) -> list[Cost]:
    return [Cost(step, *cost) for cost in program.costs]


def chain_costs(
    units: Sequence[UnitModules],
    x: Tensor,
    dtype: torch.dtype,
    memory: str = "recompute",
    *,
    triton: bool,
    need_x: bool = True,
    name: str = "chain",
    programs: MetaPrograms | None = None,
) -> tuple[StepCost, Tensor]:
    """The kernels of one chain's forward and backward, and its output, a tensor without memory.

    Args:
        units: the chain's units. x: (N, C, H, W), its input; only shape and dtype are used.
        dtype: in which convolutions multiply. memory: a mode (resnetv2/README.md, "Memory modes").
        triton: the fused kernels' launches, or ATen's operators. name: of the chain, for the steps.
        programs: those that are known already.
    """
    readings = [Reading(unit) for unit in units]
    parts, out = chain_parts(
        readings,
        [reading.tensors for reading in readings],
        on_meta(x),
        dtype,
        memory,
        gpu=planned_gpu() if triton else None,
        programs=MetaPrograms() if programs is None else programs,
        need_x=need_x,
    )
    cost = StepCost([], [])
    for part in parts:
        cost.forward.extend(_costs(f"{name} forward", part.forward))
    for part in reversed(parts):
        cost.backward.extend(_costs(f"{name} backward", part.backward))
    return cost, out


def step_costs(
    model: nn.Module,
    batch_size: int,
    image_size: int | tuple[int, int] = 32,
    dtype: torch.dtype = torch.float32,
    memory: str = "recompute",
    *,
    triton: bool,
) -> StepCost:
    """The kernels of a ``PreActResNet``'s forward and backward for a batch; nothing is run.

    The stages' chains are listed kernel by kernel; of the layers around them (stem, last norm and
    activation) what ATen reads and writes. Pooling, classifier and loss are left out.

    Args:
        model: may lie on the device "meta". batch_size: images. image_size: height and width.
        dtype: in which convolutions multiply. memory, triton: as for ``chain_costs``.
    """
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    conv: Any = model.conv1
    height, width = Geometry(conv.stride, conv.padding).output_size(size, conv.kernel_size)
    images = Shape((batch_size, conv.in_channels, *size), dtype)
    after = Shape((batch_size, conv.out_channels, height, width), dtype)
    moved = images.nbytes + after.nbytes + conv.weight.numel() * conv.weight.element_size()
    flops = 2 * after.numel * conv.weight[0].numel()
    forward = [Cost("stem forward", "convolution", moved, flops)]
    stem_backward = Cost("stem backward", "wgrad", moved, flops)
    if model.stem == "imagenet":
        pooled = Shape((*after.size[:2], *(n // 2 + n % 2 for n in after.size[2:])), dtype)
        nbytes = after.nbytes + pooled.nbytes + 8 * pooled.numel
        forward.append(Cost("stem pooling", "max_pool2d", nbytes, 0))
        after = pooled
    x = after.empty(torch.device("meta"), memory_format_of(conv.weight))
    chains: list[StepCost] = []
    programs = MetaPrograms()
    for number, stage in enumerate(model.stages, start=1):  # type: ignore[arg-type]
        units = [block.unit_modules() for block in stage]
        chain, x = chain_costs(
            units, x, dtype, memory, triton=triton, name=f"stage {number}", programs=programs
        )
        forward += chain.forward
        chains.append(chain)
    # Moments, then a*h + b, then act; backward: act', the norm's sums, its gradient.
    tail = x.numel() * x.element_size()
    forward.append(Cost("last norm and activation", "batch_norm, relu", 5 * tail, 0))
    backward = [Cost("last norm and activation backward", "threshold, batch_norm", 8 * tail, 0)]
    for chain in reversed(chains):
        backward += chain.backward
    return StepCost(forward, [*backward, stem_backward])
