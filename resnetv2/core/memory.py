"""Bytes of a model's training step in each memory mode, and the choice of one.

``PreActResNet(memory="auto")`` asks at its first training step what ``plan`` answers beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..kernels.dispatch import has_triton
from ..kernels.operands import Geometry
from ..kernels.reference import memory_format_of
from ..names import MEMORY_MODES
from .meta import MetaPart, MetaPrograms, chain_parts
from .modules import UnitModules
from .shapes import Shape, chain_shapes

if TYPE_CHECKING:
    from ..kernels.launch import Device

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


class BudgetError(ValueError):
    """No memory mode fits the budget; says the smallest that works and the largest batch."""


def parse_bytes(text: str | int | float) -> int:
    """Bytes of "8GiB", "500 MB", "2e9" or a number.

    Raises:
        ValueError: anything else, or nothing positive.
    """
    if isinstance(text, (int, float)):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)(i?)b?\s*", text.lower())
        if match is None:
            raise ValueError(f'expected bytes like "8GiB", "500MB" or a number, got {text!r}')
        number, unit, binary = match.groups()
        try:
            value = float(number) * (_BINARY[unit] if binary else _UNITS[unit])
        except (KeyError, ValueError):
            raise ValueError(
                f'expected bytes like "8GiB", "500MB" or a number, got {text!r}'
            ) from None
    if not value > 0:
        raise ValueError(f"a budget must be positive, got {text!r}")
    return int(value)


def format_bytes(value: float) -> str:
    """Bytes with a decimal unit: 1 MB = 10**6 bytes."""
    for unit in ("B", "kB", "MB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def format_budget(value: int) -> str:
    """Bytes in the unit that a budget is likely to be given in: whole MiB as MiB or GiB too."""
    if value % 2**20:
        return format_bytes(value)
    unit, name = (2**30, "GiB") if value >= 2**30 else (2**20, "MiB")
    return f"{value / unit:.4g} {name} ({format_bytes(value)})"


class ModeCost(NamedTuple):
    """One row of a plan: bytes of a training step in one mode.

    parameters, gradients, optimizer: of the whole model. kept: activations from forward to
    backward. walk: what the backward needs on top where it needs most. peak: of all, at the worst
    moment; less than the sum, since gradients come to be as activations go. extra_flops: what the
    backward computes again, as a share of a forward's and backward's FLOPs. segments: units a
    segment has in each stage (mode "segment").
    """

    mode: str
    parameters: int
    gradients: int
    optimizer: int
    kept: int
    walk: int
    peak: int
    extra_flops: float
    segments: tuple[int, ...]


class _Held:
    """Bytes of the tensors that something holds, each once however many hold it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._holders: dict[int, tuple[Tensor, int]] = {}

    def hold(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            _, holders = self._holders.get(id(tensor), (tensor, 0))
            self._holders[id(tensor)] = tensor, holders + 1
            self.nbytes += 0 if holders else _nbytes(tensor)

    def release(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            _, holders = self._holders.pop(id(tensor))
            if holders > 1:
                self._holders[id(tensor)] = tensor, holders - 1
            else:
                self.nbytes -= _nbytes(tensor)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _saved(part: MetaPart) -> list[Tensor]:
    """The bytes that a part keeps for its backward (``parts.PartFunction``)."""
    spec, result = part.spec, part.result
    saved = [result.stats, *result.kept]
    if not spec.walks_to_x:
        saved.append(part.x)
    if spec.memory != "recompute" and spec.part.last:
        saved.append(result.end)
    return saved


def step_bytes(
    model: nn.Module,
    image: Shape,
    dtype: torch.dtype,
    mode: str,
    *,
    gpu: Device | None,
    optimizer_states: float,
    programs: MetaPrograms | None = None,
) -> tuple[ModeCost, int, int]:
    """The row of one mode, the bytes that eager keeps, and the FLOPs of the chains.

    image: a batch of images. programs: those that are known already. ``extra_flops`` is left at 0.
    """
    programs = MetaPrograms() if programs is None else programs
    parameters = list(model.parameters())
    weights = sum(map(_nbytes, parameters))
    gradients = sum(_nbytes(p) for p in parameters if p.requires_grad)
    buffers = sum(map(_nbytes, model.buffers()))
    optimizer = int(gradients * optimizer_states)
    x, stem = _stem(model, image, dtype)
    eager = stem + _nbytes(x)
    parts: list[MetaPart] = []
    segments = []
    held = _Held(stem)
    held.hold([x])
    peak = held.nbytes
    for stage in model.stages:  # type: ignore[union-attr]
        units = [_unit_of(block) for block in stage]
        chain, out = chain_parts(units, x, dtype, mode, gpu=gpu, programs=programs)
        for part in chain:
            held.hold([part.x])  # its caller does
            peak = max(peak, held.nbytes + part.forward.peak)
            held.hold(_saved(part))
            held.release([part.x])
            hs = chain_shapes(part.spec, part.x.shape, part.x.dtype, part.params)
            eager += 2 * sum(shape.nbytes for h in hs for shape in h[:-1])
        segments.append(chain[0].spec.segment)
        parts += chain
        x = out
    # The last norm keeps its input, the activation its result; the gradient is that of either.
    tail = _nbytes(x)
    held.hold([x])
    kept = held.nbytes
    peak = max(peak, kept + 3 * tail)
    held.release([x])
    # Of the gradients those that do not belong to the chains: the tail's and, in the end, the
    # stem's.
    in_chains = sum(_nbytes(t) for part in parts for t in part.grads[part.spec.need_x :])
    held.nbytes += gradients - in_chains
    walk = 0
    g = [torch.empty_like(x, device="meta")]
    held.hold(g)
    walked: list[Tensor] = []
    for part in reversed(parts):
        needs = part.backward.peak
        peak = max(peak, held.nbytes + needs)
        walk = max(walk, needs + sum(map(_nbytes, (*g, *walked))))
        held.release([*_saved(part), *g, *walked])
        g, grads = part.grads[: part.spec.need_x], part.grads[part.spec.need_x :]
        walked = [] if part.walked is None else [part.walked]
        held.hold([*g, *grads, *walked])
    flops = sum(
        cost.flops for part in parts for p in (part.forward, part.backward) for cost in p.costs
    )
    row = ModeCost(
        mode,
        weights + buffers,
        gradients,
        optimizer,
        kept,
        walk,
        weights + buffers + optimizer + peak,
        0.0,
        tuple(segments) if mode == "segment" else (),
    )
    return row, eager, flops


def planned_gpu(device: torch.device | None = None) -> Device | None:
    """The GPU whose kernels are planned for: ``device``, or an H100 where there is no GPU.

    None without Triton: ATen's operators run.
    """
    if not has_triton():
        return None
    from ..kernels.launch import Device

    if not torch.cuda.is_available():
        return Device(132, "cuda", 90)
    found = torch.cuda.get_device_properties("cuda" if device is None else device)
    if torch.version.hip:
        return Device(found.multi_processor_count, "hip", found.gcnArchName.partition(":")[0])
    return Device(found.multi_processor_count, "cuda", 10 * found.major + found.minor)


def _unit_of(block: nn.Module) -> UnitModules:
    unit = block.unit_modules()  # type: ignore[operator]
    if isinstance(unit, str):
        raise ValueError(f"{type(block).__name__} does not run as part of a chain: {unit}")
    return unit


def _stem(model: nn.Module, image: Shape, dtype: torch.dtype) -> tuple[Tensor, int]:
    """The input of the first stage, on "meta", and the bytes that the layers before it keep."""
    conv = model.conv1
    assert isinstance(conv, nn.Conv2d)
    size = Geometry(conv.stride, conv.padding).output_size(image.size[2:], conv.kernel_size)  # type: ignore[arg-type]
    x = Shape((image.size[0], conv.out_channels, *size), dtype)
    kept = 0 if image.dtype == dtype else Shape(image.size, dtype).nbytes
    if model.stem == "imagenet":
        kept += x.nbytes
        size = Geometry((2, 2), (1, 1)).output_size(size, (3, 3))
        x = Shape((*x.size[:2], *size), dtype)
        kept += x.numel * 8  # the pooling's indices
    return x.empty(torch.device("meta"), memory_format_of(conv.weight)), kept


def _largest_batch(above: int, limit: int, peak: Any) -> int:
    """Largest batch in [0, above) whose peak is within the limit, by bisection."""
    low, high = 0, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low


def step_limit(device: torch.device, budget: str | int | None) -> int | None:
    """Bytes that a step may take: ``budget``, or a GPU's free memory where it is None."""
    if budget is not None:
        return parse_bytes(budget)
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return None


def choose_mode(
    model: nn.Module,
    batch_size: int,
    image_size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    limit: int | None,
    *,
    optimizer_states: float = 1.0,
) -> tuple[tuple[ModeCost, ...], int, str | None]:
    """Bytes of each mode, the fastest first; of eager; and the fastest mode within ``limit``.

    Args:
        model: a ``PreActResNet``. dtype: in which convolutions multiply.
        limit: bytes; None chooses no mode.

    Raises:
        BudgetError: no mode fits.
    """
    gpu = planned_gpu(device) if device.type == "cuda" else None
    channels: Any = model.conv1.in_channels  # type: ignore[union-attr]

    programs = MetaPrograms()

    def row(batch: int, mode: str) -> tuple[ModeCost, int, int]:
        image = Shape((batch, channels, *image_size), next(model.parameters()).dtype)
        return step_bytes(
            model,
            image,
            dtype,
            mode,
            gpu=gpu,
            optimizer_states=optimizer_states,
            programs=programs,
        )

    found, eager, flops = zip(*(row(batch_size, mode) for mode in MEMORY_MODES))
    # The first mode computes nothing again.
    rows = tuple(r._replace(extra_flops=f / flops[0] - 1) for r, f in zip(found, flops))
    mode = None
    if limit is not None:
        mode = next((row.mode for row in rows if row.peak <= limit), None)
        if mode is None:
            least = min(rows, key=lambda row: row.peak)
            largest = _largest_batch(batch_size, limit, lambda b: row(b, least.mode)[0].peak)
            fits = f"the largest batch that fits is {largest}" if largest else "no batch fits it"
            raise BudgetError(
                f"a step of batch {batch_size} needs at least {format_bytes(least.peak)} "
                f'(memory="{least.mode}"), more than the budget of {format_budget(limit)}; {fits}'
            )
    # Eager's stream is not widened: the first mode's shapes are eager's.
    return rows, eager[0], mode
