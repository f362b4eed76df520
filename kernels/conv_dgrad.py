"""A convolution's gradient by its input, with act' and the norm's sums as epilogue.

    dz[m, c] = sum over taps t, k of g[m@t, k] * weight[k, c, t]  (+ add[m, c])
    q        = dz * act'(a*h + b)                  S1 = sum q,  S2 = sum q*xhat per tile and channel

g = A*q' + B*h' + C of the norm downstream is applied as it is loaded (the prologue), never written.
The sums are of q as stored. Two further ways to end: without WRITE only the sums leave; and, given
their coefficients, the same convolution again writes dx = A*q + B*h + C + identity instead of q.

Bytes: g's operands once (every tile of columns reads them again, through L2), h once, q once (0
without WRITE), add and identity once, and 8/M of a row of float32 a channel for the sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, launch, recording
from .activations import activation_grad, cast
from .conv_tile import conv_tile
from .integers import cdiv
from .launch import Config
from .operands import IDENTITY, Act, Geometry, Grad, Partials


@triton.jit
def conv_dgrad_kernel(
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
    M,
    slope,
    C: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_WC: tl.constexpr,
    STRIDE_WR: tl.constexpr,
    STRIDE_WS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One program: BLOCK_M positions of h (M = N*H*W) times BLOCK_N of its C channels."""
    column_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // column_tiles
    columns = tl.program_id(0) % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = columns < C
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if EVEN_M:
        mask = in_columns[None, :]
    else:
        mask = (rows < M)[:, None] & in_columns[None, :]
        rows = tl.minimum(rows, M - 1)
    if WIDE:
        rows = rows.to(tl.int64)

    q = conv_tile(
        grad_ptr,
        grad_h_ptr,
        grad_coef_ptr,
        weight_ptr,
        rows,
        columns,
        0.0,
        STRIDE_WC,
        STRIDE_WK,
        STRIDE_WR,
        STRIDE_WS,
        K,
        C,
        H,
        W,
        P,
        Q,
        R,
        S,
        STRIDE_H,
        STRIDE_W,
        PADDING_H,
        PADDING_W,
        True,
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
        scale = tl.load(stats_ptr + 3 * C + columns, mask=in_columns, other=0.0)
        shift = tl.load(stats_ptr + 4 * C + columns, mask=in_columns, other=0.0)
        q = activation_grad(q, h * scale[None, :] + shift[None, :], slope, ACT)
        if coef_ptr is not None:
            a = tl.load(coef_ptr + columns, mask=in_columns, other=0.0)[None, :]
            b = tl.load(coef_ptr + C + columns, mask=in_columns, other=0.0)[None, :]
            c = tl.load(coef_ptr + 2 * C + columns, mask=in_columns, other=0.0)[None, :]
            # B = 0 means that h is no part of the gradient, even where it is infinite.
            q = a * q + tl.where(b == 0.0, 0.0, b * h) + c
            if identity_ptr is not None:
                q += tl.load(identity_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if out_ptr is not None:
        stored = cast(q, out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets, stored, mask=mask)
        q = stored.to(tl.float32)
    if sums_ptr is not None:
        mean = tl.load(stats_ptr + columns, mask=in_columns, other=0.0)
        rstd = tl.load(stats_ptr + 2 * C + columns, mask=in_columns, other=0.0)
        if not EVEN_M:
            q = tl.where(mask, q, 0.0)
        s1 = tl.sum(q, 0)
        s2 = tl.sum(q * (h - mean[None, :]), 0) * rstd
        sums_ptr += tile.to(tl.int64) * (2 * C)
        tl.store(sums_ptr + columns, s1, mask=in_columns)
        tl.store(sums_ptr + C + columns, s2, mask=in_columns)


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
    out_dtype: torch.dtype | None = None,
    config: Config | None = None,
    smaller: int = 0,
) -> tuple[Tensor | None, Partials | None]:
    """q = (dgrad(g, weight) + add) * act'(a*h + b), with its sums S1, S2; see reference.py.

    Args:
        grad: q and h (N, K, P, Q), channels_last; coef (3, K), contiguous.
        weight: (K, C, R, S), any strides. h: (N, C, H, W), channels_last; where ``stats`` is None
            only its shape is used.
        stats, coef: (5, C) and (3, C), contiguous. add, identity: (N, C, H, W), channels_last.
        config: the tile; chosen by shape (configs.py) if None. smaller: times it is halved.

    Raises:
        KernelError: this device cannot have the tile, or there is none so small.
        NotImplementedError: for groups or dilation, or a dtype that no kernel multiplies in.
        ValueError: for an activation that is not channels_last or has another shape.
    """
    launch.check_convolution(geometry, dtype)
    n, c, height, width = h.shape
    k, _, r, s = weight.shape
    p, q = geometry.output_size((height, width), (r, s))
    launch.check_activation("grad.q", grad.q, (n, k, p, q))
    if grad.h is not None:
        launch.check_activation("grad.h", grad.h, (n, k, p, q))
    if stats is None:
        # The plain gradient: nothing of a norm is left to do.
        write, coef, identity = True, None, None
    else:
        launch.check_activation("h", h)
    for name, extra in (("add", add), ("identity", identity)):
        if extra is not None:
            launch.check_activation(name, extra, (n, c, height, width))
    rows = n * height * width
    prologue = "none"
    if grad.coef is not None:
        prologue = "affine" if grad.h is None else "affine_h"
    long_epilogue = coef is not None or act.kind in configs.SMOOTH_ACTS
    if config is None:
        config = configs.tuned_conv(
            "conv_dgrad",
            configs.ConvShape(rows, k, c, r * s, dtype, long_epilogue),
            launch.device_of(h),
            lambda: (h.shape, geometry, grad.q.dtype, weight.dtype, weight.stride(), prologue),
            lambda tile: conv_dgrad(
                grad,
                weight,
                h,
                geometry,
                dtype=dtype,
                stats=stats,
                act=act,
                add=add,
                write=write,
                coef=coef,
                identity=identity,
                out_dtype=out_dtype,
                config=tile,
            ),
        )
    config = configs.smaller(config, smaller)
    tiles = cdiv(rows, config.block_m)
    out = None
    if write or coef is not None:
        out = torch.empty(
            (n, c, height, width),
            dtype=dtype if out_dtype is None else out_dtype,
            device=h.device,
            memory_format=torch.channels_last,
        )
    data = None
    if stats is not None and coef is None:
        data = torch.empty((tiles, 2, c), dtype=torch.float32, device=h.device)
    recording.flops(2 * grad.q.numel() * c * r * s)
    launch.launch(
        conv_dgrad_kernel,
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
        data,
        rows,
        act.slope,
        C=c,
        K=k,
        H=height,
        W=width,
        P=p,
        Q=q,
        R=r,
        S=s,
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PADDING_H=geometry.padding[0],
        PADDING_W=geometry.padding[1],
        STRIDE_WK=weight.stride(0),
        STRIDE_WC=weight.stride(1),
        STRIDE_WR=weight.stride(2),
        STRIDE_WS=weight.stride(3),
        PROLOGUE=prologue,
        ACT=act.kind,
        DTYPE=launch.TRITON_DTYPES[dtype],
        PRECISION=launch.input_precision(dtype),
        WIDE=launch.is_wide(h, grad.q),
        EVEN_M=rows % config.block_m == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        UNROLL=config.unroll,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out, None if data is None else Partials(data, rows, config.block_m)
