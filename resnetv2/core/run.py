"""From modules to chains and back: children are read afresh, the operator run, buffers moved."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..names import AUTO, EAGER
from . import parts
from .chain import stream_dtype
from .checks import (
    UnfitError,
    accepts,
    check_dtypes,
    check_input,
    follower_of,
    rows_of,
)
from .execution import chain_format, layout_of
from .modules import ChainUnit, UnitModules
from .operators import chain_forward
from .reading import KeptReading, Reading, begin_epoch, read
from .spec import HAND, HAND_TO_RANKS, WHOLE, Part, Spec, decode, encode_header, encode_unit
from .statistics import BufferUpdate
from .sync import group_number


class Plan:
    """A chain, prepared for calls with the same readings, shapes and switches.

    Args:
        readings: the units'. tensors: each one's, in the order of ``slots``. x: an input of the
            chain.

    Raises:
        ValueError: neighbours' channels differ, or one value per channel in training.
    """

    def __init__(
        self,
        readings: Sequence[Reading],
        tensors: Sequence[Sequence[Tensor]],
        x: Tensor,
        dtype: torch.dtype,
        backend: str,
        memory: str,
        segment: int,
    ) -> None:
        self.readings = readings  # by which plans are told apart
        units = [reading.unit for reading in readings]
        rows = rows_of(units, x)
        if memory == "segment" and segment < 1:
            segment = segment_length(units)
        self._compared = memory == "recompute"
        self.specs: list[Spec] = []
        # None where they are computed at every call.
        self.params: list[list[Tensor] | None] = []
        self._bounds: list[tuple[int, int]] = []
        self.updates: list[BufferUpdate] = []
        begin = 0
        for start, stop, part, need_x in _parts(readings, tensors, x, dtype, memory, segment):
            its = readings[start:stop]
            params, layout, constants = describe(
                its,
                dtype,
                need_x=need_x,
                backend=backend,
                memory=memory,
                segment=segment,
                part=part,
                tensors=tensors[start:stop],
            )
            self.specs.append(decode(layout, constants))
            self.params.append(None if any(r.computed for r in its) else params)
            self._bounds.append((start, stop))
            norms = [norm for reading in its for norm in reading.unit.norms]
            end = begin + len(norms)
            synced = [i for i, norm in enumerate(norms) if group_number(norm)]
            self.updates.append(BufferUpdate(norms, rows[begin:end], synced, x.shape[0]))
            begin = end

    def params_of(self, tensors: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Each part's, where the units' tensors are these."""
        return [
            [t for its in tensors[start:stop] for t in its] if params is None else params
            for params, (start, stop) in zip(self.params, self._bounds)
        ]

    def __call__(
        self, tensors: Sequence[Sequence[Tensor]], x: Tensor, memory_format: torch.memory_format
    ) -> Tensor:
        """The chain's output for x; buffers move."""
        params = self.params_of(tensors)
        out, all_stats = parts.run_parts(self.specs, x, params, memory_format, self._compared)
        self._compared = True
        for update, stats in zip(self.updates, all_stats):
            update.apply(stats)
        return out


def _parts(
    readings: Sequence[Reading],
    tensors: Sequence[Sequence[Tensor]],
    x: Tensor,
    dtype: torch.dtype,
    memory: str,
    segment: int,
) -> Iterator[tuple[int, int, Part, bool]]:
    """Where the parts of a chain begin and end, their places, and whether they need x's gradient.

    A segment is a part of its own. Else a part ends where a projection begins the next, so that
    stages of equal units are cut alike, and after ``parts.UNITS``. A unit with computed weights is
    one by itself: their gradients are then used up before the next unit's are there.
    """
    records = [reading.record for reading in readings]
    starts = [0]
    for number, record in enumerate(records):
        length = number - starts[-1]
        if memory == "segment":
            if length == segment:
                starts.append(number)
        elif length and (
            length == parts.UNITS
            or record.projection is not None
            or readings[number].computed
            or readings[number - 1].computed
        ):
            starts.append(number)
    need_x, natural = x.requires_grad, x.dtype
    for start, stop in zip(starts, [*starts[1:], len(records)]):
        last = stop == len(records)
        hands_on = 0
        if not last and records[stop].norms[0].training and not records[stop].norms[0].groups:
            hands_on = HAND_TO_RANKS if records[stop].norms[0].sync else HAND
        wide, _ = stream_of(dtype, memory)
        yield start, stop, Part(start == 0, last, hands_on, natural if wide else None), need_x
        need_x = need_x or any(t.requires_grad for its in tensors[start:stop] for t in its)
        for record in records[start:stop]:
            projects = record.projection is not None
            natural = stream_dtype(projects, record.add_in_place, natural, dtype)


