"""How many bytes a training step of a chain needs, by memory mode, before anything is run.

The bytes kept are those that ``Spec.kept`` names, the same record that the chain itself goes by.
What a unit's backward needs on top (``walk``) follows the steps of ``Chain._unit_backward`` and
the engine's ``norm_conv_backward``; the tests hold it against what the allocator reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..kernels.dispatch import ATEN, WRITTEN, implementation, runs_twice
from ..kernels.operands import stats_dtype
from .chain import stream_dtypes
from .execution import norm_channels
from .modules import UnitModules
from .reading import Reading
from .run import describe
from .shapes import Shape, chain_shapes
from .spec import Conv, Shortcut, Spec, decode

if TYPE_CHECKING:
    from ..kernels.launch import Device


class ChainCost(NamedTuple):
    """Bytes and extra work of one chain in one mode, for a given input.

    kept: from forward to backward, without the chain's own input and output. ends: its output
    and statistics. walk: most bytes alive on top during its backward, the gradient of the
    output included. gradients: of its parameters. flops: of one forward's convolutions.
    extra_flops: of what the backward computes again. segment: units a segment has. eager: bytes
    that eager PyTorch keeps for the same chain: each norm's input and each activation's result.
    """

    kept: int
    ends: int
    walk: int
    gradients: int
    flops: int
    extra_flops: int
    segment: int
    eager: int


def _bytes(shapes: Sequence[Shape]) -> int:
    return sum(shape.nbytes for shape in shapes)


def _walk_bytes(
    spec: Spec,
    params: Sequence[Tensor],
    hs: list[list[Shape]],
    kept: frozenset[tuple[int, int]],
    ends: Sequence[Shape],
    gpu: Device | None,
) -> int:
    """Most bytes alive in the backward of any unit besides what is kept for the whole chain.

    ends: the chain's output, and as the last unit's in another dtype.
    """
    worst = 0
    held = _bytes(ends)  # the gradient that came in, and its copy in a wider stream's dtype
    item = spec.dtype.itemsize
    wide = max(item, 4)
    for number, (unit, h) in enumerate(zip(spec.units, hs)):
        last = number == len(hs) - 1
        at = spec.positions[number]
        base = held + (0 if last else _bytes(h[-1:]))  # the unit's own gradient
        # The h_i that had to be computed again; a chain's own x is counted among its ends.
        base += sum(
            _bytes(h[i : i + 1])
            for i in range(len(unit.convs))
            if (number, i) not in kept and (number or i)
        )
        if unit.projection is not None:
            if gpu is not None:
                preact = unit.shortcut == Shortcut.PROJECTION_PREACT
                weight = params[at.projection_weight]
                workspace = _workspace(
                    unit.projection, weight, h[-1], gpu, spec.dtype, h[0].dtype, preact
                )
                worst = max(worst, base + workspace)
            base += h[0].numel * item
        for i in range(len(unit.convs)):
            rows = h[i].numel
            here = 0 if i == len(unit.convs) - 1 else h[i + 1].numel * item
            conv, weight = unit.convs[i], params[at.conv_weight[i]]
            kernel_size = (weight.shape[2], weight.shape[3])
            how = implementation("dgrad", kernel_size, conv.geometry)
            if gpu is None or how == ATEN:
                # affine(h) and the convolution's dz with its weight reordered, half precision
                # holding a copy of each; then q and ATen's norm backward, which allocates twice.
                copies = rows * (wide + item) + (rows * item if item < wide else 0)
                here += max(copies + weight.numel() * item, 3 * rows * wide)
            else:
                written = how == WRITTEN
                if written and (here or h[i + 1].dtype != spec.dtype):
                    here += h[i + 1].numel * item
                stream = spec.dtype if written else h[i].dtype
                workspace = _workspace(conv, weight, h[i + 1], gpu, spec.dtype, stream, not written)
                # z beside the weight gradient's sums; then q and dx, unless dx alone is written.
                q = 0 if i == 0 and runs_twice(weight) else rows * item
                dx = _bytes(h[:1]) if i == 0 else 0
                here += max((rows * item if written else 0) + workspace, q + dx)
            worst = max(worst, base + here)
    return worst


def _workspace(
    conv: Conv,
    weight: Tensor,
    out: Shape,
    gpu: Device,
    dtype: torch.dtype,
    stream: torch.dtype,
    prologue: bool,
) -> int:
    """Bytes of the sums that a weight gradient's programs leave for its reduction.

    out: of the convolution. stream: the dtype of what it reads, before the prologue.
    """
    from ..kernels.wgrad_config import config_of  # which needs Triton

    rows = out.numel // out.size[1]
    config = config_of(
        rows, weight.shape, conv.geometry, gpu, dtype=dtype, stream=stream, prologue=prologue
    )
    k, j = weight.shape[0], weight[0].numel()
    splits, size = config.workspace(rows, k, j, conv.bias, gpu)
    return 4 * splits * size


def chain_cost(
    units: Sequence[UnitModules],
    x: Shape,
    dtype: torch.dtype,
    memory: str,
    *,
    gpu: Device | None,
    segment: int = 0,
) -> tuple[ChainCost, Shape]:
    """What a chain costs in mode ``memory`` for an input x, and the shape of its output.

    Args:
        x: the input.
        dtype: in which convolutions multiply. gpu: whose kernels run; None for ATen.
        segment: units of a segment, 0 for the default.
    """
    params, layout, constants = describe(
        [Reading(unit) for unit in units],
        dtype,
        need_x=True,
        backend="aten",
        memory=memory,
        segment=segment,
    )
    spec = decode(layout, constants)._replace(keep=True)
    hs = chain_shapes(spec, x.size, x.dtype, params)
    keys = spec.kept()
    alive = frozenset(keys)
    inner_bytes = 0
    if memory == "segment":
        for start in range(0, len(spec.units), spec.segment):
            stop = min(start + spec.segment, len(spec.units))
            inner = spec.kept_of(start, stop, "invert")
            alive |= frozenset(inner)
            inner_bytes = max(inner_bytes, _bytes([hs[u][i] for u, i in inner]))
    end = hs[-1][-1]
    out = Shape(end.size, stream_dtypes(spec, x.dtype)[-1])
    ends = [out] if out == end else [out, end]
    flops, extra = _flops(spec, hs, params)
    cost = ChainCost(
        kept=_bytes([hs[u][i] for u, i in keys]),
        ends=_bytes(ends) + 5 * stats_dtype(x.dtype).itemsize * sum(norm_channels(spec, params)),
        walk=inner_bytes + _walk_bytes(spec, params, hs, alive, ends, gpu),
        gradients=sum(p.numel() * p.element_size() for p, need in zip(params, spec.needs) if need),
        flops=flops,
        extra_flops=extra,
        segment=spec.segment,
        eager=2 * sum(_bytes(h[:-1]) for h in hs),
    )
    return cost, out


def _flops(spec: Spec, hs: list[list[Shape]], params: Sequence[Tensor]) -> tuple[int, int]:
    """(FLOPs of the chain's convolutions forward, FLOPs that its backward computes again)."""
    total = extra = 0
    segmented = spec.memory == "segment"
    inner = "invert" if segmented else spec.memory
    length = spec.segment if segmented else len(spec.units)
    for start in range(0, len(spec.units), length):
        stop = min(start + length, len(spec.units))
        kept = frozenset(spec.kept_of(start, stop, inner))
        for number in range(start, stop):
            at = spec.positions[number]
            cost = [
                2 * hs[number][i + 1].numel * params[w].numel() // params[w].shape[0]
                for i, w in enumerate(at.conv_weight)
            ]
            projection = 0
            if at.projection_weight >= 0:
                weight = params[at.projection_weight]
                projection = 2 * hs[number][-1].numel * weight.numel() // weight.shape[0]
            total += sum(cost) + projection
            if segmented:
                extra += sum(cost) + projection
                if number == stop - 1:  # the segment's end is at hand
                    extra -= cost[-1] + projection
            if number > start and (number, 0) not in kept:
                extra += cost[-1]
            extra += sum(cost[i - 1] for i in range(1, len(cost)) if (number, i) not in kept)
    return total, extra
