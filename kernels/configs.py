"""Which tile each kernel uses for a shape where none was measured (choices.py): a heuristic.

The heuristic counts instructions and programs (inspect/sass.py, on an H100): the widest tile that
still leaves two programs for each multiprocessor, because a program's fixed cost (weights, border
masks, reductions) is spread over its rows, and a tile of all columns reads its rows once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import launch
from .integers import cdiv, next_power_of_2
from .launch import Config, Device, KernelError

# Activations whose derivatives take many registers.
SMOOTH_ACTS = ("silu", "gelu")

_PROGRAMS_PER_MULTIPROCESSOR = 2


def _block(size: int, largest: int, cost: int) -> int:
    """A power of two from 16 to ``largest`` to cut ``size`` in: little waste, few blocks.

    cost: of one more block, in elements.
    """
    blocks = [b for b in (128, 64, 32, 16) if b <= largest]
    return min(blocks, key=lambda b: cdiv(size, b) * (b + cost))


def _max_accumulators(dtype: torch.dtype, long_epilogue: bool) -> int:
    """Largest BLOCK_M * BLOCK_N: 64 accumulators a thread at 4 warps, or 32 where they would spill.

    That is where each element needs more registers: float32 operands and long epilogues.
    """
    return 128 * 32 if dtype == torch.float32 or long_epilogue else 128 * 64


def _conv_tiles(
    block_n: int, block_k: int, taps: int, columns: int, dtype: torch.dtype, accumulators: int
) -> Iterator[tuple[int, int]]:
    """(BLOCK_M, BLOCK_N) from the widest tile down, rows first."""
    # A narrow convolution is mostly weights, masks and channels' coefficients: twice the rows
    # share them.
    narrow = block_n == 16 and (taps > 1 or block_k == 16) and dtype != torch.float32
    block_m = min(256 if narrow else 128, accumulators // block_n)
    yield block_m, block_n
    if taps == 1 and columns <= 4 * block_n == 256 and block_m == 128:
        # As many programs as 64 x 64 gives, for fewer issue cycles and with half the epilogue of
        # each.
        yield block_m, block_n // 2
    while block_m > 64:
        block_m //= 2
        yield block_m, block_n
    while block_n > 16:
        block_n //= 2
        yield block_m, block_n


class ConvShape(NamedTuple):
    """What the tile of a convolution depends on, forward or dgrad.

    rows, columns: positions and channels of the result. channels: reduced over, for each of
    ``taps``. dtype: multiplied in. long_epilogue: needs registers beyond an affine and relu.

    The forward's other options are not among them, so that ``subtract`` convolves as the forward
    did: the walk back needs the same bits (kernels/README.md, "Forward").
    """

    rows: int
    channels: int
    columns: int
    taps: int
    dtype: torch.dtype
    long_epilogue: bool = False


def _exact(dtype: torch.dtype) -> bool:
    """Whether no matrix unit can multiply: float32 without TF32."""
    return dtype == torch.float32 and launch.input_precision(dtype) == "ieee"


def conv(shape: ConvShape, device: Device) -> Config:
    """The heuristic's tile."""
    return _conv(shape, device, _exact(shape.dtype))


@functools.cache
def _conv(shape: ConvShape, device: Device, exact: bool) -> Config:
    rows, channels, columns, taps, dtype, long_epilogue = shape
    block_n = _block(columns, 64, 16)
    if device.backend == "interpreter":
        block_m = min(512, max(16, next_power_of_2(rows)))
        return Config(block_m, block_n, _block(channels, 64, 8), num_stages=1)
    accumulators = _max_accumulators(dtype, long_epilogue)
    block_k = _block(channels, 32 if dtype == torch.float32 else 64, 8)
    if exact:
        # All of a tile's operands pass through registers.
        accumulators, block_n, block_k = 64 * 32, min(32, block_n), 16
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors
    tile = (64, 16)
    for tile in _conv_tiles(block_n, block_k, taps, columns, dtype, accumulators):
        if cdiv(rows, tile[0]) * cdiv(columns, tile[1]) >= wanted:
            break
    # Two steps' operands of the widest tile, read ahead, leave four warps no registers.
    crowded = tile[0] * tile[1] >= 128 * 64 and block_k >= 64
    unroll = True
    if device.matrix_unit not in ("wgmma", "tcgen05"):
        # Other matrix units take their operands out of registers, and compilers read those of
        # several unrolled steps ahead until they spill: only the narrow ones of a kernel's taps
        # leave room. The masks of taps beside wide ones need eight warps.
        wide = block_k * dtype.itemsize > 64
        unroll = taps > 1 and not wide
        crowded = crowded or (taps > 1 and wide and tile == (64, 64))
        if taps > 1 and wide and tile == (128, 64):
            tile = (64, 64)
    elif channels > block_k:
        # Taps that are unrolled inside of a loop keep a tile of tensor memory each: 9 * 64 of 512.
        unroll = taps == 1 or device.matrix_unit == "wgmma"
        # Beside a loop over blocks of channels, the masks of nine taps need eight warps.
        crowded = crowded or (taps > 1 and tile == (64, 64))
        if device.matrix_unit == "tcgen05" and crowded and tile == (128, 64):
            tile = (64, 64)
    return Config(*tile, block_k, 8 if crowded else 4, num_stages=1, unroll=unroll)


