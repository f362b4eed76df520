"""Shapes and dtypes inside a chain, without running it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .chain import stream_dtypes
from .spec import Spec


class Shape(NamedTuple):
    """Shape and dtype of a tensor that need not exist."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.size)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def empty(self, device: torch.device, memory_format: torch.memory_format) -> Tensor:
        return torch.empty(self.size, dtype=self.dtype, device=device, memory_format=memory_format)


def chain_shapes(
    spec: Spec, size: Sequence[int], dtype: torch.dtype, params: Sequence[Tensor]
) -> list[list[Shape]]:
    """Each unit's h_0..h_k for an input of ``size`` (N, C, H, W) and ``dtype``."""
    result = []
    h = Shape(tuple(size), torch.float32 if spec.wide else dtype)
    for unit, at, natural in zip(spec.units, spec.positions, stream_dtypes(spec, dtype)[1:]):
        hs = [h]
        for i, conv in enumerate(unit.convs):
            out_channels, _, r, s = params[at.conv_weight[i]].shape
            n, _, *image = h.size
            last = torch.float32 if spec.wide else natural
            height, width = conv.geometry.output_size((image[0], image[1]), (r, s))
            h = Shape(
                (n, out_channels, height, width),
                last if i == len(unit.convs) - 1 else spec.dtype,
            )
            hs.append(h)
        result.append(hs)
    return result
