"""The sums of a norm's backward, and what they give, behind a convolution's dgrad.

    q = (dz + add) * act'(a*h + b),     S1 = sum q,  S2 = sum q*xhat,  xhat = (h - mean)*rstd
    A = a,  B = rstd*S2/M,  C = S1/M                     (B = C = 0 with running statistics)

``act_backward`` takes each tile's S1 and S2; its last program merges them in a fixed order into
A, B, C and the norm's own gradients dweight = S2, dbias = S1 (finishing.py; of a norm over groups
groups.py). q is not written: who reads dz and h for g has it at hand (input_grad.py). z =
act(a*h + b) of the same h can be, for a weight gradient. ``norm_grad`` merges alone, where the sums
are those of several processes.

Bytes: ``act_backward`` reads dz, h (and add) and writes z if asked to; sums take 8 bytes a tile and
channel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recording
from .activations import activate, activation_grad, cast, sums
from .checks import (
    check_activation,
    check_floating,
    check_norm,
    check_partials,
    check_per_channel,
    check_rows,
    check_vector,
)
from .finishing import finish_sums, store_norm_grad
from .groups import Grouped, is_per_image
from .integers import cdiv
from .launch import device_of, launch
from .merging import block_tiles, group_size, merge_sums, store_sums
from .moments import MERGE_CHANNELS, merge_tiling
from .operands import Act, Norm, NormGrads, Partials
from .tiling import MAX_TILES, block_offsets, program_image, program_tile, row_tiling, tile_steps


@triton.jit(do_not_specialize=["M", "steps", "group", "images"])
def _act_backward_kernel(
    dz_ptr,
    add_ptr,
    h_ptr,
    stats_ptr,
    z_ptr,
    data_ptr,
    counters_ptr,
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    s2_ptr,
    s1_ptr,
    slope,
    M,
    steps,
    group,
    images,
    C: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program, programs = tl.program_id(0), tl.num_programs(0)
    image = None
    row = C
    if images is not None:
        image, program = program_image(images)
        programs = programs // images
        before = image * M * C
        dz_ptr += before
        h_ptr += before
        if add_ptr is not None:
            add_ptr += before
        if z_ptr is not None:
            z_ptr += before
        stats_ptr += image * C
        coef_ptr += image * C
        row = images * C
        tiles = programs // COLUMN_BLOCKS
        data_ptr += image * (tiles + (tiles + group - 1) // group) * (2 * C)
    tile, columns = program_tile(program, C, BLOCK_C)
    first, blocks = tile_steps(tile, M, steps, BLOCK_M)
    known = columns < C
    mean = tl.load(stats_ptr + columns, mask=known, other=0.0)
    rstd = tl.load(stats_ptr + 2 * row + columns, mask=known, other=0.0)
    scale = tl.load(stats_ptr + 3 * row + columns, mask=known, other=0.0)
    shift = tl.load(stats_ptr + 4 * row + columns, mask=known, other=0.0)
    # Summed element by element, and over the rows only once at the end.
    s1 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for step in range(blocks):
        base, offsets, mask, _ = block_offsets(first + step, M, columns, C, BLOCK_M, BLOCK_C)
        h = tl.load(h_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        dz = tl.load(dz_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if add_ptr is not None:
            dz += tl.load(add_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        u = h * scale[None, :] + shift[None, :]
        if z_ptr is not None:
            z = cast(activate(u, slope, ACT), z_ptr.dtype.element_ty)
            tl.store(z_ptr + base + offsets, z, mask=mask)
        q = activation_grad(dz, u, slope, ACT)
        s1 += q
        s2 += q * (h - mean[None, :])
    at = data_ptr + tile.to(tl.int64) * (2 * C)
    s1, s2 = sums(s1, s2)
    store_sums(at, s1, s2 * rstd, columns, known, C)
    finish_sums(
        data_ptr,
        counters_ptr,
        stats_ptr,
        coef_ptr,
        dweight_ptr,
        dbias_ptr,
        M,
        programs // COLUMN_BLOCKS,
        group,
        tile,
        program % COLUMN_BLOCKS,
        columns,
        known,
        C,
        TRAINING,
        BLOCK_TILES,
        BLOCK_C,
        image,
        images,
        s2_ptr,
        s1_ptr,
        GROUP,
    )


@triton.jit(do_not_specialize=["M", "tiles"])
def _norm_grad_kernel(
    data_ptr,
    total_ptr,
    stats_ptr,
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    tiles,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = columns < C
    s1, s2 = merge_sums(data_ptr, tiles, columns, known, C, BLOCK_TILES, BLOCK_C)
    if total_ptr is not None:
        inverse = 1.0 / tl.load(total_ptr)
    else:
        inverse = 1.0 / M.to(tl.float32)
    store_norm_grad(
        coef_ptr, dweight_ptr, dbias_ptr, stats_ptr, inverse, s1, s2, columns, known, C, TRAINING
    )


class Sums(NamedTuple):
    """Where a launch leaves S1 and S2, and what it makes of them there.

    data: (P, 2, C), with the groups' behind the tiles'. counters: for tickets. grads: the result.
    group: tiles that are merged first (merging.py). of_images: of a norm over groups S2 and S1
    (N, C) of each image, out of whose own data they come.
    """

    data: Tensor | None
    counters: Tensor | None
    grads: NormGrads | None
    group: int
    of_images: tuple[Tensor | None, ...] = (None, None)

    @property
    def arguments(self) -> tuple[Tensor | None, ...]:
        """The kernel's, in order: data, counters, coef, and dweight and dbias, to be summed up."""
        coef, *sums = self.grads or (None, None, None)
        known = zip(sums, self.of_images)
        dweight, dbias = (None if each is of_images else each for each, of_images in known)
        return self.data, self.counters, coef, dweight, dbias


