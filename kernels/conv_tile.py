"""The main loop that conv_forward and conv_dgrad share: one tile of an implicit GEMM.

A tile is BLOCK_M rows (positions n, y, x of the result, flattened) times BLOCK_N columns (channels
of the result). It reduces over the kernel's R*S taps and, within a tap, over the source's channels
in blocks of BLOCK_K:

    acc[m, j] = sum over (r, s), i of  operand[n, sy, sx, i] * weight[j, i, r, s]

    forward               sy = y*stride - padding + r
    dgrad (TRANSPOSED)    sy = (y + padding - r) / stride, where that divides

and likewise in x. CLASSED, all rows of a tile leave the same remainders of (y + padding) / stride
and of x's, and only the taps with those remainders are visited. A position outside the source
contributes 0: the *operand* is 0 there, so the mask comes after the prologue (act(b) must not leak
into the border). PROLOGUE says how the operand is made of what is read:

    none      x                           an activation or a gradient, as it lies there
    act       act(a*x + b)                a, b: rows SCALE and SHIFT of ``stats``
    affine    A*x                         a norm's backward with running statistics
    affine_h  A*(x - C - B*(h - mean))    a norm's backward with batch statistics

Weights are read in their own dtype through their strides and rounded in registers. What one step
(a tap of a block of channels) multiplies is read a step ahead, into registers, so that its latency
hides behind the multiplication before it. With UNROLL, taps are unrolled, which makes their offsets
immediates, and so are few blocks of channels.
Shapes and weight strides are constants (CONV, an ``operands.Convolution``): divisions become shifts
or multiplications, and the compiler sees where 16 bytes can be read at once. Only the number of
rows is a run-time argument.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import activate, dot, norm_gradient, operand


@triton.jit
def _source_rows(rows, r, s, CONV: tl.constexpr, TRANSPOSED: tl.constexpr, CLASSED: tl.constexpr):
    """Which row of the source each of ``rows`` reads at tap (r, s), and whether it exists."""
    if TRANSPOSED:
        x = rows % CONV.W
        y = rows // CONV.W % CONV.H
        image = rows // (CONV.W * CONV.H)
        far_y = y + (CONV.PADDING_H - r)
        far_x = x + (CONV.PADDING_W - s)
        sy = far_y // CONV.STRIDE_H
        sx = far_x // CONV.STRIDE_W
        inside = (far_y >= 0) & (sy < CONV.P) & (far_x >= 0) & (sx < CONV.Q)
        if CONV.STRIDE_H > 1 and not CLASSED:
            inside &= far_y % CONV.STRIDE_H == 0
        if CONV.STRIDE_W > 1 and not CLASSED:
            inside &= far_x % CONV.STRIDE_W == 0
        position = (image * CONV.P + sy) * CONV.Q + sx
    else:
        x = rows % CONV.Q
        y = rows // CONV.Q % CONV.P
        image = rows // (CONV.Q * CONV.P)
        sy = y * CONV.STRIDE_H + (r - CONV.PADDING_H)
        sx = x * CONV.STRIDE_W + (s - CONV.PADDING_W)
        inside = (sy >= 0) & (sy < CONV.H) & (sx >= 0) & (sx < CONV.W)
        position = (image * CONV.H + sy) * CONV.W + sx
    return position, inside


@triton.jit
def _next_of_class(r, s, first_r, first_s, CONV: tl.constexpr):
    """The tap after (r, s), the first one after the last, and whether it was that."""
    s += CONV.STRIDE_W
    r = tl.where(s >= CONV.S, r + CONV.STRIDE_H, r)
    s = tl.where(s >= CONV.S, first_s, s)
    wraps = r >= CONV.R
    return tl.where(wraps, first_r, r), s, wraps.to(tl.int32)


@triton.jit
def _read(
    source_ptr,
    position,
    inside,
    channels,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MASKED: tl.constexpr,
):
    """(BLOCK_M, BLOCK_K) elements at rows ``position``, 0 where not ``inside`` (if MASKED)."""
    pointers = source_ptr + (position[:, None] * CHANNELS + channels[None, :])
    if CHANNELS % BLOCK_K != 0:
        x = tl.load(pointers, mask=inside[:, None] & (channels < CHANNELS)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        x = tl.load(pointers)
    return x


@triton.jit
def read_weight(
    weight_ptr,
    r,
    s,
    channels,
    columns,
    CONV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(BLOCK_K, BLOCK_N) weights in DTYPE; neighbouring threads read along the smaller stride."""
    CHANNELS: tl.constexpr = CONV.K if TRANSPOSED else CONV.C
    COLUMNS: tl.constexpr = CONV.C if TRANSPOSED else CONV.K
    STRIDE_CHANNEL: tl.constexpr = CONV.STRIDE_WK if TRANSPOSED else CONV.STRIDE_WC
    STRIDE_COLUMN: tl.constexpr = CONV.STRIDE_WC if TRANSPOSED else CONV.STRIDE_WK
    weight_ptr += r * CONV.STRIDE_WR + s * CONV.STRIDE_WS
    known = (channels < CHANNELS)[:, None] & (columns < COLUMNS)[None, :]
    offsets = channels[:, None] * STRIDE_CHANNEL + columns[None, :] * STRIDE_COLUMN
    if STRIDE_CHANNEL < STRIDE_COLUMN:
        weight = tl.load(weight_ptr + tl.trans(offsets), mask=tl.trans(known), other=0.0)
        tile = tl.trans(operand(weight, DTYPE, PRECISION))
    else:
        weight = tl.load(weight_ptr + offsets, mask=known, other=0.0)
        tile = operand(weight, DTYPE, PRECISION)
    return tile


