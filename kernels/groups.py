"""A norm over groups of an image's channels (Wu and He 2018), out of those of the channels.

With (mean_c, M2_c, rest_c) of an image's channel c over its R pixels (``merging``), m = C/G*R
values in a group, and o the mean of its channels' means, nothing cancels where |mean| >> std:

    offset_c = (mean_c - o) + rest_c,   offset = sum offset_c / (C/G),   mean = o + offset
    var = sum (M2_c + R*offset_c^2) / m - offset^2,     rstd = 1/sqrt(var + eps)
    a = weight*rstd,  b = bias - mean*a                 per image and channel

and backward, with an image's sums S1 and S2 of each channel, sums over the channels of a group:

    A = a,  B = rstd*sum a*S2 / m,  C = sum a*S1 / m,   g = A*q - C - B*(h - mean)

A weight of 0 hides no sum of its group's others, hence A stands with q alone.

The last program of an image to arrive does either (``finishing``); sums over images, which give
the gradients of a weight and bias (C,), are in the order of the images. ``group_affine`` makes
a and b of what a forward has kept.

Bytes: ``group_affine`` reads 8 bytes a group and writes 20 a channel, of each image.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import sums
from .checks import check_norm, check_per_channel
from .integers import next_power_of_2
from .launch import launch
from .operands import Norm

# Channels that one warp looks at side by side.
_AT_ONCE = 256
# Images whose sums are added up side by side.
_IMAGES = tl.constexpr(16)


class Grouped(NamedTuple):
    """A group norm as a kernel is compiled for it: the one constexpr argument ``GROUP``.

    G: groups. SIZE: channels in each. BLOCK_G, BLOCK_S: how many of them are looked at side by
    side. WEIGHT_N, BIAS_N: whether weight and bias are (N, C).
    """

    G: int
    SIZE: int
    BLOCK_G: int
    BLOCK_S: int
    WEIGHT_N: bool
    BIAS_N: bool

    @classmethod
    def of(cls, norm: Norm, channels: int) -> Grouped:
        """That of ``channels`` channels."""
        size = channels // norm.groups
        block = min(next_power_of_2(size), _AT_ONCE)
        others = min(next_power_of_2(norm.groups), _AT_ONCE // block)
        return cls(norm.groups, size, others, block, *map(is_per_image, norm[:2]))


def is_per_image(values: Tensor | None) -> bool:
    """Whether a weight or a bias is one of each image: (N, C)."""
    return values is not None and values.dim() == 2


@triton.jit
def _channels(first, start, GROUP: tl.constexpr):
    """The channels from each group's ``start``th on, in groups from ``first`` on; which exist."""
    group = first + tl.arange(0, GROUP.BLOCK_G)
    number = start + tl.arange(0, GROUP.BLOCK_S)
    known = (group < GROUP.G)[:, None] & (number < GROUP.SIZE)[None, :]
    return group[:, None] * GROUP.SIZE + number[None, :], known


@triton.jit
def store_affine(stats_ptr, row, weight_ptr, bias_ptr, mean, var, rstd, at, known):
    """The five rows of ``stats`` for channels ``at``; row: elements from one to the next."""
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + at, mask=known, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + at, mask=known, other=0.0).to(tl.float32)
    tl.store(stats_ptr + at, mean, mask=known)
    tl.store(stats_ptr + row + at, var, mask=known)
    tl.store(stats_ptr + 2 * row + at, rstd, mask=known)
    tl.store(stats_ptr + 3 * row + at, scale, mask=known)
    tl.store(stats_ptr + 4 * row + at, shift, mask=known)


@triton.jit
def _store_groups(stats_ptr, row, weight_ptr, bias_ptr, mean, rstd, first, GROUP: tl.constexpr):
    """``stats`` of all channels of the groups from ``first`` on; their variance is not kept."""
    for start in range(0, GROUP.SIZE, GROUP.BLOCK_S):
        at, known = _channels(first, start, GROUP)
        each = tl.zeros(at.shape, tl.float32)
        store_affine(
            stats_ptr,
            row,
            weight_ptr,
            bias_ptr,
            mean[:, None] + each,
            each,
            rstd[:, None] + each,
            at,
            known,
        )


@triton.jit
def write_group_stats(
    data_ptr,
    kept_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    eps,
    rows,
    images,
    C: tl.constexpr,
    GROUP: tl.constexpr,
):
    """An image's ``kept`` and ``stats`` out of its channels' moments (3, C) over ``rows`` rows.

    All pointers but weight_ptr and bias_ptr of (C,) are at the image's own.
    """
    BLOCK_G: tl.constexpr = GROUP.BLOCK_G
    BLOCK_S: tl.constexpr = GROUP.BLOCK_S
    rows = rows.to(tl.float32)
    row = images.to(tl.int64) * C
    for first in range(0, GROUP.G, GROUP.BLOCK_G):
        group = first + tl.arange(0, GROUP.BLOCK_G)
        exists = group < GROUP.G
        means = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        for start in range(0, GROUP.SIZE, GROUP.BLOCK_S):
            at, known = _channels(first, start, GROUP)
            means += tl.load(data_ptr + at, mask=known, other=0.0, cache_modifier=".cg")
        origin = tl.sum(means, axis=1) * (1.0 / GROUP.SIZE)
        offset = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        squares = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        for start in range(0, GROUP.SIZE, GROUP.BLOCK_S):
            at, known = _channels(first, start, GROUP)
            mean = tl.load(data_ptr + at, mask=known, other=0.0, cache_modifier=".cg")
            m2 = tl.load(data_ptr + C + at, mask=known, other=0.0, cache_modifier=".cg")
            rest = tl.load(data_ptr + 2 * C + at, mask=known, other=0.0, cache_modifier=".cg")
            offset_c = tl.where(known, (mean - origin[:, None]) + rest, 0.0)
            offset += offset_c
            squares += m2 + offset_c * (offset_c * rows)
        offset, squares = sums(offset, squares, 1)
        offset *= 1.0 / GROUP.SIZE
        mean = origin + offset
        var = squares / (rows * GROUP.SIZE) - offset * offset
        rstd = tl.rsqrt(var + eps)
        tl.store(kept_ptr + group, mean, mask=exists)
        tl.store(kept_ptr + images.to(tl.int64) * GROUP.G + group, rstd, mask=exists)
        _store_groups(stats_ptr, row, weight_ptr, bias_ptr, mean, rstd, first, GROUP)