def place_of_sums(
    like: Tensor, channels: int, tiles: int, block_c: int, norm: Norm | None = None
) -> Sums:
    """For ``tiles`` tiles of rows and blocks of ``block_c`` channels; of a norm over groups, for so
    many tiles of each image."""
    group = group_size(tiles)
    groups, blocks = cdiv(tiles, group), cdiv(channels, block_c)
    images = 1 if norm is None else like.shape[0]
    empty = functools.partial(torch.empty, dtype=torch.float32, device=like.device)
    data = empty((images * (tiles + groups), 2, channels))
    number = blocks * (groups + 1)
    if norm is None:
        counters = recording.counters(number, like.device)
        return Sums(data, counters, _norm_grads(like, channels), group)
    counters = recording.counters(images * (number + 1) + blocks, like.device)
    s2, s1 = empty((images, channels)), empty((images, channels))
    grads = NormGrads(
        empty((4, images, channels)),
        s2 if is_per_image(norm.weight) else empty(channels),
        s1 if is_per_image(norm.bias) else empty(channels),
    )
    return Sums(data, counters, grads, group, (s2, s1))


NO_SUMS = Sums(None, None, None, group_size(1))


def _norm_grads(like: Tensor, channels: int) -> NormGrads:
    coef = torch.empty((4, channels), dtype=torch.float32, device=like.device)
    dweight = torch.empty(channels, dtype=torch.float32, device=like.device)
    return NormGrads(coef, dweight, torch.empty_like(dweight))


def act_backward(
    dz: Tensor,
    h: Tensor,
    stats: Tensor,
    act: Act,
    add: Tensor | None = None,
    training: bool = True,
    dtype: torch.dtype | None = None,
    norm: Norm | None = None,
) -> tuple[Tensor | None, NormGrads]:
    """What the sums S1 and S2 of q = (dz + add) * act'(a*h + b) give, and z = act(a*h + b).

    Args:
        dz, h, add: (N, C, H, W), channels_last, each with its own dtype. stats: (5, C) float32, or
            (5, N, C) of a norm over groups, which ``norm`` then is.
        dtype: of z, channels_last; None for no z.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_activation("h", h)
    check_activation("dz", dz, tuple(h.shape))
    if add is not None:
        check_activation("add", add, tuple(h.shape))
    number, channels, height, width = h.shape
    images = check_rows("stats", stats, 5, h)
    grouped = None
    if h.numel() == 0:
        raise ValueError(f"the sums need at least one value per channel, got {tuple(h.shape)}")
    if images is None:
        norm = None
        rows = number * height * width
    elif norm is None or not norm.groups:
        raise ValueError(f"stats per image need their norm, with its groups, got {norm}")
    else:
        check_norm(norm, channels, images)
        grouped = Grouped.of(norm, channels)
        rows = height * width
    tiling = row_tiling(rows, channels, device_of(h), MAX_TILES, images=images)
    z = None
    if dtype is not None:
        check_floating(dtype=dtype)
        z = torch.empty_like(h, dtype=dtype, memory_format=torch.channels_last)
    place = place_of_sums(h, channels, tiling.tiles, tiling.block_c, norm)
    launch(
        _act_backward_kernel,
        tiling.grid,
        dz,
        add,
        h,
        stats,
        z,
        *place.arguments,
        *place.of_images,
        act.slope,
        rows,
        tiling.steps,
        place.group,
        images,
        C=channels,
        GROUP=grouped,
        ACT=act.kind,
        TRAINING=training,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        BLOCK_TILES=block_tiles(place.group, tiling.block_c, 1),
        num_warps=4,
    )
    assert place.grads is not None
    return z, place.grads


def norm_grad(
    partials: Partials, stats: Tensor, training: bool, total: Tensor | None = None
) -> NormGrads:
    """Coefficients (4, C) of g, and dweight = S2, dbias = S1: (C,), all float32.

    One launch that merges the tiles in a fixed order. With running statistics
    (``training=False``) B = C = 0. total: (1,) float32, the number of rows M, where only the
    device knows it (``ranks``); ``partials`` says it otherwise.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_partials(partials)
    data, rows, _ = partials
    tiles, _, channels = data.shape
    check_per_channel("stats", stats, 5, channels)
    check_vector("total", total, 1, torch.float32)
    grads = _norm_grads(stats, channels)
    at_once, num_warps = merge_tiling(tiles)
    launch(
        _norm_grad_kernel,
        (cdiv(channels, MERGE_CHANNELS),),
        data,
        total,
        stats,
        *grads,
        rows,
        tiles,
        C=channels,
        TRAINING=training,
        BLOCK_TILES=at_once,
        BLOCK_C=MERGE_CHANNELS,
        num_warps=num_warps,
    )
    return grads
