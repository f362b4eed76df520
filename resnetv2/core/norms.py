"""The norms that a unit may have, and what their modules say of themselves."""

from __future__ import annotations

from typing import cast

from torch import nn

# PyTorch's synchronised one is no BatchNorm2d.
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
# The norms of a unit.
NORMS = (*BATCH_NORMS, nn.GroupNorm, nn.InstanceNorm2d)


def batch_statistics(norm: nn.Module) -> bool:
    """Whether a norm takes its input's statistics, as in ``torch.nn.BatchNorm2d.forward``."""
    if norm.training or groups_of(norm):
        return True
    return getattr(norm, "running_mean", None) is None and norm.running_var is None


def groups_of(norm: nn.Module) -> int:
    """How many groups of an image's channels a norm takes statistics of; 0 for those of a batch."""
    if isinstance(norm, nn.GroupNorm):
        return norm.num_groups
    return norm.num_features if isinstance(norm, nn.InstanceNorm2d) else 0


def channels_of(norm: nn.Module) -> int:
    """The channels that a norm takes."""
    return cast(int, norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features)
