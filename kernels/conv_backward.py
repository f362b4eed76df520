"""Both gradients of a 1x1 convolution in one launch, which reads g's operands and h once.

    dz[m, c] = sum over k of g[m, k] * weight[k, c]  (+ add[m, c])
    q        = dz * act'(u),     u = a*h + b           S1 = sum q,  S2 = sum q*xhat
    dW[k, c] = sum over m of g[m, k] * act(u)[m, c],   dbias[k] = sum over m of g[m, k]
    g        = A*(q' - C - B*(h' - mean))              (a norm's backward that still waits)

A program owns BLOCK_N of the C channels and a range of rows (split), over which it walks in blocks
of BLOCK_M. Per block it makes g, u and act(u) once: g is an operand of both products, u serves act
and act'. Its share of dW, all K channels by BLOCK_N, stays in registers until its rows are done,
and so do its S1 and S2. The last program of a group, and of all, merges both behind one ticket
(merging.py, products.py). It is the kernel of narrow convolutions: where K*BLOCK_N sums do not fit
into registers, conv_dgrad.py and conv_wgrad.py each read the operands (``configs.conv_backward``).

Bytes: g's operands, h and add once (further blocks of columns read g's again, through L2), q
written (0 without WRITE); 4*K*C bytes a split, and 8 a split and channel, are written and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs, recording
from .activations import activate, activation_grad, cast, dot, norm_gradient, operand, sums
from .checks import (
    check_activation,
    check_convolution,
    check_grad,
    check_per_channel,
)
from .conv_tile import read_weight
from .conv_wgrad import per_channel, read_block
from .finishing import write_norm_grad
from .integers import cdiv
from .launch import TRITON_DTYPES, Config, device_of, input_precision, is_wide, launch
from .merging import arrive, block_tiles, merge_group_sums, store_sums
from .norm_backward import place_of_sums
from .operands import Act, Geometry, Grad, NormGrads
from .products import merge_products, store_products, write_products


@triton.jit
def _beside(values, TRANSPOSED: tl.constexpr):
    """Values per channel as they stand beside a block of rows."""
    return values[:, None] if TRANSPOSED else values[None, :]


@triton.jit
def _turned(x, TRANSPOSED: tl.constexpr):
    """A block of rows, (BLOCK_M, BLOCK_N), or its transpose."""
    return tl.trans(x) if TRANSPOSED else x


@triton.jit
def _beside_product(x, product, TRANSPOSED: tl.constexpr):
    """A block of rows as it was read, held by the threads that hold a product of it."""
    x = _turned(x, TRANSPOSED)
    if TRANSPOSED:
        # Always so: what Triton moves between threads is x, and not what is made of it.
        x = tl.where((product == product) | (product != product), x, 0.0)
    return x


@triton.jit
def _read_rows(
    q_ptr,
    gh_ptr,
    h_ptr,
    step,
    M,
    columns,
    C: tl.constexpr,
    K: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """A block of rows of h, and tuples of blocks of q' and of h' (q' again where there is none)."""
    rows = step * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = (rows < M)[:, None]
    rows = rows.to(OFFSET)[:, None]
    mask = exists & (columns < C)[None, :]
    h = read_block(h_ptr, rows * C + columns[None, :], mask, not EVEN_M or C % BLOCK_N != 0)
    qs = ()
    ghs = ()
    for t in tl.static_range(BLOCKS):
        channels = t * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = exists & (channels < K)[None, :]
        offsets = rows * K + channels[None, :]
        q = read_block(q_ptr, offsets, mask, not EVEN_M or K % BLOCK_K != 0)
        gh = q
        if gh_ptr is not None:
            gh = read_block(gh_ptr, offsets, mask, not EVEN_M or K % BLOCK_K != 0)
        qs = qs + (q,)  # type: ignore[assignment] # noqa: RUF005
        ghs = ghs + (gh,)  # type: ignore[assignment] # noqa: RUF005
    return h, qs, ghs


@triton.jit(do_not_specialize=["M", "split_blocks", "longer_splits", "splits", "group"])
def _conv_backward_kernel(
    q_ptr,
    gh_ptr,
    coef_ptr,
    weight_ptr,
    h_ptr,
    stats_ptr,
    add_ptr,
    out_ptr,
    workspace_ptr,
    dweight_ptr,
    dbias_ptr,
    sums_ptr,
    counters_ptr,
    new_coef_ptr,
    dgamma_ptr,
    dbeta_ptr,
    slope,
    M,
    split_blocks,
    longer_splits,
    splits,
    group,
    stride_k,
    stride_c,
    CONV: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    AHEAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    C: tl.constexpr = CONV.C
    K: tl.constexpr = CONV.K
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    ODD_K: tl.constexpr = K % BLOCK_K != 0
    ODD_C: tl.constexpr = C % BLOCK_N != 0
    SWAP: tl.constexpr = not TRANSPOSED
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    SIZE: tl.constexpr = K * C if dbias_ptr is None else K * C + K

    block = tl.program_id(0) % COLUMN_BLOCKS
    split = tl.program_id(0) // COLUMN_BLOCKS
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    known = columns < C
    mean = per_channel(stats_ptr, columns, known, ODD_C)
    scale = per_channel(stats_ptr + 3 * C, columns, known, ODD_C)
    shift = per_channel(stats_ptr + 4 * C, columns, known, ODD_C)

    accs = ()
    biases = ()
    weights = ()
    for t in tl.static_range(BLOCKS):
        channels = t * BLOCK_K + tl.arange(0, BLOCK_K)
        tile = read_weight(weight_ptr, 0, 0, channels, columns, CONV, True, DTYPE, PRECISION)
        weights = weights + (_turned(tile, TRANSPOSED),)  # type: ignore[assignment] # noqa: RUF005
        if SWAP:
            accs = accs + (tl.zeros((BLOCK_K, BLOCK_N), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        else:
            accs = accs + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
        biases = biases + (tl.zeros((BLOCK_K,), tl.float32),)  # type: ignore[assignment] # noqa: RUF005
    # What one thread holds of a channel is added up at once, across threads only at the end.
    s1 = tl.zeros((BLOCK_N, 4) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    s2 = tl.zeros((BLOCK_N, 4) if TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)

    begin = split * split_blocks + tl.minimum(split, longer_splits)
    end = begin + split_blocks + (split < longer_splits).to(tl.int32)
    if AHEAD:
        next_h, next_qs, next_ghs = _read_rows(
            q_ptr, gh_ptr, h_ptr, begin, M, columns,
            C, K, OFFSET, EVEN_M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS,
        )  # fmt: skip
    for step in range(begin, end):
        rows = step * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = (rows < M)[:, None]
        mask = exists & known[None, :]
        offsets = rows.to(OFFSET)[:, None] * C + columns[None, :]
        if AHEAD:
            h = next_h
            qs = next_qs
            ghs = next_ghs
            # Into registers. After the last step there is none: it is read again, and dropped.
            next_h, next_qs, next_ghs = _read_rows(
                q_ptr, gh_ptr, h_ptr, tl.minimum(step + 1, end - 1), M, columns,
                C, K, OFFSET, EVEN_M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS,
            )  # fmt: skip
        else:
            h, qs, ghs = _read_rows(
                q_ptr, gh_ptr, h_ptr, step, M, columns,
                C, K, OFFSET, EVEN_M, BLOCK_M, BLOCK_N, BLOCK_K, BLOCKS,
            )  # fmt: skip
        if TRANSPOSED:
            dz = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        else:
            dz = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        gradients = ()
        new_biases = ()
        for t in tl.static_range(BLOCKS):
            channels = t * BLOCK_K + tl.arange(0, BLOCK_K)
            known_k = channels < K
            g = qs[t]
            if coef_ptr is not None:
                a = per_channel(coef_ptr, channels, known_k, ODD_K)
                if gh_ptr is not None:
                    b = per_channel(coef_ptr + K, channels, known_k, ODD_K)
                    c = per_channel(coef_ptr + 2 * K, channels, known_k, ODD_K)
                    center = per_channel(coef_ptr + 3 * K, channels, known_k, ODD_K)
                    g = norm_gradient(g, ghs[t], a, b, c, center)
                else:
                    g = norm_gradient(g, None, a, None, None, None)
                if not EVEN_M or ODD_K:
                    g = tl.where(exists & known_k[None, :], g, 0.0)
            bias = biases[t]  # type: ignore[var-annotated]
            if dbias_ptr is not None:
                bias += tl.sum(g.to(tl.float32), axis=0)
            new_biases = new_biases + (bias,)  # type: ignore[assignment] # noqa: RUF005
            g = operand(g, DTYPE, PRECISION)
            gradients = gradients + (g,)  # type: ignore[assignment] # noqa: RUF005
            if TRANSPOSED:
                dz = dot(weights[t], tl.trans(g), dz, PRECISION)
            else:
                dz = dot(g, weights[t], dz, PRECISION)
        biases = new_biases

        h = _beside_product(h, dz, TRANSPOSED)
        h = h.to(tl.float32)
        u = h * _beside(scale, TRANSPOSED) + _beside(shift, TRANSPOSED)
        if add_ptr is not None:
            add = read_block(add_ptr, offsets, mask, not EVEN_M or ODD_C)
            dz += _beside_product(add, dz, TRANSPOSED).to(tl.float32)
        q = activation_grad(dz, u, slope, ACT)
        if out_ptr is not None:
            stored = cast(q, out_ptr.dtype.element_ty)
            tl.store(out_ptr + offsets, _turned(stored, TRANSPOSED), mask=mask)
            q = stored.to(tl.float32)
        if not EVEN_M:
            q = tl.where(_turned(exists, TRANSPOSED), q, 0.0)
        of_q = q
        of_qh = q * (h - _beside(mean, TRANSPOSED))
        if TRANSPOSED:
            # Matrix units leave two neighbours of every eight with one thread.
            of_q = tl.reshape(of_q, (BLOCK_N, BLOCK_M // 8, 4, 2))
            of_qh = tl.reshape(of_qh, (BLOCK_N, BLOCK_M // 8, 4, 2))
            of_q, of_qh = sums(of_q, of_qh, 3)
            of_q, of_qh = sums(of_q, of_qh, 1)
        s1 += of_q
        s2 += of_qh

        z = activate(u, slope, ACT)
        if not EVEN_M:
            z = tl.where(_turned(exists, TRANSPOSED), z, 0.0)
        z = operand(z, DTYPE, PRECISION)

        new = ()
        for t in tl.static_range(BLOCKS):
            if TRANSPOSED:
                acc = dot(z, gradients[t], accs[t], PRECISION)
            else:
                acc = dot(tl.trans(gradients[t]), z, accs[t], PRECISION)
            new = new + (acc,)  # type: ignore[assignment] # noqa: RUF005
        accs = new

    k = tl.arange(0, BLOCK_K)
    store_products(
        workspace_ptr + split.to(tl.int64) * SIZE,
        accs,
        biases,
        dbias_ptr,
        k,
        columns,
        block == 0,
        K,
        C,
        BLOCK_K,
        0,
        BLOCKS,
        SWAP,
    )
    s1, s2 = sums(s1, s2, 1 if TRANSPOSED else 0)
    s2 *= per_channel(stats_ptr + 2 * C, columns, known, ODD_C)
    store_sums(sums_ptr + split.to(tl.int64) * (2 * C), s1, s2, columns, known, C)

    groups = (splits + group - 1) // group
    number = split // group
    first = number * group
    stop = tl.minimum(first + group, splits)
    counters_ptr += block * (groups + 1)
    if arrive(counters_ptr + number, stop - first):
        merge_products(
            workspace_ptr,
            workspace_ptr + (splits + number).to(tl.int64) * SIZE,
            dbias_ptr,
            first,
            stop,
            k,
            columns,
            block == 0,
            K,
            C,
            BLOCK_K,
            0,
            BLOCKS,
            SWAP,
            SIZE,
            AT_ONCE,
        )
        merge_group_sums(
            sums_ptr, splits, first, stop, number, columns, known, C, BLOCK_TILES, BLOCK_N
        )
        if arrive(counters_ptr + groups, groups):
            write_products(
                workspace_ptr,
                None,
                dweight_ptr,
                dbias_ptr,
                stride_k,
                stride_c,
                0,
                0,
                splits,
                splits + groups,
                k,
                columns,
                block == 0,
                CONV,
                BLOCK_K,
                0,
                BLOCKS,
                SWAP,
                SIZE,
                AT_ONCE,
            )
            write_norm_grad(
                sums_ptr,
                stats_ptr,
                new_coef_ptr,
                dgamma_ptr,
                dbeta_ptr,
                M,
                splits,
                groups,
                columns,
                known,
                C,
                TRAINING,
                BLOCK_TILES,
                BLOCK_N,
            )


class Gradients(NamedTuple):
    """q, or None where only its sums were asked for, what they give, and the convolution's own."""

    q: Tensor | None
    sums: NormGrads
    dweight: Tensor
    dbias: Tensor | None


def tile(
    grad: Grad,
    weight: Tensor,
    h: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    act: Act,
    add: Tensor | None,
) -> Config | None:
    """The tile that ``conv_backward`` takes, or None where each gradient has its own kernel."""
    k, c, *kernel_size = weight.shape
    if kernel_size != [1, 1] or geometry.stride != (1, 1) or geometry.padding != (0, 0):
        return None
    wide = torch.float32 in (h.dtype, grad.q.dtype)
    smooth = act.kind in configs.SMOOTH_ACTS
    rows = h.numel() // max(c, 1)
    shape = configs.BackwardShape(rows, k, c, dtype, wide, add is not None, smooth)
    return configs.conv_backward(shape, device_of(h))


def conv_backward(
    grad: Grad,
    weight: Tensor,
    h: Tensor,
    geometry: Geometry,
    *,
    dtype: torch.dtype,
    stats: Tensor,
    act: Act,
    add: Tensor | None = None,
    write: bool = True,
    training: bool = True,
    with_bias: bool = False,
    config: Config | None = None,
    smaller: int = 0,
) -> Gradients:
    """``conv_dgrad`` and ``conv_wgrad`` of act(a*h + b) in one launch, deterministic.

    Args:
        grad: of the convolution's output, (N, K, H, W), applied on load.
        weight: (K, C, 1, 1), any strides and dtype; gives dweight its shape, dtype and layout.
        h: (N, C, H, W), the norm's input. geometry: stride 1, no padding.
        dtype: of q and of the multiplications, which accumulate in float32.
        stats, act: (5, C), float32, the norm's statistics, and its activation.
        add: (N, C, H, W), a further gradient of act(a*h + b). write: whether q is, or only summed.
        training: whether ``stats`` depend on h.
        config: the tile; chosen by shape if None. smaller: times it is halved.

    Raises:
        KernelError: this device cannot have the tile, or there is none so small.
        NotImplementedError: for groups, dilation or asymmetric padding, or a dtype that no kernel
            multiplies in. ValueError: a shape or memory format is wrong, or the convolution is not
            1x1 at stride 1. TypeError: a dtype is.
    """
    conv = check_convolution(h, weight, geometry, dtype)
    n, c, height, width = h.shape
    if (conv.R, conv.S, *geometry.stride, *geometry.padding) != (1, 1, 1, 1, 0, 0):
        raise ValueError(
            "conv_backward expects a 1x1 kernel, stride 1 and no padding, "
            f"got {conv.R}x{conv.S}, {geometry}"
        )
    check_grad(grad, (n, conv.K, height, width))
    check_activation("h", h)
    check_per_channel("stats", stats, 5, c)
    if add is not None:
        check_activation("add", add, (n, c, height, width))
    rows = n * height * width
    if config is None:
        config = tile(grad, weight, h, geometry, dtype=dtype, act=act, add=add)
    if config is None:
        raise ValueError(f"no tile for a weight of {tuple(weight.shape)} in {dtype}")
    config = configs.smaller(config, smaller)

    q = None
    if write:
        q = torch.empty_like(h, dtype=dtype, memory_format=torch.channels_last)
    dweight = torch.empty_like(weight)
    dbias = torch.empty(conv.K, dtype=weight.dtype, device=weight.device) if with_bias else None
    blocks, splits = configs.row_splits(rows, c, config, device_of(h))
    place = place_of_sums(h, c, splits, config.block_n)
    size = conv.K * c + (conv.K if with_bias else 0)
    shares = splits + cdiv(splits, place.group)
    workspace = torch.empty((shares, size), dtype=torch.float32, device=h.device)
    data, counters, *grads = place.arguments
    recording.flops(4 * rows * conv.K * c)
    launch(
        _conv_backward_kernel,
        (cdiv(c, config.block_n) * splits,),
        grad.q,
        None if grad.coef is None else grad.h,
        grad.coef,
        weight,
        h,
        stats,
        add,
        q,
        workspace,
        dweight,
        dbias,
        data,
        counters,
        *grads,
        act.slope,
        rows,
        blocks // splits,
        blocks % splits,
        splits,
        place.group,
        *dweight.stride()[:2],
        CONV=conv,
        ACT=act.kind,
        TRAINING=training,
        DTYPE=TRITON_DTYPES[dtype],
        PRECISION=input_precision(dtype),
        WIDE=is_wide(h, grad.q),
        EVEN_M=rows % config.block_m == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        TRANSPOSED=config.block_n >= 64,
        AHEAD=config.num_stages > 1,
        AT_ONCE=max(1, min(8, 1024 * config.num_warps // (config.block_k * config.block_n))),
        BLOCK_TILES=block_tiles(place.group, config.block_n, config.num_warps),
        num_warps=config.num_warps,
        num_stages=1,
    )
    assert place.grads is not None
    return Gradients(q, place.grads, dweight, dbias)
