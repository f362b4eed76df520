"""Bytes of a model's training step in each memory mode, and the choice of one.

``PreActResNet(memory="auto")`` asks at its first training step what ``plan`` answers beforehand.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..kernels.dispatch import has_triton
from ..names import MEMORY_MODES
from .footprint import Footprint, nbytes_of

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


class Choice(NamedTuple):
    """Bytes of each mode, the fastest first; of eager; and the fastest mode within the limit."""

    rows: tuple[ModeCost, ...]
    eager: int
    mode: str | None

    @property
    def chosen(self) -> ModeCost:
        """The chosen mode's row."""
        return next(row for row in self.rows if row.mode == self.mode)


def choose_mode(
    model: nn.Module,
    step: Callable[[int, str], Footprint],
    batch_size: int,
    limit: int | None,
    *,
    optimizer_states: float = 1.0,
) -> Choice:
    """What a training step of ``model`` holds in each mode, and the fastest that fits.

    Args:
        step: of a batch size and a mode, what a step holds. limit: bytes; None chooses no mode.

    Raises:
        BudgetError: no mode fits.
    """
    parameters = list(model.parameters())
    weights = sum(map(nbytes_of, [*parameters, *model.buffers()]))
    gradients = sum(nbytes_of(p) for p in parameters if p.requires_grad)
    optimizer = int(gradients * optimizer_states)

    def row(mode: str, found: Footprint, flops: int) -> ModeCost:
        return ModeCost(
            mode,
            weights,
            gradients,
            optimizer,
            found.kept,
            found.walk,
            weights + optimizer + found.peak,
            found.flops / flops - 1 if flops else 0.0,
            found.segments if mode == "segment" else (),
        )

    steps = [step(batch_size, mode) for mode in MEMORY_MODES]
    # The first mode computes nothing again, and its shapes are eager's: no stream is widened.
    rows = tuple(row(mode, its, steps[0].flops) for mode, its in zip(MEMORY_MODES, steps))
    mode = None
    if limit is not None:
        mode = next((row.mode for row in rows if row.peak <= limit), None)
        if mode is None:
            least = min(rows, key=lambda row: row.peak)
            rest = limit - weights - optimizer
            largest = _largest_batch(batch_size, rest, lambda b: step(b, least.mode).peak)
            fits = f"the largest batch that fits is {largest}" if largest else "no batch fits it"
            raise BudgetError(
                f"a step of batch {batch_size} needs at least {format_bytes(least.peak)} "
                f'(memory="{least.mode}"), more than the budget of {format_budget(limit)}; {fits}'
            )
    return Choice(rows, steps[0].eager, mode)
