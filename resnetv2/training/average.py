"""The exponential moving average of a net's weights, updated without a question to the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

Tensors = tuple[Tensor, ...] | list[Tensor]


def averaged_model(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of ``model`` for ``Step`` to keep as the exponential moving average.

    model: as it lies on the device; one in DistributedDataParallel is taken out of it. Batch norm's
    running statistics are averaged with the weights' decay, not copied: the statistics that belong
    to averaged weights are, to first order, the average of those that belonged to the weights. What
    copying gives are those of the last weights, whose noise the average is meant to be rid of.

    The first n updates decay by less, (1 + n)/(10 + n), or a run of a few hundred steps would still
    be averaging its initial weights: the correction of timm's and TensorFlow's moving averages.

    Raises:
        ValueError: a decay outside [0, 1].
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], got {decay}")

    @torch.no_grad()
    def average(averages: Tensors, values: Tensors, updates: Tensor | int) -> None:
        part = 1.0 - torch.clamp(torch.as_tensor((1 + updates) / (10 + updates)), max=decay)
        differences = torch._foreach_sub(values, averages)
        torch._foreach_mul_(differences, part.to(averages[0].dtype))
        torch._foreach_add_(averages, differences)

    first = next(model.parameters())
    return AveragedModel(
        unwrapped(model), device=first.device, multi_avg_fn=average, use_buffers=True
    )


class Average:
    """``AveragedModel.update_parameters`` without its question to the device, which waits for it
    and cannot be captured; and ``num_batches_tracked`` copied, of which averaging makes a number
    that stands still."""

    def __init__(self, ema: AveragedModel, model: nn.Module) -> None:
        if ema.multi_avg_fn is None:
            raise ValueError("expected an AveragedModel with a multi_avg_fn, got one without")
        self.average = ema.multi_avg_fn
        device = next(model.parameters()).device
        ema.n_averaged = ema.n_averaged.to(device)
        self.count = ema.n_averaged
        self.started = int(self.count) > 0
        self.averaged: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        self.copied: tuple[list[Tensor], list[Tensor]] = ([], [])
        pairs = [
            *zip(ema.module.parameters(), model.parameters(), strict=True),
            *zip(ema.module.buffers(), model.buffers(), strict=True),
        ]
        for mine, theirs in pairs:
            lists = self.copied
            if mine.is_floating_point():
                lists = self.averaged.setdefault(mine.dtype, ([], []))
            lists[0].append(mine.detach())
            lists[1].append(theirs.detach())

    def update(self) -> None:
        for mine, theirs in self.averaged.values():
            if self.started:
                self.average(mine, theirs, self.count)
            else:
                torch._foreach_copy_(mine, theirs)
        if self.copied[0]:
            torch._foreach_copy_(*self.copied)
        self.started = True
        self.count.add_(1)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, or the model."""
    return model.module if isinstance(model, DistributedDataParallel) else model