class BackwardShape(NamedTuple):
    """What the tile of a 1x1's two gradients depends on: (rows, K) by (rows, C).

    dtype: multiplied in. wide: whether h or the gradient is float32. add: whether a further
    gradient is added. smooth: whether the activation is one of ``SMOOTH_ACTS``.
    """

    rows: int
    k: int
    c: int
    dtype: torch.dtype
    wide: bool
    add: bool
    smooth: bool


def conv_backward(shape: BackwardShape, device: Device) -> Config | None:
    """The tile of a 1x1's two gradients in one launch, or None where each has its own.

    A program holds all K channels of its share of dW, by BLOCK_N of the C; what fits beside a
    block of rows without spills was found by compiling. Further blocks of columns read g again,
    from L2: at most four. Columns are the side that a matrix unit wants wide, if there are 64 of
    them, and K is otherwise. Two stages: rows are read a step ahead, into registers.
    """
    return _conv_backward(shape, device, _exact(shape.dtype))


@functools.cache
def _conv_backward(shape: BackwardShape, device: Device, exact: bool) -> Config | None:
    rows, k, c, _, wide, add, smooth = shape
    roomy = device.matrix_unit == "wgmma" and not wide and not smooth
    # wgmma and tcgen05 read at least one operand from shared memory, the others none.
    shared = device.matrix_unit in ("wgmma", "tcgen05") and not exact and not smooth
    ahead = not (add or smooth or exact or device.matrix_unit == "tcgen05")
    block_k = _block(k, 64, 8)
    if 64 <= c <= 256 and k <= (64 if shared else 32):
        block_m, block_n = (64 if roomy and k <= 32 else 32), 64
        if device.matrix_unit == "tcgen05" or (add and wide and not shared):
            # Beside tensor memory a thread has 128 registers.
            block_m = 16
        ahead = ahead and (roomy or k <= 32)
        wanted = _PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors
        while block_m > 16 and cdiv(rows, block_m) * cdiv(c, block_n) < wanted:
            block_m //= 2
    elif c <= 64 <= k <= (128 if wide or smooth else 256):
        block_m, block_n = 64, (32 if roomy and c > 16 and k <= 128 else 16)
        ahead = ahead and k <= 128 and not wide
        block_k = 32 if exact else block_k
    else:
        return None
    return Config(block_m, block_n, block_k, num_stages=2 if ahead else 1)


def row_splits(rows: int, c: int, config: Config, device: Device) -> tuple[int, int]:
    """Blocks of rows of ``conv_backward``, and how many ranges they are split into."""
    blocks = cdiv(rows, config.block_m)
    programs = _PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors
    return blocks, min(blocks, cdiv(programs, cdiv(c, config.block_n)))


def smaller(config: Config, times: int) -> Config:
    """The tile with every side halved ``times`` times, down to the 16 that ``tl.dot`` needs.

    For a device that cannot have ``config``.

    Raises:
        KernelError: that is the same tile as once less.
    """
    if times == 0:
        return config
    m, n, k = (max(16, side >> (times - 1)) for side in config[:3])
    if m == n == k == 16:
        raise KernelError("there is no smaller tile")
    return config._replace(
        block_m=max(16, m // 2),
        block_n=max(16, n // 2),
        block_k=max(16, k // 2),
        num_warps=4,
        num_stages=1,
    )
