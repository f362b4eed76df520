"""Which tile each kernel uses for a shape: a heuristic, and the few others worth timing.

The heuristic counts instructions and programs (kernels/sass.py, on an H100): the widest tile that
still leaves two programs for each multiprocessor, because a program's fixed cost (weights, border
masks, reductions) is spread over its rows, and a tile of all columns reads its rows once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from . import launch
from .launch import Config

_PROGRAMS_PER_MULTIPROCESSOR = 2
# Accumulators of a tile: 64 registers a thread at 4 warps, beyond which epilogues spill.
_MAX_ACCUMULATORS = 128 * 64


def _block(size: int, largest: int, cost: int) -> int:
    """A power of two from 16 to ``largest`` to cut ``size`` in: little waste, few blocks.

    cost: of one more block, in elements.
    """
    blocks = [b for b in (128, 64, 32, 16) if b <= largest]
    return min(blocks, key=lambda b: triton.cdiv(size, b) * (b + cost))


def _conv_tiles(rows: int, columns: int, block_n: int, taps: int) -> Iterator[tuple[int, int]]:
    """(BLOCK_M, BLOCK_N) from the widest tile down, rows first."""
    # A narrow 3x3 is mostly weights and masks: twice the rows share them.
    block_m = 256 if block_n == 16 and taps > 1 else 128
    yield block_m, block_n
    while block_m > 64:
        block_m //= 2
        yield block_m, block_n
    while block_n > 16:
        block_n //= 2
        yield block_m, block_n


def conv(rows: int, channels: int, columns: int, taps: int, dtype: torch.dtype) -> Config:
    """The tile of a convolution with ``rows`` x ``columns`` results, reducing over ``channels``."""
    block_n = _block(columns, 64, 16)
    if launch.INTERPRET:
        block_m = min(512, max(16, triton.next_power_of_2(rows)))
        return Config(block_m, block_n, _block(channels, 64, 8), num_stages=1)
    if dtype == torch.float32 and launch.input_precision(dtype) == "ieee":
        # No matrix unit multiplies float32 exactly: all of a tile's operands pass registers.
        return Config(64, min(32, block_n), 16, num_stages=1)
    block_k = _block(channels, 32 if dtype == torch.float32 else 64, 8)
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * launch.multiprocessors()
    tile = (64, 16)
    for tile in _conv_tiles(rows, columns, block_n, taps):
        if triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]) >= wanted:
            break
    return Config(*tile, block_k, num_stages=1)


def conv_candidates(
    rows: int, channels: int, columns: int, taps: int, dtype: torch.dtype
) -> list[Config]:
    """What the autotuner times for a convolution: the heuristic's tile first, then neighbours."""
    first = conv(rows, channels, columns, taps, dtype)
    m, n = first.block_m, first.block_n
    near = [(m // 2, n), (m * 2, n), (m, n // 2), (m, n * 2), (m * 2, n // 2), (m // 2, n * 2)]
    if launch.INTERPRET or (dtype == torch.float32 and launch.input_precision(dtype) == "ieee"):
        return [first]
    return [first] + [
        first._replace(block_m=m, block_n=n)
        for m, n in near
        if 64 <= m <= 256
        and 16 <= n <= min(64, triton.next_power_of_2(columns))
        and m * n <= _MAX_ACCUMULATORS
    ][:5]