# Units that a stream in half precision is walked back at most: on 111 random bottlenecks in bf16 x
# then comes back within 1 % (root mean square), and gradients are as far from float64's as those
# of ``recompute``. A copy every 16 units takes a quarter of the bytes of their h_{k-1}.
ANCHORS = 16

# Of a parameter, besides its shape: what a plan depends on.
_of_tensor = operator.attrgetter("requires_grad", "dtype")

# Plans that are kept for chains that begin with the same unit: shapes, training and evaluation.
_PLANS = 16


def run_chain(
    readings: Sequence[Reading],
    x: Tensor,
    *,
    backend: str = AUTO,
    memory: str = "recompute",
    segment: int = 0,
    second: Tensor | None = None,
) -> Tensor:
    """Run consecutive units as one chain: x (N, C, H, W) to the last unit's output.

    Running statistics and ``num_batches_tracked`` move as in eager. x is not modified; the result
    has x's memory format. second: the second input of a block that is a chain by itself, for what
    is computed of it (``UnitModules.computed``).

    Raises:
        ValueError: what ``check_input`` refuses, or one value per channel in training.
        UnfitError: the children must run one by one; nothing has run yet.
    """
    check_input(x, readings[0].unit.convs[0])
    dtype = compute_dtype(readings[0].unit, x.device.type)
    like_nchw = layout_of(x) == torch.contiguous_format
    # Here rather than in the operator, so that it is kept for the backward as it is read there.
    memory_format = chain_format(x, _weights(readings), backend)
    x = x.contiguous(memory_format=memory_format)
    tensors = [r.filled(second, x.shape[0]) if r.computed else r.tensors for r in readings]
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        follower = None if torch.compiler.is_compiling() else follower_of(x)
        if follower is not None:
            return follower(readings, tensors, x, dtype, memory)
        out = _run_operator(readings, tensors, x, dtype, backend, memory, segment)
        return out.contiguous() if like_nchw else out
    first = readings[0]
    plan = None
    if all(isinstance(reading, KeptReading) for reading in readings):
        assert isinstance(first, KeptReading)
        key = (
            tuple(map(id, readings)),
            tuple([_of_tensor(t) for its in tensors for t in its]),
            torch.is_autocast_enabled(x.device.type),
            x.shape,
            x.dtype,
            x.requires_grad,
            torch.is_grad_enabled(),
            dtype,
            backend,
            memory,
            segment,
            parts.UNITS,
            stream_of(dtype, memory),
        )
        plan = first.plans.get(key)
    if plan is None:
        check_dtypes([reading.unit for reading in readings], x)
        plan = Plan(readings, tensors, x, dtype, backend, memory, segment)
        if isinstance(first, KeptReading) and all(isinstance(r, KeptReading) for r in readings):
            if len(first.plans) >= _PLANS:
                first.plans.clear()
            first.plans[key] = plan
    out = plan(tensors, x, memory_format)
    return out.contiguous() if like_nchw else out


