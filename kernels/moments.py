"""Per-channel mean and variance of an activation: tiles of rows, then one merge.

``moments`` gives, for each tile of rows, the mean and M2 = sum (x - mean)^2 of every channel.
Inside a block of BLOCK_M rows, held in registers, they are taken in two passes (never
E[x^2] - E[x]^2, which cancels as the residual stream grows); the blocks of a tile are joined by
Chan et al. 1979:

    delta = mean_2 - mean_1,  mean = mean_1 + delta*n_2/n,  M2 = M2_1 + M2_2 + delta^2*n_1*n_2/n

``norm_stats`` merges all tiles at once, exactly and in a fixed order. With o the first tile's mean,
so that nothing cancels where |mean| >> std,

    mean = o + sum (n_t/n)*(mean_t - o),      M2 = sum M2_t + n_t*(mean_t - mean)^2
    var = M2/n,  rstd = 1/sqrt(var + eps),  a = weight*rstd,  b = bias - mean*a

The tiles may be those of several processes, whose numbers of rows are then on the device
(``ranks``).

Bytes: ``moments`` reads x once and writes 8 bytes a tile and channel, ``norm_stats`` reads those
(the means a second time, from cache).

``row_tiling`` is the tiling of every elementwise kernel beside this one: a program owns ``steps``
blocks of BLOCK_M rows by BLOCK_C channels, and there is a program for each tile and channel block,
however few channels there are.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_activation, check_partials, check_vector
from .integers import cdiv, next_power_of_2
from .launch import Device, device_of, launch
from .operands import Partials

# Elements of one block: 16 a thread at 4 warps, two 16-byte loads of each 16-bit tensor in flight.
# With more, the longest activations spill.
BLOCK_ELEMENTS = 2048
MAX_TILES = 1024
# The merge's tile: rows of partials at a time, and channels, one L2 sector of each row.
MERGE_TILES = 1024
MERGE_CHANNELS = 8


def merge_tiling(tiles: int) -> tuple[int, int]:
    """BLOCK_TILES and num_warps for merging ``tiles`` partials of MERGE_CHANNELS channels."""
    block_tiles = min(MERGE_TILES, next_power_of_2(tiles))
    return block_tiles, min(max(block_tiles // 32, 1), 8)


class RowTiling(NamedTuple):
    """How a (rows, channels) matrix is cut: ``tiles`` of ``steps`` blocks, all channel blocks."""

    block_m: int
    block_c: int
    steps: int
    tiles: int
    grid: tuple[int]


@functools.cache
def row_tiling(
    rows: int,
    channels: int,
    device: Device,
    max_tiles: int | None = None,
) -> RowTiling:
    """The tiling for a (rows, channels) matrix; at most ``max_tiles`` tiles if given.

    Blocks are wide enough for 16-byte loads and narrow enough that multiples of 16 channels waste
    no lane; they shrink until every multiprocessor has four programs, or two where each program
    also pays for a reduction (``max_tiles``).
    """
    whole = channels & -channels if channels % 16 == 0 else next_power_of_2(channels)
    block_c = min(whole, 64)
    column_blocks = cdiv(channels, block_c)
    wanted = (4 if max_tiles is None else 2) * device.multiprocessors
    elements = BLOCK_ELEMENTS
    while elements > 1024 and cdiv(rows, elements // block_c) * column_blocks < wanted:
        elements //= 2
    block_m = elements // block_c
    blocks = cdiv(rows, block_m)
    steps = 1 if max_tiles is None else cdiv(blocks, max_tiles)
    tiles = cdiv(blocks, steps)
    return RowTiling(block_m, block_c, steps, tiles, (tiles * column_blocks,))


@triton.jit
def program_tile(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's tile and channels; neighbouring programs share rows, and so cache lines."""
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    columns = program % COLUMN_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // COLUMN_BLOCKS, columns


