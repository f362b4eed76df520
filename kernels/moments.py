"""Per-channel mean and variance of an activation: tiles of rows, merged by the last program.

``moments`` gives, for each tile of rows, the mean and M2 = sum (x - mean)^2 of every channel.
Inside a block of BLOCK_M rows, held in registers, they are taken in two passes (never
E[x^2] - E[x]^2, which cancels as the residual stream grows); the blocks of a tile are joined by
Chan et al. 1979:

    delta = mean_2 - mean_1,  mean = mean_1 + delta*n_2/n,  M2 = M2_1 + M2_2 + delta^2*n_1*n_2/n

and what a tile's mean is off by its own rounding is kept beside it (``merging``). Given a norm, the
last program merges the tiles in a fixed order and makes the norm's statistics of them:

    var = M2/n,  rstd = 1/sqrt(var + eps),  a = weight*rstd,  b = bias - mean*a

``norm_stats`` does the same in a launch of its own: where moments come from another part of a
chain, or from several processes, whose numbers of rows are then on the device (``ranks``).

``conv_end`` is the same kernel behind a convolution that another library has computed: it adds the
bias and the residual first, and takes the moments of what it wrote.

Bytes: ``moments`` reads x once, and writes and reads 12 bytes a tile and channel; ``conv_end`` also
reads the residual and writes the sum.

``row_tiling`` is the tiling of every elementwise kernel beside this one: a program owns ``steps``
blocks of BLOCK_M rows by BLOCK_C channels, and there is a program for each tile and channel block,
however few channels there are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recording
from .activations import activate, cast, sums
from .checks import (
    check_activation,
    check_floating,
    check_norm,
    check_partials,
    check_per_channel,
    check_vector,
)
from .integers import cdiv, next_power_of_2
from .launch import Device, device_of, launch
from .merging import (
    block_tiles,
    finish_moments,
    group_size,
    merge_moments,
    store_moments,
    store_stats,
    tile_counts,
)
from .operands import IDENTITY, Act, Norm, Partials

# Elements of one block: 16 a thread at 4 warps, two 16-byte loads of each 16-bit tensor in flight.
# With more, the longest activations spill.
BLOCK_ELEMENTS = 2048
# Of a program of one warp for Blackwell, to which Triton 3.8's ptxas gives 128 registers a thread:
# twice as many spill.
_ELEMENTS_OF_A_WARP = {"tcgen05": 1024}
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
    elements: int = BLOCK_ELEMENTS,
) -> RowTiling:
    """The tiling for a (rows, channels) matrix; at most ``max_tiles`` tiles if given.

    Blocks have at most ``elements``.

    Blocks are wide enough for 16-byte loads and narrow enough that multiples of 16 channels waste
    no lane; they shrink until every multiprocessor has four programs, or two where each program
    also pays for a reduction (``max_tiles``).
    """
    whole = channels & -channels if channels % 16 == 0 else next_power_of_2(channels)
    block_c = min(whole, 64)
    column_blocks = cdiv(channels, block_c)
    wanted = (4 if max_tiles is None else 2) * device.multiprocessors
    while elements > 1024 and cdiv(rows, elements // block_c) * column_blocks < wanted:
        elements //= 2
    block_m = elements // block_c
    blocks = cdiv(rows, block_m)
    steps = 1 if max_tiles is None else cdiv(blocks, max_tiles)
    tiles = cdiv(blocks, steps)
    return RowTiling(block_m, block_c, steps, tiles, (tiles * column_blocks,))


@triton.jit
def program_tile(program, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's tile and channels; neighbouring programs share rows, and so cache lines."""
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
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


@triton.jit
def add_block(x, mask, valid, mean, rest, m2, count, step, MASKED: tl.constexpr):
    """A tile's mean, the mean's rest, M2 and rows, with those of block number ``step``."""
    block_count = valid.to(tl.float32)
    # Not seen from a value of x: where |mean| << std that costs the mean a rounding of the
    # value. Where |mean| >> std the mean is off by a rounding of its own: the rest.
    block_mean = tl.sum(x, axis=0) * (1.0 / block_count)
    deviation = x - block_mean[None, :]
    if MASKED:
        deviation = tl.where(mask, deviation, 0.0)
    block_sum, block_m2 = sums(deviation, deviation * deviation)
    block_rest = block_sum * (1.0 / block_count)
    block_m2 -= block_sum * block_rest
    # The tile's mean stays that of its first block, and the rest grows.
    mean = tl.where(step == 0, block_mean, mean)
    total = count + block_count
    delta = (block_mean - mean) + block_rest - rest
    rest += delta * (block_count / total)
    m2 += block_m2 + delta * (delta * (count * block_count / total))
    return mean, rest, m2, total


