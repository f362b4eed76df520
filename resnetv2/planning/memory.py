"""The bytes of a training step in each memory mode, before anything is run."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..core.memory import ModeCost, choose_mode, format_budget, format_bytes, step_limit
from ..core.table import Cells, html_lines, html_table, text_table
from ..models import IMAGE_SIZES, PreActResNet, standard_net
from ..names import DTYPES


class Plan(NamedTuple):
    """The modes with what they need, and which one ``auto`` takes. Prints and shows itself as a
    table.

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
        return "\n".join([text_table(*self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        return f"{html_table(*self._table())}\n{html_lines(self._notes())}"

    def _table(self) -> Cells:
        names = ("mode", "parameters", "gradients", "optimizer", "kept", "walk", "peak", "FLOPs")
        rows = []
        for r in self.rows:
            sizes = (r.parameters, r.gradients, r.optimizer, r.kept, r.walk, r.peak)
            mark = " *" if r.mode == self.mode else ""
            rows.append((r.mode + mark, *(format_bytes(n) for n in sizes), f"+{r.extra_flops:.0%}"))
        return names, rows, [False] + [True] * (len(names) - 1)

    def _notes(self) -> list[str]:
        notes = [f"batch {self.batch_size}; eager PyTorch keeps {format_bytes(self.eager)}"]
        if self.budget is not None:
            notes.append(f"* fits {format_budget(self.budget)}: what auto takes")
        return notes


def plan(
    model_or_depth: nn.Module | int | str,
    batch_size: int,
    budget: str | int | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    dtype: str | torch.dtype = "fp32",
    optimizer_states: float = 1.0,
    device: str | torch.device | None = None,
    **options: Any,
) -> Plan:
    """Predict what a training step needs in each memory mode, and choose one.

    Args:
        model_or_depth: a ``PreActResNet``; a standard net's name, such as "preact_resnet50"; or a
            depth (then ``options``, such as ``block="bottleneck"``, go to
            ``PreActResNet.from_depth``). For a name or a depth nothing is allocated.
        batch_size: images a step.
        budget: bytes for everything, "8GiB" or a number; on a GPU the free memory if None.
        image_size: height and width. Default: 32, or 224 with the stem "imagenet".
        dtype: in which convolutions multiply: "fp32", "fp16", "bf16" (autocast).
        optimizer_states: values an optimizer keeps per parameter: 1 for momentum, 2 for Adam.
        device: "cuda" (kernels) or "cpu" (ATen); the model's, or the machine's if a depth is given.

    Raises:
        BudgetError: no mode fits; it says the smallest budget that works and the largest batch
            that fits. ValueError: an impossible argument. TypeError: another module.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= optimizer_states < math.inf:
        raise ValueError(f"optimizer_states must be a number from 0 on, got {optimizer_states}")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    multiply = DTYPES[dtype] if isinstance(dtype, str) else dtype
    model = model_or_depth
    if isinstance(model, (int, str)):
        with torch.device("meta"):
            if isinstance(model, int):
                model = PreActResNet.from_depth(model, **options)
            else:
                model = standard_net(model).build(**options)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    elif isinstance(model, PreActResNet):
        where = torch.device(device) if device else next(model.parameters()).device
    else:
        raise TypeError(
            f"expected a PreActResNet, its name or its depth, got {type(model).__name__}: "
            'fuse(model, memory="auto", budget=...) plans for any other'
        )
    if image_size is None:
        image_size = IMAGE_SIZES[str(model.stem)]
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if min(size) < 1:
        raise ValueError(f"image_size must be at least 1, got {image_size}")
    limit = step_limit(where, budget)
    choice = choose_mode(
        model,
        model.steps((size[0], size[1]), multiply, where),
        batch_size,
        limit,
        optimizer_states=optimizer_states,
    )
    return Plan(choice.rows, choice.mode, limit, batch_size, choice.eager)


def peak_bytes(step: Callable[[], object], cuda: bool) -> int:
    """Most bytes allocated at once during ``step()`` beyond those before it.

    Read from the CUDA allocator, or on a CPU from the profiler's memory events. Bytes as
    they were asked for: a small tensor's share of a block of 512 is not counted on either device.
    """
    from torch.profiler import ProfilerActivity, profile

    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        step()
        return int(torch.cuda.memory_stats()["requested_bytes.all.peak"] - before)
    quiet_profiler()
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
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


def quiet_profiler() -> None:
    """Keep PyTorch's profiler from writing when it began and ended to stderr, unless asked to."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
