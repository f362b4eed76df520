"""A convolution's weight gradient, with both operands made on load.

    dW[k, c, r, s] = sum over rows m = (n, p, q) of  g[m, k] * z[n, p*stride - padding + r, ..., c]
    g = A*(q - C - B*(h' - mean))  (a norm's backward that still waits)
    z = act(a*h + b)               (0 at the border)

As a matrix product, dW = Z^T g with Z the (rows, J) im2col matrix whose column j = (r*S + s)*C + c
lies at a constant distance from the row's first element, so it is read from h in place. Several
taps of a narrow h so stand side by side in one block of columns, wide enough for wgmma, whose M
side is 64: a program computes J_TILES blocks of BLOCK_J columns by BLOCK_K output channels for a
range of rows, and reads g once for all of them. wgmma's M side is J, or K where BLOCK_J is narrower
than 64 (SWAP).

Each range of rows (split) writes its float32 sums to a workspace (splits, K*J [+ K]), and the last
program of a tile adds the splits in their order and writes dW in the weight's dtype and strides,
and dbias = sum of g (products.py). A is one number for each k: it multiplies sums, and not rows.

Bytes: q, h' and h are read once from memory (once more from L2 for each further block of columns or
channels, and for each tap), and 4*K*J bytes a split are written and read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import recording
from .activations import activate, dot, norm_gradient, operand
from .checks import check_activation, check_convolution, check_grad, check_per_channel
from .integers import cdiv
from .launch import TRITON_DTYPES, device_of, input_precision, is_wide, launch
from .merging import arrive, group_size
from .operands import IDENTITY, Act, Geometry, Grad
from .products import merge_products, store_products, write_products
from .wgrad_config import WgradConfig, config_of


@triton.jit
def per_channel(values_ptr, channels, known, MASKED: tl.constexpr):
    """values[channels], 0 for channels that are not known."""
    if MASKED:
        return tl.load(values_ptr + channels, mask=known, other=0.0)
    else:
        return tl.load(values_ptr + channels)


@triton.jit
def read_block(pointer, offsets, mask, MASKED: tl.constexpr):
    """Elements of a block of rows, 0 where the mask says that there is none (MASKED)."""
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        return tl.load(pointer + offsets)


@triton.jit(do_not_specialize=["M", "split_blocks", "longer_splits", "splits", "group"])
def _conv_wgrad_kernel(
    q_ptr,
    gh_ptr,
    coef_ptr,
    h_ptr,
    stats_ptr,
    workspace_ptr,
    counters_ptr,
    dweight_ptr,
    dbias_ptr,
    slope,
    M,
    split_blocks,
    longer_splits,
    splits,
    group,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    CONV: tl.constexpr,
    ACT: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr,
    J_TILES: tl.constexpr,
    SWAP: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    C: tl.constexpr = CONV.C
    K: tl.constexpr = CONV.K
    J: tl.constexpr = CONV.R * CONV.S * C
    J_GROUPS: tl.constexpr = (J + BLOCK_J * J_TILES - 1) // (BLOCK_J * J_TILES)
    K_BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SAME_SIZE: tl.constexpr = (
        CONV.STRIDE_H * CONV.STRIDE_W == 1 and CONV.P == CONV.H and CONV.Q == CONV.W
    )
    # A 1x1 convolution at stride 1 reads the row that it writes.
    SAME_ROWS: tl.constexpr = (
        CONV.R * CONV.S * CONV.STRIDE_H * CONV.STRIDE_W == 1
        and CONV.PADDING_H + CONV.PADDING_W == 0
    )
    OUTSIDE: tl.constexpr = -(1 << 29)
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    SIZE: tl.constexpr = K * J if dbias_ptr is None else K * J + K

    program = tl.program_id(0)
    j_group = program % J_GROUPS
    k = program // J_GROUPS % K_BLOCKS * BLOCK_K + tl.arange(0, BLOCK_K)
    split = program // (J_GROUPS * K_BLOCKS)
    known_k = k < K
    b = 0.0
    c = 0.0
    center = 0.0
    if gh_ptr is not None:
        b = per_channel(coef_ptr + K, k, known_k, K % BLOCK_K != 0)
        c = per_channel(coef_ptr + 2 * K, k, known_k, K % BLOCK_K != 0)
        center = per_channel(coef_ptr + 3 * K, k, known_k, K % BLOCK_K != 0)

    accs = ()
    for _ in tl.static_range(J_TILES):
        if SWAP:
            accs = accs + (tl.zeros((BLOCK_K, BLOCK_J), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        else:
            accs = accs + (tl.zeros((BLOCK_J, BLOCK_K), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    bias = tl.zeros((BLOCK_K,), tl.float32)

    begin = split * split_blocks + tl.minimum(split, longer_splits)
    end = begin + split_blocks + (split < longer_splits).to(tl.int32)
    for block in range(begin, end):
        # Unsigned, a division by a power of two is a shift.
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.uint32)
        valid = rows < M
        g_mask = valid[:, None]
        if K % BLOCK_K != 0:
            g_mask = g_mask & known_k[None, :]
        g_offsets = rows.to(OFFSET)[:, None] * K + k[None, :]
        masked: tl.constexpr = not EVEN_M or K % BLOCK_K != 0
        g = read_block(q_ptr, g_offsets, g_mask, masked)
        if gh_ptr is not None:
            gh = read_block(gh_ptr, g_offsets, g_mask, masked)
            g = norm_gradient(g, gh, None, b, c, center)
            if masked:
                g = tl.where(g_mask, g, 0.0)
        if dbias_ptr is not None:
            bias += tl.sum(g.to(tl.float32), axis=0)
        g = operand(g, DTYPE, PRECISION)

        if not SAME_ROWS:
            y = (rows // CONV.Q % CONV.P).to(tl.int32) * CONV.STRIDE_H - CONV.PADDING_H
            x = (rows % CONV.Q).to(tl.int32) * CONV.STRIDE_W - CONV.PADDING_W
            if not EVEN_M:
                # Far outside, so that the border's test says no for a row that does not exist.
                y = tl.where(valid, y, OUTSIDE)
        if SAME_SIZE:
            origin = rows.to(OFFSET) * C - (CONV.PADDING_H * CONV.W + CONV.PADDING_W) * C
        else:
            image = rows // (CONV.Q * CONV.P)
            origin = ((image.to(OFFSET) * CONV.H + y) * CONV.W + x) * C

        new = ()
        for t in tl.static_range(J_TILES):
            j = (j_group * J_TILES + t) * BLOCK_J + tl.arange(0, BLOCK_J)
            known = j < J
            channel = j % C
            mask = valid[:, None]
            if SAME_ROWS:
                offsets = origin[:, None] + j[None, :]
                mask = mask & known[None, :]
            else:
                r = tl.where(known, j // (C * CONV.S), OUTSIDE)
                s = j // C % CONV.S
                offsets = origin[:, None] + (r * (CONV.W * C) + j % (C * CONV.S))[None, :]
                # Unsigned, one comparison answers for both ends.
                inside_y = (y[:, None] + r[None, :]).to(tl.uint32) < CONV.H
                inside_x = (x[:, None] + s[None, :]).to(tl.uint32) < CONV.W
                mask = inside_y & inside_x
            if SAME_ROWS and EVEN_M and (t + 1) * BLOCK_J <= J - (J_GROUPS - 1) * J_TILES * BLOCK_J:
                z = tl.load(h_ptr + offsets)
            else:
                z = tl.load(h_ptr + offsets, mask=mask, other=0.0)
            if stats_ptr is not None:
                scale = per_channel(stats_ptr + 3 * C, channel, known, J % (BLOCK_J * J_TILES) != 0)
                shift = per_channel(stats_ptr + 4 * C, channel, known, J % (BLOCK_J * J_TILES) != 0)
                z = activate(z.to(tl.float32) * scale[None, :] + shift[None, :], slope, ACT)
                if not (SAME_ROWS and EVEN_M):
                    z = tl.where(mask, z, 0.0)
            z = operand(z, DTYPE, PRECISION)
            if SWAP:
                acc = dot(tl.trans(g), z, accs[t], PRECISION)
            else:
                acc = dot(tl.trans(z), g, accs[t], PRECISION)
            new = new + (acc,)  # type: ignore[assignment] # noqa: RUF005
        accs = new

    j = j_group * J_TILES * BLOCK_J + tl.arange(0, BLOCK_J)
    first_columns = j_group == 0
    store_products(
        workspace_ptr + split.to(tl.int64) * SIZE,
        accs,
        (bias,),
        dbias_ptr,
        k,
        j,
        first_columns,
        K,
        J,
        0,
        BLOCK_J,
        J_TILES,
        SWAP,
    )
    groups = (splits + group - 1) // group
    number = split // group
    first = number * group
    stop = tl.minimum(first + group, splits)
    counters_ptr += program % (J_GROUPS * K_BLOCKS) * (groups + 1)
    if arrive(counters_ptr + number, stop - first):
        merge_products(
            workspace_ptr,
            workspace_ptr + (splits + number).to(tl.int64) * SIZE,
            dbias_ptr,
            first,
            stop,
            k,
            j,
            first_columns,
            K,
            J,
            0,
            BLOCK_J,
            J_TILES,
            SWAP,
            SIZE,
            AT_ONCE,
        )
        if arrive(counters_ptr + groups, groups):
            write_products(
                workspace_ptr,
                coef_ptr,
                dweight_ptr,
                dbias_ptr,
                stride_k,
                stride_c,
                stride_r,
                stride_s,
                splits,
                splits + groups,
                k,
                j,
                first_columns,
                CONV,
                0,
                BLOCK_J,
                J_TILES,
                SWAP,
                SIZE,
                AT_ONCE,
            )


def conv_wgrad(
    grad: Grad,
    h: Tensor,
    weight: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor | None = None,
    act: Act = IDENTITY,
    with_bias: bool = False,
    config: WgradConfig | None = None,
    smaller: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """dweight = wgrad(act(a*h + b), g) and dbias = sum of g, in one launch, deterministic.

    Args:
        grad: of the convolution's output, (N, K, P, Q), applied on load.
        h: (N, C, H, W), the convolution's input before its prologue.
        weight: (K, C, R, S); gives dweight its shape, dtype and memory layout.
        dtype: of both operands of the multiplication; it accumulates in float32.
        stats, act: the prologue; ``stats=None`` means that h is the operand.
        config: the tile; chosen by shape (wgrad_config.py) if None. smaller: times it is halved.

    Returns:
        dweight like weight, dbias (K,) in weight's dtype or None.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
        NotImplementedError: groups, dilation or asymmetric padding, or a dtype that no kernel
            multiplies in.
        KernelError: this device cannot have the tile, or there is none so small.
    """
    # The kernel writes a gradient like the weight but does not read it: one for all of its layouts.
    conv = check_convolution(h, weight, geometry, dtype, reads_weight=False)
    check_activation("h", h)
    n, k = h.shape[0], conv.K
    check_grad(grad, (n, k, conv.P, conv.Q))
    q, gh, coef, _ = grad
    gh = None if coef is None else gh
    if stats is not None:
        check_per_channel("stats", stats, 5, conv.C)

    dweight = torch.empty_like(weight)
    dbias = torch.empty(k, dtype=weight.dtype, device=weight.device) if with_bias else None
    rows = n * conv.P * conv.Q
    j = conv.R * conv.S * conv.C
    if rows == 0:
        return dweight.zero_(), None if dbias is None else dbias.zero_()
    device = device_of(h)
    if config is None:
        config = config_of(
            rows,
            weight.shape,
            geometry,
            device,
            dtype=dtype,
            stream=h.dtype,
            prologue=stats is not None or gh is not None,
            plain_gradient=gh is None and q.dtype == dtype,
        )
    config = config.smaller(smaller)
    blocks, splits = config.splits(rows, k, j, device)
    _, size = config.workspace(rows, k, j, with_bias, device)
    group = group_size(splits)
    groups = cdiv(splits, group)
    workspace = torch.empty((splits + groups, size), dtype=torch.float32, device=h.device)
    counters = recording.counters(config.tiles(k, j) * (groups + 1), h.device)
    recording.flops(2 * rows * k * j)
    launch(
        _conv_wgrad_kernel,
        (config.tiles(k, j) * splits,),
        q,
        gh,
        coef,
        h,
        stats,
        workspace,
        counters,
        dweight,
        dbias,
        act.slope,
        rows,
        blocks // splits,
        blocks % splits,
        splits,
        group,
        *dweight.stride(),
        CONV=conv,
        ACT=act.kind,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=input_precision(dtype),
        WIDE=is_wide(h, q),
        EVEN_M=rows % config.block_m == 0,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_J=config.block_j,
        J_TILES=config.j_tiles,
        SWAP=config.block_j < 64 <= config.block_k,
        AT_ONCE=max(1, min(8, 1024 * config.num_warps // (config.block_k * config.block_j))),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dweight, dbias
