"""Batch normalisation over the rows of all ranks: which norms, and the collective.

Children of the class ``torch.nn.SyncBatchNorm``, or ``SyncBatchNorm`` here, are honoured by the
fused path in training where a process group of more than one rank runs; their statistics are then
those of all ranks' rows (``kernels.ranks``), with one collective per norm in the forward and one in
the backward.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..kernels import recording, reference
from ..kernels.aten_engine import AtenEngine
from ..kernels.ranks import Gather, gather_sums
from .norms import BATCH_NORMS
from .statistics import BufferUpdate

# A chain's record is made of integers: a group goes by its place here, from 1. They are held, so
# that a number never comes to mean another group.
_groups: list[Any] = []


def group_number(norm: nn.Module) -> int:
    """The group over which a norm's statistics are to be taken now, or 0 for this process alone.

    As in ``torch.nn.SyncBatchNorm.forward``: in training only, and where there are other ranks.
    """
    if not isinstance(norm, (SyncBatchNorm, nn.SyncBatchNorm)) or not norm.training:
        return 0
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    group = norm.process_group or dist.group.WORLD
    if dist.get_world_size(group) < 2:
        return 0
    for number, known in enumerate(_groups, 1):
        if known is group:
            return number
    _groups.append(group)
    return len(_groups)


def gather_over(number: int) -> Gather:
    """The collective of a group: (k,) of each rank to (ranks, k), in the order of the ranks."""
    group = _groups[number - 1]

    def collect(values: Tensor) -> Tensor:
        ranks = dist.get_world_size(group)
        out = values.new_empty(ranks * values.numel())
        # PyTorch 2.13 renamed it.
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        if not values.is_meta:
            collective(out, values, group)
        return out.view(ranks, -1)

    return lambda values: recording.call(collect, values)


class SyncBatchNorm(nn.BatchNorm2d):
    """``torch.nn.SyncBatchNorm`` that runs on a CPU too: PyTorch's raises an error there, and so
    does DistributedDataParallel for any of its subclasses.

    Input (N, C, H, W). Parameters, buffers and state_dict are PyTorch's.

    Args:
        process_group: whose ranks share their statistics; None for all. Others as BatchNorm2d's.

    Raises:
        ValueError: an input without rows, where other ranks wait for its statistics.
    """

    def __init__(self, num_features: int, *args: Any, process_group: Any = None, **kwargs: Any):
        super().__init__(num_features, *args, **kwargs)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A copy over the same ranks: a process group cannot be copied."""
        memo[id(self)] = twin = type(self).__new__(type(self))
        if self.process_group is not None:
            memo[id(self.process_group)] = self.process_group
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def forward(self, input: Tensor) -> Tensor:
        number = group_number(self)
        if number == 0:
            return super().forward(input)
        self._check_input_dim(input)
        out, stats, total = _SyncedNorm.apply(input, self.weight, self.bias, self.eps, number)
        rows = input.numel() // input.shape[1]
        BufferUpdate([self], [rows], [0]).apply(torch.cat((stats.view(-1), total)))
        return out


class _SyncedNorm(torch.autograd.Function):
    """A norm by itself out of the steps of which a chain is made."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, number: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_rows(x)
        engine = AtenEngine()
        rows = x.numel() // x.shape[1]
        gather = gather_over(number)
        stats, total = engine.synced_stats(engine.rank_moments(x), rows, gather, weight, bias, eps)
        ctx.save_for_backward(x, weight, stats, total)
        ctx.number = number
        ctx.mark_non_differentiable(stats, total)
        return reference.affine(x, stats).to(x.dtype), stats, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight, stats, total = ctx.saved_tensors
        s1, s2 = reference.rank_gradient_sums(g, x, stats)
        sums = gather_sums(s1, s2, gather_over(ctx.number)).data.sum(0)
        dx = reference.norm_backward_of(g, x, stats, sums, total).to(x.dtype)
        # A gradient is an error where there is no weight or no bias.
        dweight = s2.to(stats.dtype if weight is None else weight.dtype)
        dbias = s1.to(dweight.dtype)
        wanted = ctx.needs_input_grad
        return dx, dweight if wanted[1] else None, dbias if wanted[2] else None, None, None


def check_rows(x: Tensor) -> None:
    """Raise where a rank has no rows: the others would wait for its share."""
    if x.numel() == 0:
        raise ValueError(
            f"synchronised norms need at least one image on every rank, got {tuple(x.shape)}"
        )


def convert_sync_batchnorm(module: nn.Module, process_group: Any = None) -> nn.Module:
    """``torch.nn.SyncBatchNorm.convert_sync_batchnorm``, with norms that run on a CPU too.

    Norms stay the objects that they are, with their parameters, buffers and hooks: only their class
    changes. ``module`` is returned.

    Args:
        module: a norm, or what holds BatchNorm2d or torch.nn.SyncBatchNorm at any depth.
        process_group: whose ranks share their statistics; None for all.

    Raises:
        TypeError: a norm computes something of its own, which a conversion would lose.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, BATCH_NORMS)]
    for norm in norms:
        own = type(norm).forward not in (
            *(kind.forward for kind in BATCH_NORMS),
            SyncBatchNorm.forward,
        )
        if own or hasattr(norm, "parametrizations"):
            raise TypeError(
                f"expected BatchNorm2d norms, got {type(norm).__name__}, which computes more: "
                "replace it by a norm and an activation before the conversion"
            )
    for norm in norms:
        norm.__class__ = SyncBatchNorm
        norm.process_group = process_group
    return module
