"""Which memory mode fits a budget: predictions for a training step, and the choice (design 3).

``plan`` answers before anything is run; ``PreActResNet(memory="auto")`` asks the same question at
its first training step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.operators import Shape
from ..core.run import Recipe, segment_length
from ..kernels.dispatch import has_triton
from ..kernels.operands import Geometry
from .budget import MODES, ChainCost, chain_cost

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


class Plan(NamedTuple):
    """The modes with what they need, and which one ``auto`` takes. Prints as a table.

    rows: one ``ModeCost`` per mode, the fastest first. mode: the fastest that fits ``budget``, or
    None where no budget was given. eager: bytes that eager PyTorch keeps.
    """

    rows: tuple[ModeCost, ...]
    mode: str | None
    budget: int | None
    batch_size: int
    eager: int

    def row(self, mode: str) -> ModeCost:
        """The row of ``mode``; KeyError with the names where there is none."""
        for row in self.rows:
            if row.mode == mode:
                return row
        raise KeyError(f"{mode!r} is not one of {', '.join(r.mode for r in self.rows)}")

    def __str__(self) -> str:
        names = ("mode", "parameters", "gradients", "optimizer", "kept", "walk", "peak", "FLOPs")
        table: list[tuple[str, ...]] = [names]
        for r in self.rows:
            sizes = (r.parameters, r.gradients, r.optimizer, r.kept, r.walk, r.peak)
            mark = " *" if r.mode == self.mode else ""
            table.append(
                (r.mode + mark, *(format_bytes(n) for n in sizes), f"+{r.extra_flops:.0%}")
            )
        widths = [max(len(line[i]) for line in table) for i in range(len(names))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))
            ).rstrip()
            for line in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append(f"batch {self.batch_size}; eager PyTorch keeps {format_bytes(self.eager)}")
        if self.budget is not None:
            lines.append(f"* fits {format_bytes(self.budget)}: what auto takes")
        return "\n".join(lines)


def _step(
    model: nn.Module,
    image: Shape,
    dtype: torch.dtype,
    mode: str,
    *,
    triton: bool,
    optimizer_states: float,
) -> tuple[ModeCost, int]:
    """The row of one mode, and the bytes that eager keeps; image: a batch of images."""
    stages: Sequence[Sequence[Recipe]] = [
        [_recipe(block) for block in stage]
        for stage in model.stages  # type: ignore[union-attr]
    ]
    parameters = list(model.parameters())
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    optimizer = int(gradients * optimizer_states)
    x, stem = _stem(model, image, dtype)
    held = stem + x.nbytes
    costs: list[ChainCost] = []
    for recipes in stages:
        segment = segment_length(recipes) if mode == "segment" else 0
        cost, x = chain_cost(recipes, x, dtype, mode, triton=triton, segment=segment)
        costs.append(cost)
    tail = 3 * x.nbytes
    peak = kept = held
    done = 0
    chains = sum(c.gradients for c in costs)
    for cost in costs:
        kept += cost.kept + cost.ends
        # Of the gradients, those of later stages and of this one exist when its backward ends.
        peak = max(peak, kept + cost.walk + gradients - done - (gradients - chains))
        done += cost.gradients
    # The last norm and activation, with their backward.
    peak = max(peak, kept + tail)
    return (
        ModeCost(
            mode,
            weights + buffers,
            gradients,
            optimizer,
            kept,
            max(c.walk for c in costs),
            weights + buffers + optimizer + peak + tail // 3,
            sum(c.extra_flops for c in costs) / (3 * sum(c.flops for c in costs)),
            tuple(c.segment for c in costs) if mode == "segment" else (),
        ),
        sum(c.eager for c in costs) + held,
    )


def _recipe(block: nn.Module) -> Recipe:
    recipe = block.recipe()  # type: ignore[operator]
    if isinstance(recipe, str):
        raise ValueError(f"{type(block).__name__} does not run as part of a chain: {recipe}")
    return recipe


def _stem(model: nn.Module, image: Shape, dtype: torch.dtype) -> tuple[Shape, int]:
    """What enters the first stage, and the bytes that the layers before it keep."""
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
    return x, kept


def plan(
    model_or_depth: nn.Module | int,
    batch_size: int,
    budget: str | int | None = None,
    *,
    image_size: int | tuple[int, int] = 32,
    dtype: str | torch.dtype = "fp32",
    optimizer_states: float = 1.0,
    device: str | torch.device | None = None,
    **options: Any,
) -> Plan:
    """Predict what a training step needs in each memory mode, and choose one.

    Args:
        model_or_depth: a ``PreActResNet``, or the depth of one (then ``options``, such as
            ``block="bottleneck"``, go to ``PreActResNet.from_depth``; nothing is allocated).
        batch_size: images a step.
        budget: bytes for everything, "8GiB" or a number; on a GPU the free memory if None.
        image_size: height and width.
        dtype: in which convolutions multiply: "fp32", "fp16", "bf16" (autocast).
        optimizer_states: values an optimizer keeps per parameter: 1 for momentum, 2 for Adam.
        device: "cuda" (kernels) or "cpu" (ATen); the model's, or the machine's if a depth is given.

    Raises:
        BudgetError: no mode fits; it says the smallest budget that works and the largest batch
            that fits. ValueError: an impossible argument.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= optimizer_states < math.inf:
        raise ValueError(f"optimizer_states must be a number from 0 on, got {optimizer_states}")
    if min((image_size,) if isinstance(image_size, int) else image_size) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    multiply = DTYPES[dtype] if isinstance(dtype, str) else dtype
    model = model_or_depth
    if isinstance(model, int):
        from ..models import PreActResNet

        with torch.device("meta"):
            model = PreActResNet.from_depth(model, **options)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    else:
        where = torch.device(device) if device else next(model.parameters()).device
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    triton = where.type == "cuda" and has_triton()
    limit = None if budget is None else parse_bytes(budget)
    if limit is None and where.type == "cuda" and torch.cuda.is_available():
        limit = torch.cuda.mem_get_info(where)[0] + torch.cuda.memory_reserved(where)

    def rows(batch: int, modes: Sequence[str]) -> tuple[list[ModeCost], int]:
        assert isinstance(model, nn.Module)
        channels: Any = model.conv1.in_channels  # type: ignore[union-attr]
        image = Shape((batch, channels, *size), next(model.parameters()).dtype)
        eager = 0
        result = []
        for mode in modes:
            row, kept_by_eager = _step(
                model, image, multiply, mode, triton=triton, optimizer_states=optimizer_states
            )
            result.append(row)
            # Eager's stream is not widened: the first mode's shapes are eager's.
            eager = eager or kept_by_eager
        return result, eager

    table, eager = rows(batch_size, MODES)
    mode = None
    if limit is not None:
        mode = next((row.mode for row in table if row.peak <= limit), None)
        if mode is None:
            least = min(table, key=lambda row: row.peak)
            largest = _largest_batch(batch_size, limit, lambda b: rows(b, [least.mode])[0][0].peak)
            fits = f"the largest batch that fits is {largest}" if largest else "no batch fits it"
            raise BudgetError(
                f"a step of batch {batch_size} needs at least {format_bytes(least.peak)} "
                f'(memory="{least.mode}"), more than the budget of {format_bytes(limit)}; {fits}'
            )
    return Plan(tuple(table), mode, limit, batch_size, eager)


def _largest_batch(above: int, limit: int, peak: Any) -> int:
    """Largest batch in [0, above) whose peak is within the limit, by bisection."""
    low, high = 0, above
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low


def peak_bytes(step: Callable[[], object], cuda: bool) -> int:
    """Most bytes allocated at once during ``step()`` beyond those before it.

    Read from the CUDA allocator, or on a CPU from the profiler's memory events.
    """
    from torch.profiler import ProfilerActivity, profile

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    allocated = peak = 0
    for _, change in changes:
        allocated += change
        peak = max(peak, allocated)
    return peak
