"""A convolution's gradient by its input, with act' and the norm's sums as epilogue.

    dz[m, c] = sum over taps t, k of g[m@t, k] * weight[k, c, t]  (+ add[m, c])
    q        = dz * act'(a*h + b)                  S1 = sum q,  S2 = sum q*xhat per tile and channel

A stride divides h's positions into classes that meet different taps, of a 3x3 with stride 2 one,
two, two and four of nine: a tile is of one class, and visits no other taps.

g = A*(q' - C - B*(h' - mean)) of the norm downstream is applied as it is loaded (the prologue),
never written. The sums are of q as stored, and the last tile makes the norm's coefficients and
gradients of them (merging.py). Two further ways to end: without WRITE only the sums leave; and,
given their coefficients, the same convolution again writes dx = A*(q - C - B*(h - mean)) + identity
instead of q.

Bytes: g's operands once (every tile of columns reads them again, through L2), h once, q once (0
without WRITE), add and identity once, and 8 bytes a tile and channel for the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, recording
from .activations import activation_grad, cast, norm_gradient, sums
from .checks import (
    check_activation,
    check_convolution,
    check_floating,
    check_grad,
    check_per_channel,
)
from .conv_tile import conv_tile
from .finishing import finish_sums
from .integers import cdiv
from .launch import TRITON_DTYPES, Config, device_of, input_precision, is_wide, launch
from .merging import block_tiles, store_sums
from .norm_backward import NO_SUMS, place_of_sums
from .operands import IDENTITY, Act, Convolution, Geometry, Grad, NormGrads


@triton.jit(do_not_specialize=["M", "group"])
def _conv_dgrad_kernel(
    grad_ptr,
    grad_h_ptr,
    grad_coef_ptr,
    weight_ptr,
    h_ptr,
    stats_ptr,
    add_ptr,
    coef_ptr,
    identity_ptr,
    out_ptr,
    sums_ptr,
    counters_ptr,
    new_coef_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    slope,
    group,
    CONV: tl.constexpr,
    CLASSED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,
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
    """One program: BLOCK_M positions of h (M = N*H*W) times BLOCK_N of its C channels."""
    C: tl.constexpr = CONV.C
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // COLUMN_BLOCKS
    columns = tl.program_id(0) % COLUMN_BLOCKS * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < C
    CLASSES: tl.constexpr = CONV.STRIDE_H * CONV.STRIDE_W if CLASSED else 1
    first_r = 0
    first_s = 0
    # Neighbouring programs' classes share rows, and so cache lines.
    rows = tile // CLASSES * BLOCK_M + tl.arange(0, BLOCK_M)
    if EVEN_M:
        mask = known[None, :]
    else:
        mask = (rows < M // CLASSES)[:, None] & known[None, :]
        rows = tl.minimum(rows, M // CLASSES - 1)
    if CLASSED:
        # Most padded kernels have the most taps in the last class, which is program 0's.
        number = CLASSES - 1 - tile % CLASSES
        y = number // CONV.STRIDE_W
        x = number % CONV.STRIDE_W
        first_r = (y + CONV.PADDING_H) % CONV.STRIDE_H
        first_s = (x + CONV.PADDING_W) % CONV.STRIDE_W
        WIDTH: tl.constexpr = CONV.W // CONV.STRIDE_W
        # No image ends inside of a step of STRIDE_H lines.
        rows = (rows // WIDTH * CONV.STRIDE_H + y) * CONV.W + rows % WIDTH * CONV.STRIDE_W + x
    if WIDE:
        rows = rows.to(tl.int64)

    q = conv_tile(
        grad_ptr,
        grad_h_ptr,
        grad_coef_ptr,
        weight_ptr,
        rows,
        columns,
        first_r,
        first_s,
        0.0,
        CONV,
        True,
        CLASSED,
        PROLOGUE,
        "identity",
        DTYPE,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        UNROLL,
    )

    offsets = rows[:, None] * C + columns[None, :]
    if add_ptr is not None:
        q += tl.load(add_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        h = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(stats_ptr + 3 * C + columns, mask=known, other=0.0)
        shift = tl.load(stats_ptr + 4 * C + columns, mask=known, other=0.0)
        q = activation_grad(q, h * scale[None, :] + shift[None, :], slope, ACT)
        if coef_ptr is not None:
            a = tl.load(coef_ptr + columns, mask=known, other=0.0)
            if TRAINING:
                b = tl.load(coef_ptr + C + columns, mask=known, other=0.0)
                c = tl.load(coef_ptr + 2 * C + columns, mask=known, other=0.0)
                center = tl.load(coef_ptr + 3 * C + columns, mask=known, other=0.0)
                q = norm_gradient(q, h, a, b, c, center)
            else:
                q = norm_gradient(q, None, a, None, None, None)
            if identity_ptr is not None:
                q += tl.load(identity_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if out_ptr is not None:
        stored = cast(q, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, stored, mask=mask)
        q = stored.to(tl.float32)
    if sums_ptr is not None:
        mean = tl.load(stats_ptr + columns, mask=known, other=0.0)
        rstd = tl.load(stats_ptr + 2 * C + columns, mask=known, other=0.0)
        if not EVEN_M:
            q = tl.where(mask, q, 0.0)
        s1, s2 = sums(q, q * (h - mean[None, :]))
        s2 *= rstd
        store_sums(sums_ptr + tile.to(tl.int64) * (2 * C), s1, s2, columns, known, C)
        finish_sums(
            sums_ptr,
            counters_ptr,
            stats_ptr,
            new_coef_ptr,
            dweight_ptr,
            dbias_ptr,
            M,
            tl.num_programs(0) // COLUMN_BLOCKS,
            group,
            tile,
            tl.program_id(0) % COLUMN_BLOCKS,
            columns,
            known,
            C,
            TRAINING,
            BLOCK_TILES,
            BLOCK_N,
        )


def _classes(conv: Convolution) -> int:
    """Into how many classes h's positions fall by their remainders, 1 where tiles mix them.

    A class reads R/STRIDE_H by S/STRIDE_W of the taps. Each has to have one, and as many rows as
    the others.
    """
    high, wide = conv.STRIDE_H, conv.STRIDE_W
    equal = conv.H % high == 0 and conv.W % wide == 0
    return high * wide if equal and conv.R >= high and conv.S >= wide else 1


def conv_dgrad(
    grad: Grad,
    weight: Tensor,
    h: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    add: Tensor | None = None,
    write: bool = True,
    coef: Tensor | None = None,
    identity: Tensor | None = None,
    training: bool = True,
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    smaller: int = 0,
) -> tuple[Tensor | None, NormGrads | None]:
    """q = (dgrad(g, weight) + add) * act'(a*h + b), and what its sums give; see reference.py.

    Args:
        grad: q and h (N, K, P, Q), channels_last; coef (4, K), contiguous.
        weight: (K, C, R, S), any strides. h: (N, C, H, W), channels_last; where ``stats`` is None
            only its shape is used.
        stats, coef: (5, C) and (4, C), contiguous, float32.
        add, identity: (N, C, H, W), channels_last.
        config: the tile; chosen by shape (configs.py) if None. smaller: times it is halved.

    Raises:
        KernelError: this device cannot have the tile, or there is none so small.
        NotImplementedError: for groups, dilation or asymmetric padding, or a dtype that no kernel
            multiplies in.
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    conv = check_convolution(h, weight, geometry, dtype)
    n, c, height, width = h.shape
    check_grad(grad, (n, conv.K, conv.P, conv.Q))
    if stats is None:
        # The plain gradient: nothing of a norm is left to do.
        write, coef, identity = True, None, None
    else:
        check_activation("h", h)
        check_per_channel("stats", stats, 5, c)
    if coef is not None:
        check_per_channel("coef", coef, 4, c)
    for name, extra in (("add", add), ("identity", identity)):
        if extra is not None:
            check_activation(name, extra, (n, c, height, width))
    out_dtype = dtype if out_dtype is None else out_dtype
    check_floating(out_dtype=out_dtype)
    rows = n * height * width
    prologue = "none"
    if grad.coef is not None:
        prologue = "affine" if grad.h is None else "affine_h"
    long_epilogue = coef is not None or act.kind in configs.SMOOTH_ACTS
    if config is None:
        sizes = configs.ConvShape(rows, conv.K, c, conv.R * conv.S, dtype, long_epilogue)
        config = configs.conv(sizes, device_of(h))
    config = configs.smaller(config, smaller)
    classes = _classes(conv)
    tiles = classes * cdiv(rows // classes, config.block_m)
    out = None
    if write or coef is not None:
        out = torch.empty(
            (n, c, height, width),
            dtype=out_dtype,
            device=h.device,
            memory_format=torch.channels_last,
        )
    place = NO_SUMS
    if stats is not None and coef is None:
        place = place_of_sums(h, c, tiles, config.block_n)
    recording.flops(2 * grad.q.numel() * c * conv.R * conv.S)
    launch(
        _conv_dgrad_kernel,
        (tiles * cdiv(c, config.block_n),),
        grad.q,
        grad.h if prologue == "affine_h" else None,
        grad.coef,
        weight,
        h if stats is not None else None,
        stats,
        add,
        coef,
        identity,
        out,
        *place.arguments,
        rows,
        act.slope,
        place.group,
        CONV=conv,
        CLASSED=classes > 1,
        PROLOGUE=prologue,
        ACT=act.kind,
        TRAINING=training,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=input_precision(dtype),
        WIDE=is_wide(h, grad.q),
        EVEN_M=rows // classes % config.block_m == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        UNROLL=config.unroll,
        BLOCK_TILES=block_tiles(place.group, config.block_n, config.num_warps),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, place.grads
