"""Convolution with norm and activation as prologue, residual and moments as epilogue.

    out[m, k] = sum over taps t, c of act(a_c*h[m@t, c] + b_c) * weight[k, c, t]
                + bias[k] + residual[m, k]

or residual - (conv + bias) with SUBTRACT, which walks the identity path back. The
residual may itself be act(a*residual + b). With moments, each tile also writes the mean and M2 of
its rows of out as stored, in two passes over registers: never E[x^2] - E[x]^2. Where it is known
which norm reads out, the last tile makes the norm's statistics of them (merging.py).

Bytes: h once (every tile of columns reads it again, through L2), out once, residual once, and 12
bytes a tile and channel for moments; z = act(a*h + b) is never written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, recording
from .activations import activate, cast, sums
from .checks import (
    check_activation,
    check_convolution,
    check_floating,
    check_norm,
    check_per_channel,
    check_vector,
)
from .conv_tile import conv_tile
from .finishing import finish_moments
from .integers import cdiv
from .launch import TRITON_DTYPES, Config, device_of, input_precision, is_wide, launch
from .merging import block_tiles, store_moments
from .moments import NOWHERE, place_of_moments
from .operands import IDENTITY, Act, Geometry, Moments, Norm


@triton.jit(do_not_specialize=["M", "group"])
def _conv_forward_kernel(
    h_ptr,
    stats_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    residual_stats_ptr,
    out_ptr,
    moments_ptr,
    counters_ptr,
    norm_weight_ptr,
    norm_bias_ptr,
    next_stats_ptr,
    eps,
    M,
    slope,
    group,
    CONV: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    SUBTRACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    """One program: BLOCK_M positions of out (M = N*P*Q) times BLOCK_N of its K channels."""
    K: tl.constexpr = CONV.K
    COLUMN_BLOCKS: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_BLOCKS
    columns = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < K
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)
    if EVEN_M:
        mask = known[None, :]
    else:
        mask = (rows < M)[:, None] & known[None, :]
        rows = tl.minimum(rows, M - 1)
    if WIDE:
        rows = rows.to(tl.int64)

    out = conv_tile(
        h_ptr,
        None,
        stats_ptr,
        weight_ptr,
        rows,
        columns,
        0,
        0,
        slope,
        CONV,
        False,
        False,
        PROLOGUE,
        ACT,
        DTYPE,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        UNROLL,
    )

    if bias_ptr is not None:
        out += tl.load(bias_ptr + columns, mask=known, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * K + columns[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if residual_stats_ptr is not None:
            scale = tl.load(residual_stats_ptr + 3 * K + columns, mask=known, other=0.0)
            shift = tl.load(residual_stats_ptr + 4 * K + columns, mask=known, other=0.0)
            residual = activate(residual * scale[None, :] + shift[None, :], slope, ACT)
        if SUBTRACT:
            out = residual - out
        else:
            out += residual
    stored = cast(out, out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, stored, mask=mask)

    if moments_ptr is not None:
        out = stored.to(tl.float32)
        if EVEN_M:
            inverse = 1.0 / BLOCK_M
            mean = tl.sum(out, 0) * inverse
            deviation = out - mean[None, :]
        else:
            inverse = 1.0 / tl.minimum(M - first, BLOCK_M)
            mean = tl.sum(tl.where(mask, out, 0.0), 0) * inverse
            deviation = tl.where(mask, out - mean[None, :], 0.0)
        rest, m2 = sums(deviation, deviation * deviation)
        m2 -= rest * (rest * inverse)
        at = moments_ptr + tile.to(tl.int64) * (3 * K)
        store_moments(at, columns, known, mean, m2, rest * inverse, K)
        if counters_ptr is not None:
            finish_moments(
                moments_ptr,
                counters_ptr,
                norm_weight_ptr,
                norm_bias_ptr,
                next_stats_ptr,
                eps,
                M,
                BLOCK_M,
                group,
                tile,
                tl.program_id(0) % COLUMN_BLOCKS,
                columns,
                known,
                K,
                BLOCK_TILES,
                BLOCK_N,
            )


def conv_forward(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    residual: Tensor | None = None,
    residual_stats: Tensor | None = None,
    subtract: bool = False,
    out_dtype: torch.dtype | None = None,
    with_moments: bool = False,
    norm: Norm | None = None,
    config: Config | None = None,
    smaller: int = 0,
) -> tuple[Tensor, Moments | None]:
    """out = conv(act(a*h + b)) + bias + residual, and the moments of out; see reference.py.

    Args:
        h: (N, C, H, W), channels_last. weight: (K, C, R, S), any strides. bias: (K,), contiguous,
            or None.
        stats, residual_stats: (5, C) and (5, K), contiguous, float32.
        residual: (N, K, P, Q), channels_last, or None.
        norm: the norm that reads out: its statistics (5, K) are given instead of the moments.
        config: the tile; chosen by shape (configs.py) if None. smaller: times it is halved.

    Raises:
        KernelError: this device cannot have the tile, or there is none so small.
        NotImplementedError: for groups, dilation or asymmetric padding, or a dtype that no kernel
            multiplies in.
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    conv = check_convolution(h, weight, geometry, dtype)
    check_activation("h", h)
    shape = (h.shape[0], conv.K, conv.P, conv.Q)
    check_vector("bias", bias, conv.K)
    if stats is not None:
        check_per_channel("stats", stats, 5, conv.C)
    if residual is not None:
        check_activation("residual", residual, shape)
    if residual_stats is not None:
        check_per_channel("residual_stats", residual_stats, 5, conv.K)
    out_dtype = dtype if out_dtype is None else out_dtype
    check_floating(out_dtype=out_dtype)
    check_norm(norm, conv.K)
    if norm is not None and norm.groups:
        raise NotImplementedError(
            "no tile of a convolution ends with an image: groups need moments"
        )
    out = torch.empty(
        shape,
        dtype=out_dtype,
        device=h.device,
        memory_format=torch.channels_last,
    )
    rows = shape[0] * conv.P * conv.Q
    long_epilogue = act.kind in configs.SMOOTH_ACTS
    if config is None:
        sizes = configs.ConvShape(rows, conv.C, conv.K, conv.R * conv.S, dtype, long_epilogue)
        config = configs.conv(sizes, device_of(h))
    config = configs.smaller(config, smaller)
    tiles = cdiv(rows, config.block_m)
    place = NOWHERE
    if with_moments:
        place = place_of_moments(h, norm, conv.K, tiles, config.block_n)
    recording.flops(2 * rows * conv.K * conv.C * conv.R * conv.S)
    launch(
        _conv_forward_kernel,
        (tiles * cdiv(conv.K, config.block_n),),
        h,
        stats,
        weight,
        bias,
        residual,
        residual_stats,
        out,
        *place.arguments,
        rows,
        act.slope,
        place.group,
        CONV=conv,
        PROLOGUE="none" if stats is None else "act",
        ACT=act.kind,
        SUBTRACT=subtract,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=input_precision(dtype),
        WIDE=is_wide(h, out),
        EVEN_M=rows % config.block_m == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        UNROLL=config.unroll,
        BLOCK_TILES=block_tiles(place.group, config.block_n, config.num_warps // 4),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, place.result(rows, config.block_m)
