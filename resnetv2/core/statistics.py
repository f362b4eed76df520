"""Running statistics, moved as ``torch.nn.BatchNorm2d`` moves them, a whole chain at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def update_buffers(
    norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm],
    stats: Tensor,
    rows_at: Sequence[int | None],
    synced: Sequence[int] = (),
) -> None:
    """Move running statistics and ``num_batches_tracked`` as torch.nn.BatchNorm2d does.

    Args:
        norms: of a chain, in order.
        stats: flat, as ``operators.chain_forward`` returns them.
        rows_at: N*H*W of this process at each norm.
        synced: numbers of the norms whose statistics are those of all ranks.
    """
    # By momentum, number of rows and time; the rows by their place in ``levels``, since as a key
    # they would fix a dynamic batch size under torch.compile.
    moved: dict[tuple[float, int, int], list[list[Tensor]]] = {}
    levels: list[int | None] = []
    counters: dict[int, list[Tensor]] = {}
    cumulative: list[tuple[Any, Tensor, Tensor, int | None]] = []
    # A norm that a chain runs several times moves once after the other.
    times: dict[int, int] = {}
    sizes: list[int] = []
    for norm in norms:
        sizes += [norm.num_features, norm.num_features, 3 * norm.num_features]
    parts = list(stats.detach().split([*sizes, *([len(synced)] if synced else [])]))
    if synced:
        # How many rows all ranks have is on the device: the unbiased variance is taken there.
        totals = parts.pop()
        unbiased = torch._foreach_mul(
            [parts[3 * i + 1] for i in synced], list((totals / (totals - 1)).unbind())
        )
        for i, var in zip(synced, unbiased):
            parts[3 * i + 1] = var
        rows_at = [None if i in synced else rows for i, rows in enumerate(rows_at)]
    for norm, rows, mean, var in zip(norms, rows_at, parts[::3], parts[1::3]):
        if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
            continue
        assert norm.running_var is not None
        if norm.momentum is None:
            cumulative.append((norm, mean, var, rows))
            continue
        time = times[id(norm)] = times.get(id(norm), -1) + 1
        if norm.num_batches_tracked is not None:
            counters.setdefault(time, []).append(norm.num_batches_tracked)
        if not levels or rows != levels[-1]:
            levels.append(rows)
        key = (norm.momentum, len(levels) - 1, time)
        groups = moved.setdefault(key, [[], [], [], []])
        for group, tensor in zip(groups, (norm.running_mean, mean, norm.running_var, var)):
            group.append(tensor)
    with torch.no_grad():
        for tracked in counters.values():
            torch._foreach_add_(tracked, 1)
        for (momentum, level, _), (means, batch_means, variances, batch_vars) in moved.items():
            rows = levels[level]
            if rows is not None:
                batch_vars = list(torch._foreach_mul(batch_vars, rows / (rows - 1)))
            # running + momentum*(batch - running) rounds once at the size of the result, the form
            # (1 - momentum)*running + momentum*batch twice.
            for running, batch in ((means, batch_means), (variances, batch_vars)):
                batch = [b.to(r.dtype) for b, r in zip(batch, running)]
                torch._foreach_lerp_(running, batch, momentum)
        for norm, mean, var, rows in cumulative:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            if norm.num_batches_tracked is None:
                continue
            norm.num_batches_tracked.add_(1)
            weight = 1.0 / norm.num_batches_tracked.to(mean.dtype)
            norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), weight)
            var = var if rows is None else var * (rows / (rows - 1))
            norm.running_var.lerp_(var.to(norm.running_var.dtype), weight)