@triton.jit(do_not_specialize=["M", "steps", "group"])
def _moments_kernel(
    x_ptr,
    conv_bias_ptr,
    residual_ptr,
    residual_stats_ptr,
    out_ptr,
    data_ptr,
    counters_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    eps,
    slope,
    M,
    steps,
    group,
    C: tl.constexpr,
    ACT: tl.constexpr,
    SUBTRACT: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    MASKED: tl.constexpr = not EVEN_M or C % BLOCK_C != 0
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile, columns = program_tile(tl.program_id(0), C, BLOCK_C)
    first, blocks = tile_steps(tile, M, steps, BLOCK_M)
    known = columns < C
    mean = tl.zeros((BLOCK_C,), tl.float32)
    rest = tl.zeros((BLOCK_C,), tl.float32)
    m2 = tl.zeros((BLOCK_C,), tl.float32)
    count = 0.0
    for step in range(blocks):
        base, offsets, mask, valid = block_offsets(first + step, M, columns, C, BLOCK_M, BLOCK_C)
        x = tl.load(x_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if out_ptr is not None:
            if conv_bias_ptr is not None:
                bias = tl.load(conv_bias_ptr + columns, mask=known, other=0.0)
                x += bias.to(tl.float32)[None, :]
            if residual_ptr is not None:
                residual = tl.load(residual_ptr + base + offsets, mask=mask, other=0.0)
                residual = residual.to(tl.float32)
                if residual_stats_ptr is not None:
                    scale = tl.load(residual_stats_ptr + 3 * C + columns, mask=known, other=0.0)
                    shift = tl.load(residual_stats_ptr + 4 * C + columns, mask=known, other=0.0)
                    residual = activate(residual * scale[None, :] + shift[None, :], slope, ACT)
                if SUBTRACT:
                    x = residual - x
                else:
                    x += residual
            stored = cast(x, out_ptr.dtype.element_ty)
            tl.store(out_ptr + base + offsets, stored, mask=mask)
            x = stored.to(tl.float32)
            if MASKED:
                x = tl.where(mask, x, 0.0)
        if data_ptr is not None:
            mean, rest, m2, count = add_block(x, mask, valid, mean, rest, m2, count, step, MASKED)
    if data_ptr is not None:
        store_moments(data_ptr + tile.to(tl.int64) * (3 * C), columns, known, mean, m2, rest, C)
    if counters_ptr is not None:
        finish_moments(
            data_ptr,
            counters_ptr,
            weight_ptr,
            bias_ptr,
            stats_ptr,
            eps,
            M,
            steps * BLOCK_M,
            group,
            tile,
            tl.program_id(0) % COLUMN_BLOCKS,
            columns,
            known,
            C,
            BLOCK_TILES,
            BLOCK_C,
        )


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
    ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = columns < C
    if counts_ptr is not None:
        total = tl.zeros((BLOCK_TILES,), tl.float32)
        for start in range(0, tiles, BLOCK_TILES):
            tile = start + tl.arange(0, BLOCK_TILES)
            total += tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        inverse = 1.0 / tl.sum(total, axis=0)
    else:
        inverse = 1.0 / M.to(tl.float32)
    mean, m2, _ = merge_moments(
        data_ptr,
        counts_ptr,
        inverse,
        M,
        tile_rows,
        tiles,
        columns,
        known,
        C,
        ROWS,
        BLOCK_TILES,
        BLOCK_C,
    )
    store_stats(stats_ptr, weight_ptr, bias_ptr, eps, mean, m2 * inverse, columns, known, C)


def moments(x: Tensor, norm: Norm | None = None) -> Partials | Tensor:
    """Per-channel mean and sum of squared deviations of x (N, C, H, W), tile by tile.

    norm: whose statistics the last program makes of them, in the same launch.

    Returns:
        data (P, 3, C) float32 with at most ``MAX_TILES`` tiles, or ``stats`` (5, C).

    Raises:
        ValueError: x is not channels_last or has no rows. TypeError: its dtype is no kernel's.
    """
    _, found = _pass(x, None, True, norm)
    assert found is not None
    return found


def conv_end(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: Act = IDENTITY,
    subtract: bool = False,
    out_dtype: torch.dtype | None = None,
    with_moments: bool = False,
    norm: Norm | None = None,
) -> tuple[Tensor, Partials | Tensor | None]:
    """The end of a convolution whose product x another library has written, in one pass.

    out = x + bias + residual and its moments, as ``conv_forward`` has them (reference.conv_end).
    x's memory is out's where the dtype allows it.

    Args:
        x: (N, K, P, Q), channels_last. bias: (K,), contiguous, or None. residual: (N, K, P, Q),
            channels_last, or None. The rest: as for ``conv_forward``.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_floating(out_dtype=out_dtype)
    channels = x.shape[1]
    check_vector("bias", bias, channels)
    if residual is not None:
        check_activation("residual", residual, tuple(x.shape))
    if residual_stats is not None:
        check_per_channel("residual_stats", residual_stats, 5, channels)
    written = None
    if bias is not None or residual is not None or out_dtype != x.dtype:
        written = x if out_dtype == x.dtype else torch.empty_like(x, dtype=out_dtype)
    if not with_moments and (written is None or x.numel() == 0):
        return x if written is None else written, None
    return _pass(x, written, with_moments, norm, bias, residual, residual_stats, act, subtract)


def _pass(
    x: Tensor,
    out: Tensor | None,
    with_moments: bool,
    norm: Norm | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    act: Act = IDENTITY,
    subtract: bool = False,
) -> tuple[Tensor, Partials | Tensor | None]:
    """One launch; out: written first, None for x as it is."""
    check_activation("x", x)
    channels = x.shape[1]
    rows = x.numel() // max(channels, 1)
    if rows == 0:
        raise ValueError(f"moments need at least one value per channel, got shape {tuple(x.shape)}")
    check_norm(norm, channels)
    device = device_of(x)
    most = _ELEMENTS_OF_A_WARP.get(device.matrix_unit, BLOCK_ELEMENTS)
    tiling = row_tiling(rows, channels, device, MAX_TILES, most)
    place = NOWHERE
    if with_moments:
        place = place_of_moments(x, norm, channels, tiling.tiles, tiling.block_c)
    launch(
        _moments_kernel,
        tiling.grid,
        x,
        bias,
        residual,
        residual_stats,
        out,
        *place.arguments,
        act.slope,
        rows,
        tiling.steps,
        place.group,
        C=channels,
        ACT=act.kind,
        SUBTRACT=subtract,
        EVEN_M=rows % tiling.block_m == 0,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        BLOCK_TILES=block_tiles(place.group, tiling.block_c, 1),
        # A program is one warp: the sums over rows need no other's, and so no shared memory, where
        # eight lanes would store to one bank.
        num_warps=1,
    )
    return x if out is None else out, place.result(rows, tiling.steps * tiling.block_m)


class Place(NamedTuple):
    """Where a launch leaves moments, and what makes statistics of them there.

    data: (P, 3, C), with the groups' behind the tiles' where ``norm`` takes statistics. counters:
    for tickets. stats: (5, C). group: tiles that are merged first (merging.py).
    """

    data: Tensor | None
    counters: Tensor | None
    norm: Norm | None
    stats: Tensor | None
    group: int

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernel's, in order: data, counters, weight, bias, stats, eps."""
        weight, bias, eps, _ = self.norm or Norm(None, None, 0.0)
        return self.data, self.counters, weight, bias, self.stats, float(eps)

    def result(self, rows: int, tile_rows: int) -> Partials | Tensor | None:
        """What the launch gives."""
        if self.stats is not None or self.data is None:
            return self.stats
        return Partials(self.data, rows, tile_rows)


def place_of_moments(
    like: Tensor, norm: Norm | None, channels: int, tiles: int, block_c: int
) -> Place:
    """For ``tiles`` tiles of rows and blocks of ``block_c`` channels."""
    group = group_size(tiles)
    groups = 0 if norm is None else cdiv(tiles, group)
    data = torch.empty((tiles + groups, 3, channels), dtype=torch.float32, device=like.device)
    if norm is None:
        return Place(data, None, None, None, group)
    counters = recording.counters(cdiv(channels, block_c) * (groups + 1), like.device)
    stats = torch.empty((5, channels), dtype=torch.float32, device=like.device)
    return Place(data, counters, norm, stats, group)


NOWHERE = Place(None, None, None, None, group_size(1))


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
    check_partials(partials, 3)
    data, rows, tile_rows = partials
    tiles, _, channels = data.shape
    check_vector("weight", weight, channels)
    check_vector("bias", bias, channels)
    check_vector("counts", counts, tiles, torch.float32)
    stats = torch.empty((5, channels), dtype=torch.float32, device=data.device)
    at_once, num_warps = merge_tiling(tiles)
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
        ROWS=data.shape[1],
        BLOCK_TILES=at_once,
        BLOCK_C=MERGE_CHANNELS,
        num_warps=num_warps,
    )
    return stats