def _run_operator(
    readings: Sequence[Reading],
    tensors: Sequence[Sequence[Tensor]],
    x: Tensor,
    dtype: torch.dtype,
    backend: str,
    memory: str,
    segment: int,
) -> Tensor:
    """The chain as one operator: what torch.compile sees, and whoever looks at operators."""
    units = [reading.unit for reading in readings]
    rows = rows_of(units, x)
    check_dtypes(units, x)
    if memory == "segment" and segment < 1:
        segment = segment_length(units)
    params, layout, constants = describe(
        readings,
        dtype,
        need_x=x.requires_grad,
        backend=backend,
        memory=memory,
        segment=segment,
        tensors=tensors,
    )
    out, stats, *_ = chain_forward(x, params, layout, constants)
    norms = [norm for unit in units for norm in unit.norms]
    synced = [i for i, norm in enumerate(norms) if group_number(norm)]
    BufferUpdate(norms, rows, synced, x.shape[0]).apply(stats)
    return out


def _weights(readings: Sequence[Reading]) -> Iterator[Tensor]:
    for unit in (reading.unit for reading in readings):
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
    readings: list[Reading] = []
    units: list[nn.Module] = []

    def run_units(x: Any) -> Any:
        try:
            return run_chain(readings, x, backend=backend, memory=memory, segment=segment)
        except UnfitError:
            for unit in units:
                x = unit(x)
            return x

    begin_epoch()
    for block in blocks:
        if isinstance(block, ChainUnit) and backend != EAGER:
            reading = read(block, "in a chain")
            if isinstance(reading, Reading) and (readings or accepts(reading.unit, x)):
                readings.append(reading)
                units.append(block)
                continue
        if readings:
            x = run_units(x)
            readings, units = [], []
        x = block(x)
        begin_epoch()
    return run_units(x) if readings else x


def compute_dtype(unit: UnitModules, device: str) -> torch.dtype:
    """The dtype in which convolutions multiply: autocast's, or the weights' own."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return unit.convs[0].weight.dtype


def describe(
    readings: Sequence[Reading],
    dtype: torch.dtype,
    *,
    need_x: bool,
    backend: str,
    memory: str,
    segment: int,
    part: Part = WHOLE,
    tensors: Sequence[Sequence[Tensor]] | None = None,
) -> tuple[list[Tensor], list[int], list[float]]:
    """The operator's ``params``, ``layout`` and ``constants`` (see ``spec``) for a chain.

    dtype: ``compute_dtype``. need_x: whether the input's gradient is wanted. segment: units of a
    segment, 0 for the length that keeps least. tensors: each reading's, where some are computed.
    """
    tensors = [reading.tensors for reading in readings] if tensors is None else tensors
    if memory == "segment" and segment < 1:
        segment = segment_length([reading.unit for reading in readings])
    params: list[Tensor] = []
    body: list[int] = []
    constants: list[float] = []
    for reading, its in zip(readings, tensors):
        encode_unit(body, constants, reading.record)
        params += its
    needs = [need_x, *(p.requires_grad for p in params)]
    keep = torch.is_grad_enabled() and any(needs)
    wide, anchors = stream_of(dtype, memory)
    layout = encode_header(
        dtype, backend, memory, segment, wide, anchors, keep, len(readings), part
    )
    layout += body
    layout += [int(n) for n in needs]
    return params, layout, constants


def stream_of(dtype: torch.dtype, memory: str) -> tuple[bool, int]:
    """How a stream is kept that can be walked back: whether in float32, and units between anchors.

    In half precision each step back is off by a rounding, so that the walk begins anew at an exact
    copy every ``ANCHORS`` units (``Spec.kept_of``). With RESNETV2_STREAM=float32 the stream is
    float32 though convolutions multiply in half precision, and no copies are kept.
    """
    if memory == "recompute" or dtype not in (torch.float16, torch.bfloat16):
        return False, 0
    if os.environ.get("RESNETV2_STREAM") == "float32":
        return True, 0
    return False, ANCHORS


def segment_length(units: Sequence[UnitModules]) -> int:
    """Units s of a segment that make n/s kept inputs and s inner h_{k-1} take least together."""
    last = units[-1].convs[-1]
    return max(1, round(math.sqrt(len(units) * last.out_channels / last.in_channels)))
