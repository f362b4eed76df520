"""Finished where it is produced: the last program of a launch to arrive merges what all have left.

Programs leave partial results in memory: moments of a tile of rows, sums of a norm's backward,
products of a range of rows. Each then draws a ticket, an integer counted up atomically, and the one
with the last ticket merges them, in the order in which they lie and not in that of arrival: the
same bits, every run. Groups of about the square root of all are merged first, each by its own last
program, so that what is left for the last of all is as short as a group. What a group gives lies
behind what the programs gave.

``arrive`` has a barrier on both sides: of the ticket's thread alone is known that its stores come
before it and its loads after it. What other programs wrote is read past L1, which keeps old values.
Counters are 0 when a kernel starts, and no other launch counts in them (``recording.counters``).

Moments of tiles, (mean, M2, rest): a tile's mean is ``mean + rest``, to twice float32's digits,
since M2 is of deviations from it, and a mean that is off by its own rounding would show in the
variance where |mean| >> std. Merging, exactly and seen from the first tile's mean o:

    offset_t = (mean_t - o) + rest_t,     mean = o + sum (n_t/n)*offset_t
    M2 = sum M2_t + n_t*(offset_t - offset)^2
"""

from __future__ import annotations

import triton
import triton.language as tl

from .integers import next_power_of_2

# Fewer than that are merged at once.
_SMALLEST_GROUP = 16


def group_size(partials: int) -> int:
    """How many neighbours are merged first, out of ``partials``."""
    size = next_power_of_2(partials)
    return max(_SMALLEST_GROUP, 1 << (size.bit_length() // 2))


def block_tiles(group: int, columns: int, num_warps: int) -> int:
    """BLOCK_TILES: how many partials of ``columns`` channels are merged side by side."""
    return max(1, min(group, 256 * num_warps // columns))


@triton.jit
def arrive(counter_ptr, programs):
    """Whether this is the last of ``programs`` to come here; it then sees what all have stored."""
    tl.debug_barrier()
    before = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == programs - 1


@triton.jit
def tile_counts(counts_ptr, tile, tiles, M, tile_rows):
    """How many rows each tile has: equally many but for the last one, or what ``counts`` says."""
    if counts_ptr is not None:
        return tl.load(counts_ptr + tile, mask=tile < tiles, other=0.0)
    else:
        return tl.minimum(M - tile.to(M.dtype) * tile_rows, tile_rows).to(tl.float32)


@triton.jit
def _offset(mean_ptr, mask, first, C: tl.constexpr, ROWS: tl.constexpr):
    """Tiles' means, with what their own roundings lost, seen from the first tile's."""
    mean = tl.load(mean_ptr, mask=mask, other=0.0, cache_modifier=".cg")
    offset = mean.to(tl.float32) - first[None, :]
    if ROWS == 3:
        offset += tl.load(mean_ptr + 2 * C, mask=mask, other=0.0, cache_modifier=".cg")
    return offset


@triton.jit
def merge_moments(
    data_ptr,
    counts_ptr,
    inverse,
    M,
    tile_rows,
    tiles,
    columns,
    known,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """mean, M2 and rest of ``tiles`` tiles, (BLOCK_C,) each; inverse: 1 over their rows.

    ROWS: of a tile's data, 3 or, where there is no rest, 2.
    """
    first = tl.load(data_ptr + columns, mask=known, other=0.0, cache_modifier=".cg").to(tl.float32)
    offset = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (ROWS * C) + columns[None, :]
        offset_t = _offset(data_ptr + at, mask, first, C, ROWS)
        count = tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        offset += tl.where(mask, offset_t * (count * inverse)[:, None], 0.0)
    offset = tl.sum(offset, axis=0)

    squares = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (ROWS * C) + columns[None, :]
        offset_t = _offset(data_ptr + at, mask, first, C, ROWS)
        m2 = tl.load(data_ptr + C + at, mask=mask, other=0.0, cache_modifier=".cg")
        count = tile_counts(counts_ptr, tile, tiles, M, tile_rows)
        delta = offset_t - offset[None, :]
        squares += tl.where(mask, m2.to(tl.float32) + delta * (delta * count[:, None]), 0.0)
    mean = first + offset
    return mean, tl.sum(squares, axis=0), offset - (mean - first)


@triton.jit
def store_moments(data_ptr, columns, known, mean, m2, rest, C: tl.constexpr):
    """Leave a tile's, or a group's, at ``data_ptr``."""
    tl.store(data_ptr + columns, mean, mask=known)
    tl.store(data_ptr + C + columns, m2, mask=known)
    tl.store(data_ptr + 2 * C + columns, rest, mask=known)


@triton.jit
def merge_sums(
    data_ptr,
    tiles,
    columns,
    known,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S1 and S2 of ``tiles`` tiles, (BLOCK_C,) each."""
    s1 = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    s2 = tl.zeros((BLOCK_TILES, BLOCK_C), tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
        tile = start + tl.arange(0, BLOCK_TILES)
        mask = (tile < tiles)[:, None] & known[None, :]
        at = tile[:, None] * (2 * C) + columns[None, :]
        s1 += tl.load(data_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
        s2 += tl.load(data_ptr + C + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    return tl.sum(s1, axis=0), tl.sum(s2, axis=0)


@triton.jit
def store_sums(
    data_ptr,
    s1,
    s2,
    columns,
    known,
    C: tl.constexpr,
):
    """Leave S1 and S2 of a tile, or of a group, at ``data_ptr``."""
    tl.store(data_ptr + columns, s1, mask=known)
    tl.store(data_ptr + C + columns, s2, mask=known)


@triton.jit
def merge_group_sums(
    data_ptr,
    tiles,
    first,
    stop,
    number,
    columns,
    known,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """S1 and S2 of the tiles [first, stop), left behind all tiles' as those of group ``number``."""
    s1, s2 = merge_sums(
        data_ptr + first.to(tl.int64) * (2 * C),
        stop - first,
        columns,
        known,
        C,
        BLOCK_TILES,
        BLOCK_C,
    )
    store_sums(data_ptr + (tiles + number).to(tl.int64) * (2 * C), s1, s2, columns, known, C)


@triton.jit
def add_up(data_ptr, at, mask, first, stop, SIZE: tl.constexpr, AT_ONCE: tl.constexpr):
    """The sum of elements ``at`` of the parts [first, stop), SIZE elements each, in their order."""
    total = tl.zeros(at.shape, tl.float32)
    data_ptr += first.to(tl.int64) * SIZE
    for start in range(first, stop, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            there = mask & (start + i < stop)
            total += tl.load(data_ptr + at, mask=there, other=0.0, cache_modifier=".cg")
            data_ptr += SIZE
    return total