@triton.jit
def _prologue(
    x,
    h,
    coef_ptr,
    inside,
    channels,
    slope,
    CHANNELS: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    MASKED: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The operand in DTYPE out of what was read."""
    z = x
    if PROLOGUE != "none":
        known = channels < CHANNELS
        if PROLOGUE == "act":
            scale = tl.load(coef_ptr + 3 * CHANNELS + channels, mask=known, other=0.0)
            shift = tl.load(coef_ptr + 4 * CHANNELS + channels, mask=known, other=0.0)
            z = activate(x.to(tl.float32) * scale[None, :] + shift[None, :], slope, ACT)
        else:
            a = tl.load(coef_ptr + channels, mask=known, other=0.0)
            if PROLOGUE == "affine_h":
                b = tl.load(coef_ptr + CHANNELS + channels, mask=known, other=0.0)
                c = tl.load(coef_ptr + 2 * CHANNELS + channels, mask=known, other=0.0)
                center = tl.load(coef_ptr + 3 * CHANNELS + channels, mask=known, other=0.0)
                z = norm_gradient(x, h, a, b, c, center)
            else:
                z = norm_gradient(x, None, a, None, None, None)
        if MASKED:
            z = tl.where(inside[:, None], z, 0.0)
    return operand(z, DTYPE, PRECISION)


@triton.jit
def conv_tile(
    source_ptr,
    h_ptr,
    coef_ptr,
    weight_ptr,
    rows,
    columns,
    first_r,
    first_s,
    slope,
    CONV: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    CLASSED: tl.constexpr,
    PROLOGUE: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """acc (BLOCK_M, BLOCK_N), float32.

    rows: (BLOCK_M,) indices into the result's N*P*Q positions, N*H*W if TRANSPOSED, all valid
        (clamped), int32 or, where an offset can pass 2**31, int64. columns: (BLOCK_N,) channels of
        the result. first_r, first_s: CLASSED, the first tap of the rows' class, else 0.
    """
    CHANNELS: tl.constexpr = CONV.K if TRANSPOSED else CONV.C
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = CONV.R * CONV.S
    PADDED: tl.constexpr = CONV.PADDING_H + CONV.PADDING_W > 0
    SAME_ROWS: tl.constexpr = TAPS * CONV.STRIDE_H * CONV.STRIDE_W == 1 and not PADDED
    # Without padding, every position that a forward convolution reads exists.
    MASKED: tl.constexpr = not SAME_ROWS and (TRANSPOSED or PADDED)
    # Unrolled, float32 spills without matrix units (ieee), and with a prologue at every tap.
    STRAIGHT: tl.constexpr = UNROLL and (
        DTYPE.primitive_bitwidth < 32 or (PRECISION != "ieee" and (TAPS == 1 or PROLOGUE == "none"))
    )
    UNROLL_TAPS: tl.constexpr = TAPS if STRAIGHT and TAPS <= 25 and not CLASSED else 1
    UNROLL_BLOCKS: tl.constexpr = BLOCKS if STRAIGHT and TAPS * BLOCKS <= 16 else 1

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    position = rows
    inside = rows >= 0
    if not SAME_ROWS:
        position, inside = _source_rows(rows, first_r, first_s, CONV, TRANSPOSED, CLASSED)
    channels = tl.arange(0, BLOCK_K)
    x = _read(source_ptr, position, inside, channels, CHANNELS, BLOCK_K, MASKED)
    h = x
    if PROLOGUE == "affine_h":
        h = _read(h_ptr, position, inside, channels, CHANNELS, BLOCK_K, MASKED)
    weight = read_weight(
        weight_ptr, first_r, first_s, channels, columns, CONV, TRANSPOSED, DTYPE, PRECISION
    )
    taps = TAPS
    if CLASSED:
        r = first_r
        s = first_s
        taps = (CONV.R - 1 - first_r) // CONV.STRIDE_H + 1
        taps *= (CONV.S - 1 - first_s) // CONV.STRIDE_W + 1
    for block in tl.range(0, BLOCKS, num_stages=1, loop_unroll_factor=UNROLL_BLOCKS):
        for tap in tl.range(0, taps, num_stages=1, loop_unroll_factor=UNROLL_TAPS):
            this_x = x
            this_h = h
            this_inside = inside
            this_weight = weight
            this_channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
            if TAPS * BLOCKS > 1:
                # After the last step there is none: a step is read again, and dropped.
                if CLASSED:
                    r, s, wraps = _next_of_class(r, s, first_r, first_s, CONV)
                else:
                    next_tap = (tap + 1) % TAPS
                    wraps = (tap + 1) // TAPS
                    r = next_tap // CONV.S
                    s = next_tap % CONV.S
                next_block = tl.minimum(block + wraps, BLOCKS - 1)
                if not SAME_ROWS:
                    position, inside = _source_rows(rows, r, s, CONV, TRANSPOSED, CLASSED)
                channels = next_block * BLOCK_K + tl.arange(0, BLOCK_K)
                x = _read(source_ptr, position, inside, channels, CHANNELS, BLOCK_K, MASKED)
                h = x
                if PROLOGUE == "affine_h":
                    h = _read(h_ptr, position, inside, channels, CHANNELS, BLOCK_K, MASKED)
                weight = read_weight(
                    weight_ptr, r, s, channels, columns, CONV, TRANSPOSED, DTYPE, PRECISION
                )
            this_x = _prologue(
                this_x,
                this_h,
                coef_ptr,
                this_inside,
                this_channels,
                slope,
                CHANNELS,
                PROLOGUE,
                ACT,
                MASKED,
                DTYPE,
                PRECISION,
            )
            acc = dot(this_x, this_weight, acc, PRECISION)
    return acc
