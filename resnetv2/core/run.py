"""From modules to chains and back: children are read afresh, the operator run, buffers moved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.reference import is_channels_last
from ..names import AUTO, EAGER
from .checks import accepts, check_input, hooked, rows_of
from .modules import ChainUnit, UnitModules
from .operators import chain_format, chain_forward
from .spec import encode_header, encode_unit
from .statistics import update_buffers
from .sync import group_number


def run_chain(
    units: Sequence[UnitModules],
    x: Tensor,
    *,
    backend: str = AUTO,
    memory: str = "recompute",
    segment: int = 0,
) -> Tensor:
    """Run consecutive units as one chain: x (N, C, H, W) to the last unit's output.

    Running statistics and ``num_batches_tracked`` move as in eager. x is not modified; the result
    has x's memory format.

    Raises:
        ValueError: what ``check_input`` refuses, or one value per channel in training.
    """
    check_input(x, units[0].convs[0])
    rows = rows_of(units, x)
    params, layout, constants = describe(
        units,
        compute_dtype(units[0], x.device.type),
        need_x=x.requires_grad,
        backend=backend,
        memory=memory,
        segment=segment,
    )
    like_nchw = x.is_contiguous() and not is_channels_last(x)
    # Here rather than in the operator, so that it is kept for the backward as it is read there.
    x = x.contiguous(memory_format=chain_format(x, _weights(units), backend))
    result = chain_forward(x, params, layout, constants)
    out = result[0]
    norms = [norm for unit in units for norm in unit.norms]
    synced = [i for i, norm in enumerate(norms) if group_number(norm)]
    update_buffers(norms, result[1], rows, synced)
    return out.contiguous() if like_nchw else out


def _weights(units: Sequence[UnitModules]) -> Iterator[Tensor]:
    for unit in units:
        yield from (conv.weight for conv in unit.convs)
        if unit.projection is not None:
            yield unit.projection.weight


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Any,
    *,
    backend: str = AUTO,
    memory: str = "recompute",
    segment: int = 0,
) -> Any:
    """x through modules in order: consecutive units as one chain, all others by a call each.

    A unit with a hook on its own call is called too, and so is one whose input a chain cannot take
    (``accepts``).
    """
    units: list[UnitModules] = []
    for block in blocks:
        if isinstance(block, ChainUnit) and backend != EAGER and not hooked(block):
            unit = block.chain_unit()
            if isinstance(unit, UnitModules) and (units or accepts(unit, x)):
                units.append(unit)
                continue
        if units:
            x = run_chain(units, x, backend=backend, memory=memory, segment=segment)
            units = []
        x = block(x)
    if units:
        x = run_chain(units, x, backend=backend, memory=memory, segment=segment)
    return x


def compute_dtype(unit: UnitModules, device: str) -> torch.dtype:
    """The dtype in which convolutions multiply: autocast's, or the weights' own."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return unit.convs[0].weight.dtype


def describe(
    units: Sequence[UnitModules],
    dtype: torch.dtype,
    *,
    need_x: bool,
    backend: str,
    memory: str,
    segment: int,
) -> tuple[list[Tensor], list[int], list[float]]:
    """The operator's ``params``, ``layout`` and ``constants`` (see ``spec``) for a chain.

    dtype: ``compute_dtype``. need_x: whether the input's gradient is wanted. segment: units of a
    segment, 0 for the length that keeps least.
    """
    if memory == "segment" and segment < 1:
        segment = segment_length(units)
    params: list[Tensor] = []
    body: list[int] = []
    constants: list[float] = []
    for unit in units:
        record = unit.record()
        encode_unit(body, constants, record)
        params += unit.tensors(record)
    needs = [need_x, *(p.requires_grad for p in params)]
    keep = torch.is_grad_enabled() and any(needs)
    # A half-precision stream drifts when it is walked back (design 3): it is float32 then.
    wide = memory != "recompute" and dtype in (torch.float16, torch.bfloat16)
    layout = encode_header(dtype, backend, memory, segment, wide, keep, len(units))
    layout += body
    layout += [int(n) for n in needs]
    return params, layout, constants


def segment_length(units: Sequence[UnitModules]) -> int:
    """Units s of a segment that make n/s kept inputs and s inner h_{k-1} take least together."""
    last = units[-1].convs[-1]
    return max(1, round(math.sqrt(len(units) * last.out_channels / last.in_channels)))
