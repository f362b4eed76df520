"""The tiling of every elementwise kernel and of the reductions over rows beside them.

A program owns ``steps`` blocks of BLOCK_M rows by BLOCK_C channels, and there is a program for each
tile and channel block, however few channels there are. Rows are all of a batch's pixels, or, where
what a kernel reads or sums differs from image to image, an image's: no tile then holds rows of two,
and the programs of an image lie side by side.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import triton
import triton.language as tl

from .integers import cdiv, next_power_of_2
from .launch import Device

# Elements of one block: 16 a thread at 4 warps, two 16-byte loads of each 16-bit tensor in flight.
# With more, the longest activations spill.
BLOCK_ELEMENTS = 2048
MAX_TILES = 1024
# Of an image's tiles, at least.
TILE_ROWS = 32


class RowTiling(NamedTuple):
    """How a (rows, channels) matrix is cut: ``tiles`` of ``steps`` blocks, all channel blocks.

    grid: of all images.
    """

    block_m: int
    block_c: int
    steps: int
    tiles: int
    grid: tuple[int]


@functools.cache
def row_tiling(
    rows: int,
    channels: int,
    device: Device,
    max_tiles: int | None = None,
    elements: int = BLOCK_ELEMENTS,
    images: int | None = None,
) -> RowTiling:
    """The tiling for a (rows, channels) matrix; at most ``max_tiles`` tiles if given.

    Blocks have at most ``elements``, of images half as many. images: how many such matrices there
    are, if no tile is to hold rows of two; ``max_tiles`` are then all images', rounded up to whole
    tiles of each.

    Blocks are wide enough for 16-byte loads and narrow enough that multiples of 16 channels waste
    no lane; they shrink until every multiprocessor has four programs, or two where each program
    also pays for a reduction (``max_tiles``).
    """
    whole = channels & -channels if channels % 16 == 0 else next_power_of_2(channels)
    block_c = min(whole, 64)
    column_blocks = cdiv(channels, block_c)
    wanted = (4 if max_tiles is None else 2) * device.multiprocessors
    if images is not None:
        # An image's own addresses and values per channel take registers.
        elements = min(elements // 2, next_power_of_2(rows) * block_c)
        wanted = cdiv(wanted, images)
        max_tiles = None if max_tiles is None else cdiv(max_tiles, images)
    while elements > 1024 and cdiv(rows, elements // block_c) * column_blocks < wanted:
        elements //= 2
    block_m = elements // block_c
    blocks = cdiv(rows, block_m)
    steps = 1 if max_tiles is None else cdiv(blocks, max_tiles)
    if images is not None and max_tiles is not None:
        # What a tile leaves is a fraction of what it reads, as long as there are programs enough.
        while steps * block_m < TILE_ROWS and cdiv(blocks, 2 * steps) * column_blocks >= wanted:
            steps *= 2
    tiles = cdiv(blocks, steps)
    return RowTiling(block_m, block_c, steps, tiles, ((images or 1) * tiles * column_blocks,))


@triton.jit
def program_image(images):
    """Of ``images`` that of a program, 64-bit, and the program's number within it."""
    programs = tl.num_programs(0) // images
    return (tl.program_id(0) // programs).to(tl.int64), tl.program_id(0) % programs


@triton.jit
def program_tile(program, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """A program's tile and channels; neighbouring programs share rows, and so cache lines."""
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    columns = program % COLUMN_BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return program // COLUMN_BLOCKS, columns


@triton.jit
def block_offsets(block, M, columns, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where block number ``block`` of BLOCK_M rows lies: base, offsets from it, mask, valid rows.

    The base is 64-bit, the offsets inside a block need only 32.
    """
    row = block.to(tl.int64) * BLOCK_M
    valid = tl.minimum(M - row, BLOCK_M).to(tl.int32)
    local = tl.arange(0, BLOCK_M)
    mask = (local < valid)[:, None]
    if C % BLOCK_C != 0:
        mask = mask & (columns < C)[None, :]
    return row * C, local[:, None] * C + columns[None, :], mask, valid


@triton.jit
def tile_steps(tile, M, steps, BLOCK_M: tl.constexpr):
    """The tile's first block and its number of blocks: the last tile may have fewer."""
    first = tile * steps
    return first, tl.minimum(steps, (M + BLOCK_M - 1) // BLOCK_M - first).to(tl.int32)
