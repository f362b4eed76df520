"""The main loop that conv_forward and conv_dgrad share: one tile of an implicit GEMM.

A tile is BLOCK_M rows (positions n, y, x of the result, flattened) times BLOCK_N columns (channels
of the result). It reduces over the kernel's R*S taps and, within a tap, over the source's channels
in blocks of BLOCK_K:

    acc[m, j] = sum over (r, s), i of  operand[n, sy, sx, i] * weight[j, i, r, s]

    forward               sy = y*stride - padding + r
    dgrad (TRANSPOSED)    sy = (y + padding - r) / stride, where that divides

and likewise in x. A position outside the source contributes 0: the *operand* is 0 there, so the
mask comes after the prologue (act(b) must not leak into the border). PROLOGUE says how the operand
is made of what is read (design 2):

    none      x                           an activation or a gradient, as it lies there
    act       act(a*x + b)                a, b: rows SCALE and SHIFT of ``stats``
    affine    A*x                         a norm's backward with running statistics
    affine_h  A*x + B*h + C               a norm's backward with batch statistics

Weights are read in their own dtype through their strides and rounded in registers. Shapes are
constexpr: divisions by them become shifts or multiplications, and the compiler sees that channels
are aligned for 16-byte loads. Only the number of rows is a run-time argument.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import INTERPRET, activate, cast


@triton.jit
def operand_tile(
    source_ptr,
    h_ptr,
    coef_ptr,
    offsets,
    channels,
    inside,
    slope,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The (BLOCK_M, BLOCK_K) operand at the elements ``offsets``, after its prologue, in DTYPE.

    inside: (BLOCK_M, 1), False where a row's position is outside the source (read if MASKED).
    """
    known = channels < CHANNELS
    if CHANNELS % BLOCK_K == 0:
        if MASKED:
            x = tl.load(source_ptr + offsets, mask=inside, other=0.0)
        else:
            x = tl.load(source_ptr + offsets)
    else:
        x = tl.load(source_ptr + offsets, mask=inside & known[None, :], other=0.0)
    if PROLOGUE == "none":
        return cast(x, DTYPE)
    if PROLOGUE == "act":
        scale = tl.load(coef_ptr + 3 * CHANNELS + channels, mask=known, other=0.0)
        shift = tl.load(coef_ptr + 4 * CHANNELS + channels, mask=known, other=0.0)
        z = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], slope, ACT)
    else:
        a = tl.load(coef_ptr + channels, mask=known, other=0.0)
        z = x.to(tl.float32) * a[None, :]
        if PROLOGUE == "affine_h":
            b = tl.load(coef_ptr + CHANNELS + channels, mask=known, other=0.0)
            c = tl.load(coef_ptr + 2 * CHANNELS + channels, mask=known, other=0.0)
            if CHANNELS % BLOCK_K == 0:
                if MASKED:
                    h = tl.load(h_ptr + offsets, mask=inside, other=0.0)
                else:
                    h = tl.load(h_ptr + offsets)
            else:
                h = tl.load(h_ptr + offsets, mask=inside & known[None, :], other=0.0)
            z += h.to(tl.float32) * b[None, :] + c[None, :]
    if MASKED:
        z = tl.where(inside, z, 0.0)
    return cast(z, DTYPE)


@triton.jit
def conv_tile(
    source_ptr,
    h_ptr,
    coef_ptr,
    weight_ptr,
    rows,
    columns,
    stride_column,
    stride_channel,
    stride_r,
    stride_s,
    slope,
    CHANNELS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    SOURCE_HEIGHT: tl.constexpr,
    SOURCE_WIDTH: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N), float32.

    rows: (BLOCK_M,) indices into the result's N*HEIGHT*WIDTH positions, all valid (clamped), int32
        or, where an offset can pass 2**31, int64. columns: (BLOCK_N,) channels of the result.
    stride_*: of the weight, along the result's channels, the source's channels, and the taps.
    """
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    SAME_ROWS: tl.constexpr = (
        KERNEL_H * KERNEL_W == 1
        and STRIDE_H * STRIDE_W == 1
        and PADDING_H == 0
        and PADDING_W == 0
    )
    DIVIDE: tl.constexpr = TRANSPOSED and STRIDE_H * STRIDE_W > 1
    # Without padding, every position that a forward convolution reads exists.
    MASKED: tl.constexpr = (not SAME_ROWS) and (TRANSPOSED or PADDING_H + PADDING_W > 0)

    x = rows % WIDTH
    y = rows // WIDTH % HEIGHT
    image = rows // (WIDTH * HEIGHT)
    if TRANSPOSED:
        origin_y = y + PADDING_H
        origin_x = x + PADDING_W
    else:
        origin_y = y * STRIDE_H - PADDING_H
        origin_x = x * STRIDE_W - PADDING_W
    if SAME_ROWS:
        origin = rows
    elif DIVIDE:
        origin = image * (SOURCE_HEIGHT * SOURCE_WIDTH)
    else:
        origin = (image * SOURCE_HEIGHT + origin_y) * SOURCE_WIDTH + origin_x

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in tl.range(0, KERNEL_H * KERNEL_W * BLOCKS):
        tap = step // BLOCKS
        r = tap // KERNEL_W
        s = tap % KERNEL_W
        channels = step % BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
        if SAME_ROWS:
            inside = rows >= 0
            position = rows
        else:
            if DIVIDE:
                sy = (origin_y - r) // STRIDE_H
                sx = (origin_x - s) // STRIDE_W
                position = origin + sy * SOURCE_WIDTH + sx
                inside = (origin_y >= r) & (origin_x >= s)
                inside &= (origin_y - r) % STRIDE_H == 0
                inside &= (origin_x - s) % STRIDE_W == 0
                inside &= (sy < SOURCE_HEIGHT) & (sx < SOURCE_WIDTH)
            else:
                if TRANSPOSED:
                    sy = origin_y - r
                    sx = origin_x - s
                    position = origin - (r * SOURCE_WIDTH + s)
                else:
                    sy = origin_y + r
                    sx = origin_x + s
                    position = origin + (r * SOURCE_WIDTH + s)
                inside = (sy >= 0) & (sy < SOURCE_HEIGHT) & (sx >= 0) & (sx < SOURCE_WIDTH)
        operand = operand_tile(
            source_ptr,
            h_ptr,
            coef_ptr,
            position[:, None] * CHANNELS + channels[None, :],
            channels,
            inside[:, None],
            slope,
            CHANNELS,
            BLOCK_K,
            PROLOGUE,
            ACT,
            MASKED,
            DTYPE,
        )
        weight = tl.load(
            weight_ptr
            + (r * stride_r + s * stride_s)
            + channels[:, None] * stride_channel
            + columns[None, :] * stride_column,
            mask=(channels < CHANNELS)[:, None] & (columns < COLUMNS)[None, :],
            other=0.0,
        )
        weight = cast(weight, DTYPE)
        if INTERPRET:
            # The interpreter multiplies the bit patterns of bfloat16.
            acc = tl.dot(operand.to(tl.float32), weight.to(tl.float32), acc)
        else:
            acc = tl.dot(operand, weight, acc, input_precision=PRECISION)
    return acc
