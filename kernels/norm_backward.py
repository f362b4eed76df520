"""The backward of norm -> act around a convolution's dgrad, elementwise.

    q = (dz + add) * act'(a*h + b),     S1 = sum q,  S2 = sum q*xhat,  xhat = (h - mean)*rstd
    A = a,  B = -a*rstd*S2/M,  C = -a*S1/M - B*mean          (B = C = 0 with running statistics)
    g = A*q + B*h + C (+ identity)

``act_backward`` writes q and each tile's S1 and S2 of q as stored; ``norm_grad`` merges the tiles
in a fixed order into A, B, C and the norm's own gradients dweight = S2, dbias = S1; ``input_grad``
writes g.

Bytes: ``act_backward`` reads dz, h (and add) and writes q; ``input_grad`` reads q, h (and identity)
and writes g; ``norm_grad`` reads 8 bytes a tile and channel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad, cast
from .checks import (
    check_activation,
    check_floating,
    check_grad,
    check_partials,
    check_per_channel,
    check_vector,
)
from .integers import cdiv
from .launch import device_of, launch
from .moments import (
    MAX_TILES,
    MERGE_CHANNELS,
    block_offsets,
    merge_tiling,
    program_tile,
    row_tiling,
    tile_steps,
)
from .operands import Act, Grad, Partials


@triton.jit(do_not_specialize=["M", "steps"])
def _act_backward_kernel(
    dz_ptr,
    add_ptr,
    h_ptr,
    stats_ptr,
    q_ptr,
    data_ptr,
    slope,
    M,
    steps,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, columns = program_tile(C, BLOCK_C)
    first, blocks = tile_steps(tile, M, steps, BLOCK_M)
    known = columns < C
    mean = tl.load(stats_ptr + columns, mask=known, other=0.0)
    rstd = tl.load(stats_ptr + 2 * C + columns, mask=known, other=0.0)
    scale = tl.load(stats_ptr + 3 * C + columns, mask=known, other=0.0)
    shift = tl.load(stats_ptr + 4 * C + columns, mask=known, other=0.0)
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
        q = cast(activation_grad(dz, u, slope, ACT), q_ptr.dtype.element_ty)
        tl.store(q_ptr + base + offsets, q, mask=mask)
        q = q.to(tl.float32)
        s1 += q
        s2 += q * (h - mean[None, :])
    data_ptr += tile.to(tl.int64) * (2 * C)
    tl.store(data_ptr + columns, tl.sum(s1, axis=0), mask=known)
    tl.store(data_ptr + C + columns, tl.sum(s2, axis=0) * rstd, mask=known)


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
    s1_t = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    s2_t = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (2 * C) + columns[None, :]
        s1_t += tl.load(data_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s2_t += tl.load(data_ptr + C + at, mask=mask, other=0.0).to(tl.float32)
    s1 = tl.sum(s1_t, axis=0)
    s2 = tl.sum(s2_t, axis=0)

    scale = tl.load(stats_ptr + 3 * C + columns, mask=known, other=0.0)
    b = tl.zeros((BLOCK_C,), tl.float32)
    c = tl.zeros((BLOCK_C,), tl.float32)
    if TRAINING:
        mean = tl.load(stats_ptr + columns, mask=known, other=0.0)
        rstd = tl.load(stats_ptr + 2 * C + columns, mask=known, other=0.0)
        if total_ptr is not None:
            inverse = -1.0 / tl.load(total_ptr)
        else:
            inverse = -1.0 / M.to(tl.float32)
        b = s2 * inverse * (scale * rstd)
        c = s1 * inverse * scale - b * mean
    tl.store(coef_ptr + columns, scale, mask=known)
    tl.store(coef_ptr + C + columns, b, mask=known)
    tl.store(coef_ptr + 2 * C + columns, c, mask=known)
    tl.store(dweight_ptr + columns, s2, mask=known)
    tl.store(dbias_ptr + columns, s1, mask=known)


@triton.jit(do_not_specialize=["M"])
def _input_grad_kernel(
    q_ptr,
    h_ptr,
    coef_ptr,
    identity_ptr,
    g_ptr,
    M,
    C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tile, columns = program_tile(C, BLOCK_C)
    base, offsets, mask, _ = block_offsets(tile, M, columns, C, BLOCK_M, BLOCK_C)
    known = columns < C
    g = tl.load(q_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if coef_ptr is not None:
        g *= tl.load(coef_ptr + columns, mask=known, other=0.0)[None, :]
        if h_ptr is not None:
            b = tl.load(coef_ptr + C + columns, mask=known, other=0.0)[None, :]
            c = tl.load(coef_ptr + 2 * C + columns, mask=known, other=0.0)[None, :]
            h = tl.load(h_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
            # Where B is 0, an Inf in h must not become a NaN.
            g += tl.where(b == 0.0, 0.0, b * h) + c
    if identity_ptr is not None:
        g += tl.load(identity_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + base + offsets, cast(g, g_ptr.dtype.element_ty), mask=mask)


def act_backward(
    dz: Tensor, h: Tensor, stats: Tensor, act: Act, add: Tensor | None = None
) -> tuple[Tensor, Partials]:
    """q = (dz + add) * act'(a*h + b) in dz's dtype, and its sums S1, S2 tile by tile.

    Args:
        dz, h, add: (N, C, H, W), channels_last, each with its own dtype. stats: (5, C) float32.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_activation("h", h)
    check_activation("dz", dz, tuple(h.shape))
    if add is not None:
        check_activation("add", add, tuple(h.shape))
    channels = h.shape[1]
    check_per_channel("stats", stats, 5, channels)
    rows = h.numel() // max(channels, 1)
    if rows == 0:
        raise ValueError(f"the sums need at least one value per channel, got {tuple(h.shape)}")
    tiling = row_tiling(rows, channels, device_of(h), MAX_TILES)
    q = torch.empty_like(dz, memory_format=torch.channels_last)
    data = torch.empty((tiling.tiles, 2, channels), dtype=torch.float32, device=h.device)
    launch(
        _act_backward_kernel,
        tiling.grid,
        dz,
        add,
        h,
        stats,
        q,
        data,
        act.slope,
        rows,
        tiling.steps,
        C=channels,
        ACT=act.kind,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        num_warps=4,
    )
    return q, Partials(data, rows, tiling.steps * tiling.block_m)