@triton.jit(do_not_specialize=["images"])
def _group_affine_kernel(
    kept_ptr, weight_ptr, bias_ptr, stats_ptr, images, C: tl.constexpr, GROUP: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    if GROUP.WEIGHT_N:
        weight_ptr += image * C
    if GROUP.BIAS_N:
        bias_ptr += image * C
    kept_ptr += image * GROUP.G
    for first in range(0, GROUP.G, GROUP.BLOCK_G):
        group = first + tl.arange(0, GROUP.BLOCK_G)
        exists = group < GROUP.G
        mean = tl.load(kept_ptr + group, mask=exists, other=0.0)
        rstd = tl.load(kept_ptr + images.to(tl.int64) * GROUP.G + group, mask=exists, other=0.0)
        _store_groups(
            stats_ptr + image * C,
            images.to(tl.int64) * C,
            weight_ptr,
            bias_ptr,
            mean,
            rstd,
            first,
            GROUP,
        )


@triton.jit
def write_group_grad(
    coef_ptr, s2_ptr, s1_ptr, stats_ptr, rows, images, C: tl.constexpr, GROUP: tl.constexpr
):
    """An image's coefficients out of its channels' sums; all pointers are at the image's own."""
    BLOCK_G: tl.constexpr = GROUP.BLOCK_G
    BLOCK_S: tl.constexpr = GROUP.BLOCK_S
    row = images.to(tl.int64) * C
    inverse = 1.0 / (rows.to(tl.float32) * GROUP.SIZE)
    for first in range(0, GROUP.G, GROUP.BLOCK_G):
        b = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        c = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        for start in range(0, GROUP.SIZE, GROUP.BLOCK_S):
            at, known = _channels(first, start, GROUP)
            scale = tl.load(stats_ptr + 3 * row + at, mask=known, other=0.0)
            b += scale * tl.load(s2_ptr + at, mask=known, other=0.0, cache_modifier=".cg")
            c += scale * tl.load(s1_ptr + at, mask=known, other=0.0, cache_modifier=".cg")
        b, c = sums(b, c, 1)
        b *= inverse
        c *= inverse
        for start in range(0, GROUP.SIZE, GROUP.BLOCK_S):
            at, known = _channels(first, start, GROUP)
            mean = tl.load(stats_ptr + at, mask=known, other=0.0)
            rstd = tl.load(stats_ptr + 2 * row + at, mask=known, other=0.0)
            scale = tl.load(stats_ptr + 3 * row + at, mask=known, other=0.0)
            tl.store(coef_ptr + at, scale, mask=known)
            tl.store(coef_ptr + row + at, rstd * b[:, None], mask=known)
            tl.store(coef_ptr + 2 * row + at, c[:, None] + tl.zeros_like(scale), mask=known)
            tl.store(coef_ptr + 3 * row + at, mean, mask=known)


@triton.jit
def sum_over_images(
    result_ptr, values_ptr, images, columns, known, C: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The sums of values (N, C) over images, in a fixed order."""
    total = tl.zeros((_IMAGES, BLOCK_C), tl.float32)
    for start in range(0, images, _IMAGES):
        image = start + tl.arange(0, _IMAGES)
        at = image.to(tl.int64)[:, None] * C + columns[None, :]
        mask = (image < images)[:, None] & known[None, :]
        total += tl.load(values_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
    tl.store(result_ptr + columns, tl.sum(total, axis=0), mask=known)


def group_affine(kept: Tensor, norm: Norm, channels: int) -> Tensor:
    """A group norm's ``stats`` (5, N, C) out of ``kept`` (2, N, G), with the bits of the forward.

    Args:
        kept: of ``moments``, float32. norm: weight and bias (C,) or (N, C), any float dtype.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    if norm.groups < 1:
        raise ValueError(f"norm.groups must be at least 1, got {norm.groups}")
    if kept.dim() != 3:
        expected = f"(2, N, {norm.groups})"
        raise ValueError(f"kept must be a contiguous {expected} tensor, got {tuple(kept.shape)}")
    images = kept.shape[1]
    check_norm(norm, channels, images)
    check_per_channel("kept", kept, 2, images, norm.groups)
    stats = torch.empty((5, images, channels), dtype=torch.float32, device=kept.device)
    if images == 0:
        return stats
    launch(
        _group_affine_kernel,
        (images,),
        kept,
        norm.weight,
        norm.bias,
        stats,
        images,
        C=channels,
        GROUP=Grouped.of(norm, channels),
        num_warps=1,
    )
    return stats
