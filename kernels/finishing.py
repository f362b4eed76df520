"""What the last program to arrive makes of what all have left: a norm's statistics or gradients.

``merging`` has the tickets and the sums. A norm over the batch is finished by the last program of
each block of channels. Over groups (``groups``) each image is merged by itself, by the last program
of its block of channels; the last of an image makes its groups' statistics or coefficients of
that, and, where the weight and bias are not each image's own, the last of a block of channels adds
up all images.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .groups import store_affine, sum_over_images, write_group_grad, write_group_stats
from .merging import arrive, merge_group_sums, merge_moments, merge_sums, store_moments


@triton.jit
def store_stats(stats_ptr, weight_ptr, bias_ptr, eps, mean, var, columns, known, C: tl.constexpr):
    """The (5, C) ``stats`` of a norm out of its batch's mean and variance."""
    rstd = tl.rsqrt(var + eps)
    store_affine(stats_ptr, C, weight_ptr, bias_ptr, mean, var, rstd, columns, known)


@triton.jit
def finish_moments(
    data_ptr,
    counters_ptr,
    weight_ptr,
    bias_ptr,
    stats_ptr,
    eps,
    M,
    tile_rows,
    group,
    tile,
    block,
    columns,
    known,
    C: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    kept_ptr=None,
    images=None,
    GROUP: tl.constexpr = None,
):
    """Behind a tile's ``store_moments``: statistics, by the last program of a block of channels.

    data: (tiles + groups, 3, C). counters: a block of channels has one for each group, and one.
    tile, block: this program's. group: ``group_size``.

    GROUP: a norm's over groups, for which there is an entry more in data, for the channels, and a
    counter more, for the blocks; pointers are at the image's own, M are its rows.
    """
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tiles = ((M - 1) // tile_rows + 1).to(tl.int32)
    groups = (tiles + group - 1) // group
    number = tile // group
    first = number * group
    blocks_counter_ptr = counters_ptr + COLUMN_BLOCKS * (groups + 1)
    counters_ptr += block * (groups + 1)
    if arrive(counters_ptr + number, tl.minimum(group, tiles - first)):
        begin = first.to(tl.int64) * tile_rows
        rows = tl.minimum(M - begin, group.to(tl.int64) * tile_rows)
        mean, m2, rest = merge_moments(
            data_ptr + first.to(tl.int64) * (3 * C),
            None,
            1.0 / rows.to(tl.float32),
            rows,
            tile_rows,
            tl.minimum(group, tiles - first),
            columns,
            known,
            C,
            3,
            BLOCK_TILES,
            BLOCK_C,
        )
        behind = data_ptr + tiles.to(tl.int64) * (3 * C)
        store_moments(behind + number * (3 * C), columns, known, mean, m2, rest, C)
        if arrive(counters_ptr + groups, groups):
            inverse = 1.0 / M.to(tl.float32)
            mean, m2, rest = merge_moments(
                behind,
                None,
                inverse,
                M,
                group.to(M.dtype) * tile_rows,
                groups,
                columns,
                known,
                C,
                3,
                BLOCK_TILES,
                BLOCK_C,
            )
            if GROUP is None:
                var = m2 * inverse
                store_stats(stats_ptr, weight_ptr, bias_ptr, eps, mean, var, columns, known, C)
            else:
                channels = behind + groups * (3 * C)
                store_moments(channels, columns, known, mean, m2, rest, C)
                if arrive(blocks_counter_ptr, COLUMN_BLOCKS):
                    write_group_stats(
                        channels,
                        kept_ptr,
                        stats_ptr,
                        weight_ptr,
                        bias_ptr,
                        eps,
                        M,
                        images,
                        C,
                        GROUP,
                    )


@triton.jit
def store_norm_grad(
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    stats_ptr,
    inverse,
    s1,
    s2,
    columns,
    known,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
):
    """The coefficients of a norm's backward and its own gradients; inverse: 1/M."""
    scale = tl.load(stats_ptr + 3 * C + columns, mask=known, other=0.0)
    mean = tl.load(stats_ptr + columns, mask=known, other=0.0)
    b = tl.zeros_like(s1)
    c = tl.zeros_like(s1)
    if TRAINING:
        b = s2 * inverse * tl.load(stats_ptr + 2 * C + columns, mask=known, other=0.0)
        c = s1 * inverse
    tl.store(coef_ptr + columns, scale, mask=known)
    tl.store(coef_ptr + C + columns, b, mask=known)
    tl.store(coef_ptr + 2 * C + columns, c, mask=known)
    tl.store(coef_ptr + 3 * C + columns, mean, mask=known)
    tl.store(dweight_ptr + columns, s2, mask=known)
    tl.store(dbias_ptr + columns, s1, mask=known)


@triton.jit
def write_norm_grad(
    data_ptr,
    stats_ptr,
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    tiles,
    groups,
    columns,
    known,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What the groups' sums give (``store_norm_grad``)."""
    behind = data_ptr + tiles.to(tl.int64) * (2 * C)
    s1, s2 = merge_sums(behind, groups, columns, known, C, BLOCK_TILES, BLOCK_C)
    inverse = 1.0 / M.to(tl.float32)
    store_norm_grad(
        coef_ptr, dweight_ptr, dbias_ptr, stats_ptr, inverse, s1, s2, columns, known, C, TRAINING
    )


@triton.jit
def finish_sums(
    data_ptr,
    counters_ptr,
    stats_ptr,
    coef_ptr,
    dweight_ptr,
    dbias_ptr,
    M,
    tiles,
    group,
    tile,
    block,
    columns,
    known,
    C: tl.constexpr,
    TRAINING: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    image=None,
    images=None,
    s2_ptr=None,
    s1_ptr=None,
    GROUP: tl.constexpr = None,
):
    """Behind a tile's ``store_sums``: coefficients, by the last program of a block of channels.

    data: (tiles + groups, 2, C). The rest as in ``finish_moments``.

    GROUP: a norm's over groups, with the sums s2 and s1 (N, C) of each image's channels; dweight
    and dbias are None where these are wanted themselves. data, stats and coef are at the
    image's own; counters are all images', and behind them those of the blocks.
    """
    COLUMN_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    groups = (tiles + group - 1) // group
    number = tile // group
    first = number * group
    stop = tl.minimum(first + group, tiles)
    if GROUP is not None:
        of_an_image = COLUMN_BLOCKS * (groups + 1) + 1
        images_counter_ptr = counters_ptr + images.to(tl.int64) * of_an_image + block
        counters_ptr += image * of_an_image
        blocks_counter_ptr = counters_ptr + COLUMN_BLOCKS * (groups + 1)
    counters_ptr += block * (groups + 1)
    if arrive(counters_ptr + number, stop - first):
        merge_group_sums(
            data_ptr, tiles, first, stop, number, columns, known, C, BLOCK_TILES, BLOCK_C
        )
        if arrive(counters_ptr + groups, groups):
            if GROUP is None:
                write_norm_grad(
                    data_ptr,
                    stats_ptr,
                    coef_ptr,
                    dweight_ptr,
                    dbias_ptr,
                    M,
                    tiles,
                    groups,
                    columns,
                    known,
                    C,
                    TRAINING,
                    BLOCK_TILES,
                    BLOCK_C,
                )
            else:
                behind = data_ptr + tiles.to(tl.int64) * (2 * C)
                s1, s2 = merge_sums(behind, groups, columns, known, C, BLOCK_TILES, BLOCK_C)
                tl.store(s2_ptr + image * C + columns, s2, mask=known)
                tl.store(s1_ptr + image * C + columns, s1, mask=known)
                if arrive(blocks_counter_ptr, COLUMN_BLOCKS):
                    write_group_grad(
                        coef_ptr,
                        s2_ptr + image * C,
                        s1_ptr + image * C,
                        stats_ptr,
                        M,
                        images,
                        C,
                        GROUP,
                    )
                if not (GROUP.WEIGHT_N and GROUP.BIAS_N):
                    if arrive(images_counter_ptr, images):
                        if dweight_ptr is not None:
                            sum_over_images(dweight_ptr, s2_ptr, images, columns, known, C, BLOCK_C)
                        if dbias_ptr is not None:
                            sum_over_images(dbias_ptr, s1_ptr, images, columns, known, C, BLOCK_C)
