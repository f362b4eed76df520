"""g, the gradient of a norm's input, written: the last line of a norm's backward.

    g = A*(q - C - B*(h - mean)) (+ identity),     q = (dz + add) * act'(a*h + b)
    g = A*q - C - B*(h - mean) (+ identity)        of a norm over groups (groups.py)

In these forms nothing cancels where |mean| >> std. ``input_grad`` writes g, out of q or of dz.
``written_operands`` writes g and, of another row of blocks, the z that stands beside it in a weight
gradient.

Bytes: q or dz, h (and add, identity) are read, g (and z) written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activation_grad, cast, norm_gradient
from .checks import check_activation, check_floating, check_grad, check_per_channel
from .launch import device_of, launch
from .norm_act import write_z
from .operands import IDENTITY, Act, Grad
from .tiling import block_offsets, program_image, program_tile, row_tiling


@triton.jit
def _write_g(
    program,
    q_ptr,
    add_ptr,
    h_ptr,
    stats_ptr,
    coef_ptr,
    identity_ptr,
    g_ptr,
    row,
    slope,
    M,
    C: tl.constexpr,
    GROUPED: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of g; with ``stats_ptr``, q_ptr holds dz.

    row: elements from one row of ``stats`` and of ``coef`` to the next. GROUPED: whether these are
    of a norm over groups.
    """
    tile, columns = program_tile(program, C, BLOCK_C)
    base, offsets, mask, _ = block_offsets(tile, M, columns, C, BLOCK_M, BLOCK_C)
    known = columns < C
    g = tl.load(q_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if h_ptr is not None:
        h = tl.load(h_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        if add_ptr is not None:
            g += tl.load(add_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(stats_ptr + 3 * row + columns, mask=known, other=0.0)
        shift = tl.load(stats_ptr + 4 * row + columns, mask=known, other=0.0)
        g = activation_grad(g, h * scale[None, :] + shift[None, :], slope, ACT)
    if coef_ptr is not None:
        a = tl.load(coef_ptr + columns, mask=known, other=0.0)
        if TRAINING:
            b = tl.load(coef_ptr + row + columns, mask=known, other=0.0)
            c = tl.load(coef_ptr + 2 * row + columns, mask=known, other=0.0)
            center = tl.load(coef_ptr + 3 * row + columns, mask=known, other=0.0)
            if GROUPED:
                # A weight of 0 hides no sum of its group's others: A is not factored out.
                g = norm_gradient(g * a[None, :], h, None, b, c, center)
            else:
                g = norm_gradient(g, h, a, b, c, center)
        else:
            g = norm_gradient(g, None, a, None, None, None)
    if identity_ptr is not None:
        g += tl.load(identity_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + base + offsets, cast(g, g_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "images"])
def _input_grad_kernel(
    q_ptr,
    add_ptr,
    h_ptr,
    stats_ptr,
    coef_ptr,
    identity_ptr,
    g_ptr,
    slope,
    M,
    images,
    C: tl.constexpr,
    ACT: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    row = C
    GROUPED: tl.constexpr = images is not None
    if GROUPED:
        image, program = program_image(images)
        before = image * M * C
        q_ptr += before
        h_ptr += before
        g_ptr += before
        if add_ptr is not None:
            add_ptr += before
        if identity_ptr is not None:
            identity_ptr += before
        if stats_ptr is not None:
            stats_ptr += image * C
        if coef_ptr is not None:
            coef_ptr += image * C
        row = images * C
    _write_g(
        program,
        q_ptr,
        add_ptr,
        h_ptr,
        stats_ptr,
        coef_ptr,
        identity_ptr,
        g_ptr,
        row,
        slope,
        M,
        C,
        GROUPED,
        ACT,
        TRAINING,
        BLOCK_M,
        BLOCK_C,
    )


@triton.jit(do_not_specialize=["g_rows", "z_rows", "g_programs"])
def _operands_kernel(
    q_ptr,
    add_ptr,
    gh_ptr,
    g_stats_ptr,
    coef_ptr,
    identity_ptr,
    g_ptr,
    g_slope,
    g_rows,
    h_ptr,
    stats_ptr,
    z_ptr,
    slope,
    z_rows,
    g_programs,
    K: tl.constexpr,
    G_ACT: tl.constexpr,
    TRAINING: tl.constexpr,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Z: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    if program < g_programs:
        _write_g(
            program,
            q_ptr,
            add_ptr,
            gh_ptr,
            g_stats_ptr,
            coef_ptr,
            identity_ptr,
            g_ptr,
            K,
            g_slope,
            g_rows,
            K,
            False,
            G_ACT,
            TRAINING,
            BLOCK_G,
            BLOCK_K,
        )
    else:
        program -= g_programs
        write_z(program, h_ptr, stats_ptr, C, z_ptr, slope, z_rows, C, ACT, BLOCK_Z, BLOCK_C)


def _tensors(grad: Grad) -> tuple[Tensor | None, ...]:
    """``_write_g``'s, in order: q or dz, add, h, stats, coef."""
    q, h, coef, z = grad
    if z is not None:
        return q, z.add, z.h, z.stats, coef
    return q, None, None if coef is None else h, None, coef


def _kind(grad: Grad) -> tuple[Act, bool]:
    """The activation whose derivative is missing, and whether B and C are not 0."""
    return IDENTITY if grad.z is None else grad.z.act, grad.h is not None


def input_grad(
    grad: Grad, identity: Tensor | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """g (``Grad``) (+ identity), written: a norm's dx, or an operand.

    Args:
        grad: q (N, C, H, W), channels_last, with h and coef or without; or dz, with z.
        identity: the identity path's gradient, (N, C, H, W), added untouched, or None.
        dtype: of the result, q's if None.

    Returns:
        (N, C, H, W), channels_last, always a new tensor.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    images = check_grad(grad)
    q = grad.q
    dtype = q.dtype if dtype is None else dtype
    check_floating(dtype=dtype)
    if identity is not None:
        check_activation("identity", identity, tuple(q.shape))
    g = torch.empty_like(q, dtype=dtype, memory_format=torch.channels_last)
    if q.numel() == 0:
        return g
    channels = q.shape[1]
    rows = q.numel() // (channels * (images or 1))
    tiling = row_tiling(rows, channels, device_of(q), images=images)
    act, training = _kind(grad)
    launch(
        _input_grad_kernel,
        tiling.grid,
        *_tensors(grad),
        identity,
        g,
        act.slope,
        rows,
        images,
        C=channels,
        ACT=act.kind,
        TRAINING=training,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        num_warps=4,
    )
    return g


def written_operands(
    grad: Grad, h: Tensor, stats: Tensor, act: Act, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``input_grad(grad, None, dtype)`` and ``norm_act(h, stats, act, dtype)`` in one launch.

    What a convolution's backward reads where it has no prologues: g of its output, z of its input.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    if check_grad(grad) is not None:
        raise ValueError("grad must have coefficients per channel, got some per image")
    check_activation("h", h)
    check_floating(dtype=dtype)
    q = grad.q
    k, c = q.shape[1], h.shape[1]
    check_per_channel("stats", stats, 5, c)
    if q.numel() == 0 or h.numel() == 0:
        raise ValueError(f"expected rows to write, got {tuple(q.shape)} and {tuple(h.shape)}")
    g, z = (torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last) for x in (q, h))
    g_rows, z_rows = q.numel() // k, h.numel() // c
    of_g, of_z = (row_tiling(m, n, device_of(q)) for m, n in ((g_rows, k), (z_rows, c)))
    g_act, training = _kind(grad)
    launch(
        _operands_kernel,
        (of_g.grid[0] + of_z.grid[0],),
        *_tensors(grad),
        None,
        g,
        g_act.slope,
        g_rows,
        h,
        stats,
        z,
        act.slope,
        z_rows,
        of_g.grid[0],
        K=k,
        G_ACT=g_act.kind,
        TRAINING=training,
        C=c,
        ACT=act.kind,
        BLOCK_G=of_g.block_m,
        BLOCK_K=of_g.block_c,
        BLOCK_Z=of_z.block_m,
        BLOCK_C=of_z.block_c,
        num_warps=4,
    )
    return g, z
