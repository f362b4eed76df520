"""A weight gradient's sums on their way from the programs that make them to the weight.

dW[k, j] is a sum over rows, and each range of rows (split) gives its share. A program holds a few
blocks of its split's share: block t has the output channels k + t*K_STEP and the columns
j + t*J_STEP of the im2col matrix, (r*S + s)*C + c. It lies as (j, k), or as (k, j) with SWAP: a
matrix unit's wide side comes first. Beside them stand the sums of g itself, for the bias.

``store_products`` leaves a share in the workspace, ``merge_products`` adds up those of a group of
splits, and ``write_products`` adds up the groups and writes the weight's gradient: each in the
order of the splits, behind the tickets of merging.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activations import cast
from .merging import add_up


@triton.jit
def _places(k, j, K: tl.constexpr, J: tl.constexpr, SWAP: tl.constexpr):
    """Where a block lies among a split's products, which of them exist, and their j and k."""
    if SWAP:
        j = j[None, :]
        row = k[:, None]
    else:
        j = j[:, None]
        row = k[None, :]
    return row * J + j, (row < K) & (j < J), j, row


@triton.jit
def store_products(
    own_ptr,
    accs,
    biases,
    dbias_ptr,
    k,
    j,
    first_columns,
    K: tl.constexpr,
    J: tl.constexpr,
    K_STEP: tl.constexpr,
    J_STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAP: tl.constexpr,
):
    """Leave a program's blocks and, if it has the first columns, its sums of g.

    accs: a tuple of BLOCKS blocks. biases: a tuple of sums of g, one for each block of channels,
    used where ``dbias_ptr`` asks for them.
    """
    for t in tl.static_range(BLOCKS):
        at, mask, _, _ = _places(k + t * K_STEP, j + t * J_STEP, K, J, SWAP)
        tl.store(own_ptr + at, accs[t], mask=mask)
    if dbias_ptr is not None:
        for t in tl.static_range(BLOCKS if K_STEP > 0 else 1):
            channels = k + t * K_STEP
            tl.store(own_ptr + K * J + channels, biases[t], (channels < K) & first_columns)


@triton.jit
def merge_products(
    workspace_ptr,
    own_ptr,
    dbias_ptr,
    first,
    stop,
    k,
    j,
    first_columns,
    K: tl.constexpr,
    J: tl.constexpr,
    K_STEP: tl.constexpr,
    J_STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAP: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The sums of the splits [first, stop), left at ``own_ptr``. SIZE: values of a split."""
    for t in tl.static_range(BLOCKS):
        at, mask, _, _ = _places(k + t * K_STEP, j + t * J_STEP, K, J, SWAP)
        tl.store(own_ptr + at, add_up(workspace_ptr, at, mask, first, stop, SIZE, AT_ONCE), mask)
    if dbias_ptr is not None:
        for t in tl.static_range(BLOCKS if K_STEP > 0 else 1):
            channels = k + t * K_STEP
            mask = (channels < K) & first_columns
            at = K * J + channels
            tl.store(own_ptr + at, add_up(workspace_ptr, at, mask, first, stop, SIZE, 8), mask)


@triton.jit
def write_products(
    workspace_ptr,
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    stride_k,
    stride_c,
    stride_r,
    stride_s,
    first,
    stop,
    k,
    j,
    first_columns,
    CONV: tl.constexpr,
    K_STEP: tl.constexpr,
    J_STEP: tl.constexpr,
    BLOCKS: tl.constexpr,
    SWAP: tl.constexpr,
    SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """The sums of [first, stop) in dweight (strides of its k, c, r, s) and dbias (K,).

    coef_ptr: coefficients whose first row A multiplies the sums, or None.
    """
    C: tl.constexpr = CONV.C
    K: tl.constexpr = CONV.K
    J: tl.constexpr = CONV.R * CONV.S * C
    for t in tl.static_range(BLOCKS):
        at, mask, column, row = _places(k + t * K_STEP, j + t * J_STEP, K, J, SWAP)
        total = add_up(workspace_ptr, at, mask, first, stop, SIZE, AT_ONCE)
        if coef_ptr is not None:
            total *= tl.load(coef_ptr + row, mask=row < K, other=0.0)
        offsets = row * stride_k + column % C * stride_c
        offsets += column // (C * CONV.S) * stride_r + column // C % CONV.S * stride_s
        tl.store(dweight_ptr + offsets, cast(total, dweight_ptr.dtype.element_ty), mask)
    if dbias_ptr is not None:
        for t in tl.static_range(BLOCKS if K_STEP > 0 else 1):
            channels = k + t * K_STEP
            mask = (channels < K) & first_columns
            total = add_up(workspace_ptr, K * J + channels, mask, first, stop, SIZE, 8)
            if coef_ptr is not None:
                total *= tl.load(coef_ptr + channels, mask=channels < K, other=0.0)
            tl.store(dbias_ptr + channels, cast(total, dbias_ptr.dtype.element_ty), mask)