def norm_grad(
    partials: Partials, stats: Tensor, training: bool, total: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (3, C) of g = A*q + B*h + C, and dweight = S2, dbias = S1: (C,), all float32.

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
    coef = torch.empty((3, channels), dtype=torch.float32, device=stats.device)
    dweight = torch.empty(channels, dtype=torch.float32, device=stats.device)
    dbias = torch.empty_like(dweight)
    block_tiles, num_warps = merge_tiling(tiles)
    launch(
        _norm_grad_kernel,
        (cdiv(channels, MERGE_CHANNELS),),
        data,
        total,
        stats,
        coef,
        dweight,
        dbias,
        rows,
        tiles,
        C=channels,
        TRAINING=training,
        BLOCK_TILES=block_tiles,
        BLOCK_C=MERGE_CHANNELS,
        num_warps=num_warps,
    )
    return coef, dweight, dbias


def input_grad(
    grad: Grad, identity: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """g = A*q + B*h + C (+ identity), written: a norm's dx, or a gradient operand read twice.

    Args:
        grad: q (N, C, H, W), channels_last, with h and coef or without.
        identity: the identity path's gradient, (N, C, H, W), added untouched, or None.
        dtype: of the result, q's if None.

    Returns:
        (N, C, H, W), channels_last, always a new tensor.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_grad(grad)
    q, h, coef = grad
    dtype = q.dtype if dtype is None else dtype
    check_floating(dtype=dtype)
    if identity is not None:
        check_activation("identity", identity, tuple(q.shape))
    g = torch.empty_like(q, dtype=dtype, memory_format=torch.channels_last)
    if q.numel() == 0:
        return g
    channels = q.shape[1]
    rows = q.numel() // channels
    tiling = row_tiling(rows, channels, device_of(q))
    launch(
        _input_grad_kernel,
        tiling.grid,
        q,
        None if coef is None else h,
        coef,
        identity,
        g,
        rows,
        C=channels,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        num_warps=4,
    )
    return g
