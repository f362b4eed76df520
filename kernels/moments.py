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
    check_rows,
    check_vector,
)
from .finishing import finish_moments, store_stats
from .groups import Grouped, is_per_image
from .integers import cdiv, next_power_of_2
from .launch import device_of, launch
from .merging import block_tiles, group_size, merge_moments, store_moments, tile_counts
from .operands import IDENTITY, Act, Moments, Norm, Partials
from .tiling import (
    BLOCK_ELEMENTS,
    MAX_TILES,
    block_offsets,
    program_image,
    program_tile,
    row_tiling,
    tile_steps,
)

# Of a program of one warp for Blackwell, to which Triton 3.8's ptxas gives 128 registers a thread:
# twice as many spill.
_ELEMENTS_OF_A_WARP = {"tcgen05": 1024}
# The merge's tile: rows of partials at a time, and channels, one L2 sector of each row.
MERGE_TILES = 1024
MERGE_CHANNELS = 8


def merge_tiling(tiles: int) -> tuple[int, int]:
    """BLOCK_TILES and num_warps for merging ``tiles`` partials of MERGE_CHANNELS channels."""
    block_tiles = min(MERGE_TILES, next_power_of_2(tiles))
    return block_tiles, min(max(block_tiles // 32, 1), 8)


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


@triton.jit(do_not_specialize=["M", "steps", "group", "images"])
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
    kept_ptr,
    slope,
    M,
    steps,
    group,
    images,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS_N: tl.constexpr,
    RESIDUAL_N: tl.constexpr,
    ACT: tl.constexpr,
    SUBTRACT: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    MASKED: tl.constexpr = not EVEN_M or C % BLOCK_C != 0
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    residual_row = C
    if images is not None:
        image, program = program_image(images)
        before = image * M * C
        x_ptr += before
        if out_ptr is not None:
            out_ptr += before
        if residual_ptr is not None:
            residual_ptr += before
        if BIAS_N:
            conv_bias_ptr += image * C
        if RESIDUAL_N:
            residual_stats_ptr += image * C
            residual_row = images * C
        if GROUP is not None:
            tiles = tl.num_programs(0) // images // COLUMN_BLOCKS
            groups = (tiles + group - 1) // group
            data_ptr += image * (tiles + groups + 1) * (3 * C)
            counters_ptr += image * (COLUMN_BLOCKS * (groups + 1) + 1)
            stats_ptr += image * C
            kept_ptr += image * GROUP.G
            if GROUP.WEIGHT_N:
                weight_ptr += image * C
            if GROUP.BIAS_N:
                bias_ptr += image * C
    tile, columns = program_tile(program, C, BLOCK_C)
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
                    at = residual_stats_ptr + columns
                    scale = tl.load(at + 3 * residual_row, mask=known, other=0.0)
                    shift = tl.load(at + 4 * residual_row, mask=known, other=0.0)
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
            program % COLUMN_BLOCKS,
            columns,
            known,
            C,
            BLOCK_TILES,
            BLOCK_C,
            kept_ptr,
            images,
            GROUP,
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


def moments(x: Tensor, norm: Norm | None = None) -> Moments:
    """Per-channel mean and sum of squared deviations of x (N, C, H, W), tile by tile.

    norm: whose statistics the last program makes of them, in the same launch.

    Returns:
        data (P, 3, C) float32 with at most ``MAX_TILES`` tiles, or ``stats`` (5, C); of a group
        norm what is kept of it, (2, N, G), and ``stats`` (5, N, C).

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
) -> tuple[Tensor, Moments | None]:
    """The end of a convolution whose product x another library has written, in one pass.

    out = x + bias + residual and its moments, as ``conv_forward`` has them (reference.conv_end).
    x's memory is out's where the dtype allows it.

    Args:
        x: (N, K, P, Q), channels_last. bias: (K,) or (N, K), contiguous, or None. residual:
            (N, K, P, Q), channels_last, or None. residual_stats: (5, K) or (5, N, K), or None. The
            rest: as for ``conv_forward``.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    out_dtype = x.dtype if out_dtype is None else out_dtype
    check_floating(out_dtype=out_dtype)
    check_activation("x", x)
    channels = x.shape[1]
    check_vector("bias", bias, channels, images=x.shape[0])
    if residual is not None:
        check_activation("residual", residual, tuple(x.shape))
    if residual_stats is not None:
        check_rows("residual_stats", residual_stats, 5, x)
    written = None
    if bias is not None or residual is not None or out_dtype != x.dtype:
        written = x if out_dtype == x.dtype else torch.empty_like(x, dtype=out_dtype)
    if not with_moments and (written is None or x.numel() == 0):
        return x if written is None else written, None
    per_image = is_per_image(bias) or (residual_stats is not None and residual_stats.dim() == 3)
    if per_image and with_moments and not (norm and norm.groups):
        # Tiles of an image's rows are not equally long, and nobody else merges such.
        out, _ = _pass(x, written, False, None, bias, residual, residual_stats, act, subtract)
        return out, moments(out, norm)
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
) -> tuple[Tensor, Moments | None]:
    """One launch; out: written first, None for x as it is."""
    check_activation("x", x)
    if x.numel() == 0:
        raise ValueError(f"moments need at least one value per channel, got shape {tuple(x.shape)}")
    number, channels, height, width = x.shape
    check_norm(norm, channels, number)
    bias_n = is_per_image(bias)
    residual_n = residual_stats is not None and residual_stats.dim() == 3
    grouped = None
    if norm is not None and norm.groups and with_moments:
        grouped = Grouped.of(norm, channels)
    images = number if bias_n or residual_n or grouped is not None else None
    rows = number * height * width if images is None else height * width
    device = device_of(x)
    most = _ELEMENTS_OF_A_WARP.get(device.matrix_unit, BLOCK_ELEMENTS)
    if images is not None and (residual_n or channels % 16):
        # Masks take registers too, and so do two norms.
        most //= 2
    tiling = row_tiling(rows, channels, device, MAX_TILES, most, images)
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
        place.kept,
        act.slope,
        rows,
        tiling.steps,
        place.group,
        images,
        C=channels,
        GROUP=grouped,
        BIAS_N=bias_n,
        RESIDUAL_N=residual_n,
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
    for tickets. stats: (5, C). group: tiles that are merged first (merging.py). kept: (2, N, G) of
    a group norm, whose data are each image's, with the whole image's behind them, and whose stats
    are (5, N, C).
    """

    data: Tensor | None
    counters: Tensor | None
    norm: Norm | None
    stats: Tensor | None
    group: int
    kept: Tensor | None = None

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The kernel's, in order: data, counters, weight, bias, stats, eps."""
        weight, bias, eps, _ = self.norm or (None, None, 0.0, 0)
        return self.data, self.counters, weight, bias, self.stats, float(eps)

    def result(self, rows: int, tile_rows: int) -> Moments | None:
        """What the launch gives."""
        if self.kept is not None and self.stats is not None:
            return self.kept, self.stats
        if self.stats is not None or self.data is None:
            return self.stats
        return Partials(self.data, rows, tile_rows)


def place_of_moments(
    like: Tensor, norm: Norm | None, channels: int, tiles: int, block_c: int
) -> Place:
    """For ``tiles`` tiles of rows, of an image where ``norm`` has groups, and blocks of ``block_c``
    channels."""
    group = group_size(tiles)
    groups = 0 if norm is None else cdiv(tiles, group)
    blocks = cdiv(channels, block_c)
    empty = functools.partial(torch.empty, dtype=torch.float32, device=like.device)
    if norm is None:
        return Place(empty((tiles, 3, channels)), None, None, None, group)
    if norm.groups:
        images = like.shape[0]
        data = empty((images * (tiles + groups + 1), 3, channels))
        counters = recording.counters(images * (blocks * (groups + 1) + 1), like.device)
        kept, stats = empty((2, images, norm.groups)), empty((5, images, channels))
        return Place(data, counters, norm, stats, group, kept)
    counters = recording.counters(blocks * (groups + 1), like.device)
    return Place(empty((tiles + groups, 3, channels)), counters, norm, empty((5, channels)), group)


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