@triton.jit
def block_offsets(block, M, columns, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where block number ``block`` of BLOCK_M rows lies: base, offsets from it, mask, valid rows.

    The base is 64-bit, the offsets inside a block need only 32.
    """
    row = block.to(tl.int64) * BLOCK_M
    valid = tl.minimum(M - row, BLOCK_M).to(tl.int32)
    local = tl.arange(0, BLOCK_M)
    mask = (local < valid)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (columns < C)[None, :]
    return row * C, local[:, None] * C + columns[None, :], mask, valid


@triton.jit
def tile_steps(tile, M, steps, BLOCK_M: tl.constexpr):
    """The tile's first block and its number of blocks: the last tile may have fewer."""
    first = tile * steps
    return first, tl.minimum(steps, (M + BLOCK_M - 1) // BLOCK_M - first).to(tl.int32)


@triton.jit(do_not_specialize=["M", "steps"])
def _moments_kernel(
    x_ptr,
    data_ptr,
    M,
    steps,
    C: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    MASKED: tl.constexpr = not EVEN_M or C % BLOCK_C != 0
    tile, columns = program_tile(C, BLOCK_C)
    first, blocks = tile_steps(tile, M, steps, BLOCK_M)
    known = columns < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for step in range(blocks):
        base, offsets, mask, valid = block_offsets(first + step, M, columns, C, BLOCK_M, BLOCK_C)
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        block_count = valid.to(tl.float32)
        # Not seen from a value of x: where |mean| << std that costs the mean a rounding of the
        # value. Where |mean| >> std the mean is off by a rounding of its own, M2 by its square.
        block_mean = tl.sum(x, axis=0) * (1.0 / block_count)
        deviation = x - block_mean[None, :]
        if MASKED:
            deviation = tl.where(mask, deviation, 0.0)
        block_m2 = tl.sum(deviation * deviation, axis=0)
        total = count + block_count
        delta = block_mean - mean
        mean += delta * (block_count / total)
        m2 += block_m2 + delta * (delta * (count * block_count / total))
        count = total
    data_ptr += tile.to(tl.int64) * (2 * C)
    tl.store(data_ptr + columns, mean, mask=known)
    tl.store(data_ptr + C + columns, m2, mask=known)


@triton.jit
def _tile_counts(counts_ptr, tile, tiles, M, tile_rows):
    """How many rows each tile has: equally many but for the last one, or what ``counts`` says."""
    if counts_ptr is not None:
        return tl.load(counts_ptr + tile, mask=tile < tiles, other=0.0)
    else:
        return tl.minimum(M - tile.to(M.dtype) * tile_rows, tile_rows).to(tl.float32)


@triton.jit(do_not_specialize=["M", "tile_rows", "tiles"])
def _norm_stats_kernel(
    data_ptr,
    counts_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    eps,
    M,
    tile_rows,
    tiles,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = columns < C
    first_mean = tl.load(data_ptr + columns, mask=known, other=0.0).to(tl.float32)
    if counts_ptr is not None:
        total = tl.zeros((BLOCK_TILES,), tl.float32)
        for start in range(0, tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            total += _tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        inverse = 1.0 / tl.sum(total, axis=0)
    else:
        inverse = 1.0 / M.to(tl.float32)

    offset = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (2 * C) + columns[None, :]
        mean_t = tl.load(data_ptr + at, mask=mask, other=0.0).to(tl.float32)
        count = _tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        offset += tl.where(mask, (mean_t - first_mean[None, :]) * (count * inverse)[:, None], 0.0)
    mean = first_mean + tl.sum(offset, axis=0)

    squares = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (2 * C) + columns[None, :]
        mean_t = tl.load(data_ptr + at, mask=mask, other=0.0).to(tl.float32)
        m2_t = tl.load(data_ptr + C + at, mask=mask, other=0.0).to(tl.float32)
        count = _tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        delta = mean_t - mean[None, :]
        squares += tl.where(mask, m2_t + delta * (delta * count[:, None]), 0.0)
    var = tl.sum(squares, axis=0) * inverse

    rstd = tl.rsqrt(var + eps)
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + columns, mask=known, other=0.0).to(tl.float32)
    shift = -mean * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)
    tl.store(stats_ptr + columns, mean, mask=known)
    tl.store(stats_ptr + C + columns, var, mask=known)
    tl.store(stats_ptr + 2 * C + columns, rstd, mask=known)
    tl.store(stats_ptr + 3 * C + columns, scale, mask=known)
    tl.store(stats_ptr + 4 * C + columns, shift, mask=known)


def moments(x: Tensor) -> Partials:
    """Per-channel mean and sum of squared deviations of x (N, C, H, W), tile by tile.

    Returns:
        data (P, 2, C) float32 with at most ``MAX_TILES`` tiles.

    Raises:
        ValueError: x is not channels_last or has no rows. TypeError: its dtype is no kernel's.
    """
    check_activation("x", x)
    channels = x.shape[1]
    rows = x.numel() // max(channels, 1)
    if rows == 0:
        raise ValueError(f"moments need at least one value per channel, got shape {tuple(x.shape)}")
    tiling = row_tiling(rows, channels, device_of(x), MAX_TILES)
    data = torch.empty((tiling.tiles, 2, channels), dtype=torch.float32, device=x.device)
    launch(
        _moments_kernel,
        tiling.grid,
        x,
        data,
        rows,
        tiling.steps,
        C=channels,
        EVEN_M=rows % tiling.block_m == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        # A program is one warp: the sums over rows need no other's, and so no shared memory, where
        # eight lanes would store to one bank.
        num_warps=1,
    )
    return Partials(data, rows, tiling.steps * tiling.block_m)


def norm_stats(
    partials: Partials,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    counts: Tensor | None = None,
) -> Tensor:
    """Merge the tiles' moments in a fixed order into ``stats`` (5, C) float32, in one launch.

    Args:
        partials: of ``moments``, or of a convolution's epilogue.
        weight, bias: (C,), any float dtype, or None.
        counts: (P,) float32, each tile's number of rows instead of what ``partials`` says.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_partials(partials)
    data, rows, tile_rows = partials
    tiles, _, channels = data.shape
    check_vector("weight", weight, channels)
    check_vector("bias", bias, channels)
    check_vector("counts", counts, tiles, torch.float32)
    stats = torch.empty((5, channels), dtype=torch.float32, device=data.device)
    block_tiles, num_warps = merge_tiling(tiles)
    launch(
        _norm_stats_kernel,
        (cdiv(channels, MERGE_CHANNELS),),
        data,
        counts,
        weight,
        bias,
        stats,
        eps,
        rows,
        tile_rows,
        tiles,
        C=channels,
        BLOCK_TILES=block_tiles,
        BLOCK_C=MERGE_CHANNELS,
        num_warps=num_warps,
    )
    return stats
