"""Which tile each kernel uses for a shape: a heuristic, and the few others worth timing."""

from __future__ import annotations

import torch
import triton

from . import launch
from .launch import Config


def conv(rows: int, channels: int, columns: int, taps: int, dtype: torch.dtype) -> Config:
    """The tile of a convolution with ``rows`` x ``columns`` results, reducing over ``channels``."""
    block_n = max(16, min(64, triton.next_power_of_2(columns)))
    block_k = max(16, min(64, triton.next_power_of_2(channels)))
    return Config(256 if launch.INTERPRET else 128, block_n, block_k)
