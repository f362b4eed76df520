"""Running statistics, moved as ``torch.nn.BatchNorm2d`` moves them, a whole chain at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from .norms import channels_of, groups_of


def _as_versions_were(running: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Move running statistics as ATen's batch norm does, which counts no version of them: a norm
    may run fused and by itself in one graph, which has saved them."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    return _unsafe_preserve_version_counter(tuple(running))


class BufferUpdate:
    """How the buffers of a chain's norms move, prepared once for calls with the same norms.

    Args:
        norms: of a chain, in order.
        rows_at: N*H*W of this process at each norm. images: N, where there are group norms.
        synced: numbers of the norms whose statistics are those of all ranks.
    """

    def __init__(
        self,
        norms: Sequence[nn.Module],
        rows_at: Sequence[int | None],
        synced: Sequence[int] = (),
        images: int = 0,
    ) -> None:
        self._synced = synced
        self._sizes: list[int] = []
        for norm in norms:
            channels, groups = channels_of(norm), groups_of(norm)
            # Mean, variance and the rest; of a group norm nothing moves.
            moving = [channels, channels, 3 * channels]
            self._sizes += [2 * images * groups, 0, 0] if groups else moving
        # By momentum, number of rows and time: running means and variances, and their norms'
        # numbers. The rows go by their place in ``levels``, since as a key they would fix a dynamic
        # batch size under torch.compile.
        moved: dict[tuple[float, int, int], tuple[list[Tensor], list[Tensor], list[int]]] = {}
        levels: list[int | None] = []
        counters: dict[int, list[Tensor]] = {}
        # Norms without a momentum, whose statistics are averages over all batches.
        self._cumulative: list[tuple[Any, int, int | None]] = []
        # A norm that a chain runs several times moves once after the other.
        times: dict[int, int] = {}
        for number, norm in enumerate(norms):
            if not isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                continue
            if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
                continue
            assert norm.running_var is not None
            rows = None if number in synced else rows_at[number]
            if norm.momentum is None:
                if norm.num_batches_tracked is not None:
                    self._cumulative.append((norm, number, rows))
                continue
            time = times[id(norm)] = times.get(id(norm), -1) + 1
            if norm.num_batches_tracked is not None:
                counters.setdefault(time, []).append(norm.num_batches_tracked)
            if not levels or rows != levels[-1]:
                levels.append(rows)
            key = (norm.momentum, len(levels) - 1, time)
            means, variances, numbers = moved.setdefault(key, ([], [], []))
            means.append(norm.running_mean)
            variances.append(norm.running_var)
            numbers.append(number)
        self._counters = list(counters.values())
        self._moved = [
            (momentum, levels[level], [*means, *variances], numbers)
            for (momentum, level, _), (means, variances, numbers) in moved.items()
        ]

    def apply(self, stats: Tensor) -> None:
        """Move running statistics and ``num_batches_tracked`` as torch.nn.BatchNorm2d does.

        stats: flat, as ``execution.forward`` gives them.
        """
        if not (self._moved or self._cumulative):
            return
        sizes = [*self._sizes, *([len(self._synced)] if self._synced else [])]
        parts = list(stats.detach().split(sizes))
        if self._synced:
            # How many rows all ranks have is on the device: the unbiased variance is taken there.
            totals = parts.pop()
            unbiased = torch._foreach_mul(
                [parts[3 * i + 1] for i in self._synced], list((totals / (totals - 1)).unbind())
            )
            for i, var in zip(self._synced, unbiased):
                parts[3 * i + 1] = var
        with torch.no_grad():
            for tracked in self._counters:
                torch._foreach_add_(tracked, 1)
            for momentum, rows, running, numbers in self._moved:
                batch = [parts[3 * i + 1] for i in numbers]
                if rows is not None:
                    batch = list(torch._foreach_mul(batch, rows / (rows - 1)))
                batch = [*[parts[3 * i] for i in numbers], *batch]
                if any(r.dtype != stats.dtype for r in running):
                    batch = [b.to(r.dtype) for b, r in zip(batch, running)]
                # running + momentum*(batch - running) rounds once at the size of the result, the
                # form (1 - momentum)*running + momentum*batch twice.
                with _as_versions_were(running):
                    torch._foreach_lerp_(running, batch, momentum)
            for norm, number, rows in self._cumulative:
                mean, var = parts[3 * number], parts[3 * number + 1]
                norm.num_batches_tracked.add_(1)
                weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
                var = var if rows is None else var * (rows / (rows - 1))
                with _as_versions_were([norm.running_mean, norm.running_var]):
                    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
                    norm.running_var.lerp_(var.to(norm.running_var.dtype), weight)
