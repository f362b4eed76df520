"""z = act(a*h + b) per channel, written once: a convolution's prologue on its own.

For the shapes at which a 3x3 convolution would drown in instructions if it applied the prologue at
each of nine taps (kernels/README.md, "What the compiler says"): this kernel writes z, and the
convolution reads it nine times from cache. Bytes: h read, z written, 2w in the compute dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import activate, cast
from .checks import check_activation, check_floating, check_rows
from .launch import device_of, launch
from .operands import Act
from .tiling import block_offsets, program_image, program_tile, row_tiling


@triton.jit
def write_z(
    program,
    h_ptr,
    stats_ptr,
    stats_row,
    z_ptr,
    slope,
    M,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One block of z; stats_row: elements from one row of ``stats`` to the next."""
    tile, columns = program_tile(program, C, BLOCK_C)
    base, offsets, mask, _ = block_offsets(tile, M, columns, C, BLOCK_M, BLOCK_C)
    z = tl.load(h_ptr + base + offsets, mask=mask, other=0.0).to(tl.float32)
    if stats_ptr is not None:
        known = columns < C
        scale = tl.load(stats_ptr + 3 * stats_row + columns, mask=known, other=0.0)
        shift = tl.load(stats_ptr + 4 * stats_row + columns, mask=known, other=0.0)
        z = activate(z * scale[None, :] + shift[None, :], slope, ACT)
    tl.store(z_ptr + base + offsets, cast(z, z_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "images"])
def _norm_act_kernel(
    h_ptr,
    stats_ptr,
    z_ptr,
    slope,
    M,
    images,
    C: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    row = C
    if images is not None:
        image, program = program_image(images)
        h_ptr += image * M * C
        z_ptr += image * M * C
        stats_ptr += image * C
        row = images * C
    write_z(program, h_ptr, stats_ptr, row, z_ptr, slope, M, C, ACT, BLOCK_M, BLOCK_C)


def norm_act(h: Tensor, stats: Tensor | None, act: Act, dtype: torch.dtype) -> Tensor:
    """z = act(a*h + b) in ``dtype``; ``stats=None`` means no prologue: h itself, cast.

    Args:
        h: (N, C, H, W), channels_last. stats: (5, C) or (5, N, C) float32, or None.

    Returns:
        (N, C, H, W), channels_last, always a new tensor.

    Raises:
        ValueError: a shape or memory format is wrong. TypeError: a dtype is.
    """
    check_activation("h", h)
    check_floating(dtype=dtype)
    channels = h.shape[1]
    images = None if stats is None else check_rows("stats", stats, 5, h)
    z = torch.empty_like(h, dtype=dtype, memory_format=torch.channels_last)
    if h.numel() == 0:
        return z
    rows = h.numel() // (channels * (images or 1))
    tiling = row_tiling(rows, channels, device_of(h), images=images)
    launch(
        _norm_act_kernel,
        tiling.grid,
        h,
        stats,
        z,
        act.slope,
        rows,
        images,
        C=channels,
        ACT=act.kind,
        BLOCK_M=tiling.block_m,
        BLOCK_C=tiling.block_c,
        num_warps=4,
    )
    return z
