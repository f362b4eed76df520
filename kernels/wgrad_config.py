"""Which tile the weight gradient uses for a shape (conv_wgrad.py).

Chosen by counting instructions, registers and programs on sm_90 (inspect/sass.py). Wider
tiles apply the prologues less often; narrower ones leave a smaller workspace for the same number of
programs, two for each multiprocessor.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .integers import cdiv, next_power_of_2
from .launch import Device, KernelError
from .operands import Geometry

_PROGRAMS_PER_MULTIPROCESSOR = 2


class WgradConfig(NamedTuple):
    """BLOCK_M rows at a time; a program owns j_tiles blocks of block_j columns by block_k."""

    block_m: int
    block_k: int
    block_j: int
    j_tiles: int
    num_warps: int
    num_stages: int

    def tiles(self, k: int, j: int) -> int:
        """Programs that share a range of rows."""
        return cdiv(k, self.block_k) * cdiv(j, self.block_j * self.j_tiles)

    def splits(self, rows: int, k: int, j: int, device: Device) -> tuple[int, int]:
        """Blocks of BLOCK_M rows, and how many ranges they are split into."""
        blocks = cdiv(rows, self.block_m)
        return blocks, min(blocks, cdiv(_programs(device), self.tiles(k, j)))

    def workspace(
        self, rows: int, k: int, j: int, with_bias: bool, device: Device
    ) -> tuple[int, int]:
        """Shape of the float32 sums that are added up in the end: splits, values of each."""
        return self.splits(rows, k, j, device)[1], k * j + (k if with_bias else 0)

    def steps(self, rows: int, k: int, j: int, device: Device) -> float:
        """Blocks of rows that a program walks over, on average, if there are enough programs."""
        return cdiv(rows, self.block_m) * self.tiles(k, j) / _programs(device)

    def smaller(self, times: int) -> WgradConfig:
        """The tile with every side halved ``times`` times, down to the 16 that ``tl.dot`` needs.

        For a device that cannot have this one.

        Raises:
            KernelError: that is the same tile as once less.
        """
        if times == 0:
            return self
        m, k, j = (max(16, side >> (times - 1)) for side in self[:3])
        if m == k == j == 16 and (times > 1 or self.j_tiles == 1):
            raise KernelError("there is no smaller tile")
        return WgradConfig(max(16, m // 2), max(16, k // 2), max(16, j // 2), 1, 4, 1)


def _programs(device: Device) -> int:
    return _PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors


@functools.cache
def wgrad_config(
    rows: int,
    k: int,
    j: int,
    device: Device,
    *,
    dtype: torch.dtype,
    stream: torch.dtype,
    prologue: bool,
    same_rows: bool,
    pointwise: bool,
    plain_gradient: bool = False,
) -> WgradConfig:
    """The tile for a (rows, K) gradient and a (rows, J) im2col matrix.

    Args:
        dtype, stream: of the multiplication, and of h as it is read.
        prologue: whether either operand has one. plain_gradient: the gradient has none, and is
            multiplied in the dtype that it is read in.
        pointwise: the kernel is 1x1. same_rows: and it reads the rows that it writes (stride 1).
    """
    # Border masks beside a prologue's coefficients, or float32 beside masks, are registers: with
    # more rows at a time, compilers for some GPUs spill.
    crowded = not same_rows and (prologue or (stream == torch.float32 and not pointwise))
    # Where h alone passes through registers, Triton copies the gradient into one buffer while wgmma
    # still reads it; ptxas notices (C7515) and waits after each wgmma, copies and all.
    stages = 1 if prologue and plain_gradient and device.matrix_unit == "wgmma" else 2
    block_k = min(max(next_power_of_2(k), 16), 64)
    block_j = min(max(next_power_of_2(j), 16), 64)
    if dtype == torch.float32:
        return WgradConfig(16 if crowded else 32, block_k, block_j, 1, 4, 1)
    # One side fills wgmma's 64 rows, if need be with columns that are masked.
    if max(block_k, block_j) < 64:
        block_k, block_j = (64, block_j) if block_k > block_j else (block_k, 64)
    # Much to multiply: fewer reads of either operand, and a workspace that is small beside it.
    large = WgradConfig(64, 128, 128, 1, 8, stages)
    if j >= 128 and (k % 128 == 0 or k >= 512) and large.steps(rows, k, j, device) >= 8:
        return large
    if pointwise and max(k, j) <= 16 and not crowded:
        # Three quarters of one side are padding; more rows at a time carry its cost.
        config = WgradConfig(128, block_k, block_j, 1, 4, 1)
    elif prologue and k >= 64 and j >= 256:
        config = WgradConfig(32, 64, 128, 1, 4, stages)
    elif prologue or pointwise or k > 32:
        config = WgradConfig(32 if crowded else 64, block_k, block_j, 1, 4, stages)
    else:
        # Without pipelining the taps are read through L1, which asynchronous copies bypass, and
        # a program that walks over several taps finds them there.
        j_tiles = min(cdiv(j, block_j), 3 if j <= 192 else 2)
        config = WgradConfig(32 if crowded else 64, block_k, block_j, j_tiles, 4, 1)
    while config.block_m > 16 and config.steps(rows, k, j, device) < 1:
        config = config._replace(block_m=config.block_m // 2)
    # A loop of a step or two is over before a pipeline is filled.
    return config if config.steps(rows, k, j, device) > 2 else config._replace(num_stages=1)


def config_of(
    rows: int,
    weight: Sequence[int],
    geometry: Geometry,
    device: Device,
    *,
    dtype: torch.dtype,
    stream: torch.dtype,
    prologue: bool,
    plain_gradient: bool = False,
) -> WgradConfig:
    """``wgrad_config`` of a convolution: its ``rows`` of results and its weight's (K, C, R, S)."""
    k, c, r, s = weight
    pointwise = r * s == 1
    return wgrad_config(
        rows,
        k,
        r * s * c,
        device,
        dtype=dtype,
        stream=stream,
        prologue=prologue,
        same_rows=pointwise and tuple(geometry.stride) == (1, 1) and not any(geometry.padding),
        pointwise=pointwise,
        plain_gradient=plain_gradient,
    )
