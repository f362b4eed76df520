"""How many bytes a training step of a chain needs, by memory mode, before anything is run.

The bytes kept are those that ``Spec.kept`` names, the same record that the chain itself goes by.
What a unit's backward needs on top (``walk``) follows the steps of ``Chain._unit_backward`` and
the engine's ``norm_conv_backward``; the tests hold it against what the allocator reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.operands import stats_dtype
from .chain import stream_dtypes
from .modules import UnitModules
from .operators import Shape, chain_shapes, norm_channels
from .run import describe
from .spec import Spec, decode


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
    triton: bool,
) -> int:
    """Most bytes alive in the backward of any unit besides what is kept for the whole chain."""
    worst = 0
    held = _bytes(hs[-1][-1:])  # the gradient that came in is held to the chain's end
    item = spec.dtype.itemsize
    wide = max(item, 4)
    for number, (unit, h) in enumerate(zip(spec.units, hs)):
        last = number == len(hs) - 1
        base = held + (0 if last else _bytes(h[-1:]))  # the unit's own gradient
        if unit.projection is not None:
            base += h[0].numel * item
        # The h_i that had to be computed again; a chain's own x is counted among its ends.
        base += sum(
            _bytes(h[i : i + 1])
            for i in range(len(unit.convs))
            if (number, i) not in kept and (number or i)
        )
        for i in range(len(unit.convs)):
            rows = h[i].numel
            here = 0 if i == len(unit.convs) - 1 else h[i + 1].numel * item
            if triton:
                # z and q, or q and dx.
                here += rows * item + max(rows * item, _bytes(h[:1]) if i == 0 else 0)
            else:
                # affine(h) and the convolution's dz with its weight reordered, half precision
                # holding a copy of each; then q and ATen's norm backward, which allocates twice.
                weight = params[spec.positions[number].conv_weight[i]].numel() * item
                convolution = rows * (wide + item) + (rows * item if item < wide else 0) + weight
                here += max(convolution, 3 * rows * wide)
            worst = max(worst, base + here)
    return worst


def chain_cost(
    units: Sequence[UnitModules],
    x: Shape,
    dtype: torch.dtype,
    memory: str,
    *,
    triton: bool,
    segment: int = 0,
) -> tuple[ChainCost, Shape]:
    """What a chain costs in mode ``memory`` for an input x, and the shape of its output.

    Args:
        x: the input.
        dtype: in which convolutions multiply. triton: whether the kernels or ATen run.
        segment: units of a segment, 0 for the default.
    """
    params, layout, constants = describe(
        units, dtype, need_x=True, backend="aten", memory=memory, segment=segment
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
        walk=inner_bytes + _walk_bytes(spec, params, hs, alive, triton),
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
