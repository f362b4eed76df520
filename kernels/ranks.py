"""Statistics over the rows of several processes (synchronised batch normalisation).

Each process reduces its own rows; what is exchanged per norm are 2C + 1 numbers in the forward
(mean, M2, number of rows) and 2C in the backward (S1, S2), gathered from all ranks and merged in
the order of the ranks on each of them: Chan et al. 1979 for the moments, sums for the rest. So
every rank computes the same bits, whatever algorithm a collective uses.

``Gather`` stands for the one collective that is needed: (k,) on each rank -> (ranks, k).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .operands import MEAN, VAR, Partials

Gather = Callable[[Tensor], Tensor]


class Ranks(NamedTuple):
    """What a synchronised norm's backward needs: the collective and the rows (1,) of all ranks."""

    gather: Gather
    total: Tensor


def gather_moments(stats: Tensor, rows: int, gather: Gather) -> tuple[Partials, Tensor]:
    """The ranks' moments as tiles, and each rank's number of rows, (ranks,).

    stats: (5, C), of this rank's ``rows`` rows alone.
    """
    mean, var = stats[MEAN], stats[VAR]
    packed = torch.cat((mean, var * rows, mean.new_full((1,), rows)))
    gathered = gather(packed)
    # A slice of rows is no contiguous tensor, which the kernels take.
    data = gathered[:, :-1].contiguous().view(-1, 2, mean.numel())
    # One tile a rank, as far as the tiling says; how many rows a tile has is on the device.
    return Partials(data, data.shape[0], 1), gathered[:, -1].contiguous()


def gather_sums(s1: Tensor, s2: Tensor, gather: Gather) -> Partials:
    """The ranks' sums S1 and S2, (C,) each, as tiles."""
    data = gather(torch.cat((s1, s2))).view(-1, 2, s1.numel())
    return Partials(data, data.shape[0], 1)
