"""Batch, group and layer norm in pre-activation units."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn

from ..data.batches import ImageData
from .comparing import STACK, TRAINING, Factory, library_network, report
from .harness import Comparison, Result, StudyOptions, compare, study

BATCH = "batch norm"
GROUP_CHANNELS = 4


def group_norm(channels: int) -> nn.GroupNorm:
    """Wu and He 2018, in groups of 4 channels, or of all where they are no multiple."""
    groups = channels // GROUP_CHANNELS if channels % GROUP_CHANNELS == 0 else 1
    return nn.GroupNorm(groups, channels)


def layer_norm(channels: int) -> nn.GroupNorm:
    """Over channels and pixels of each image, with a weight and bias for each channel."""
    return nn.GroupNorm(1, channels)


NORMS: Mapping[str, Callable[[int], nn.Module]] = {
    BATCH: nn.BatchNorm2d,
    "group norm": group_norm,
    "layer norm": layer_norm,
}


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """`PreActResNet` with each norm."""
    return {name: library_network(options, data, norm=norm) for name, norm in NORMS.items()}


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    return report(
        comparison,
        options,
        data,
        BATCH,
        notes=[
            f"Group norm has {GROUP_CHANNELS} channels a group; layer norm is over channels and "
            "pixels of an image. Neither depends on the batch."
        ],
    )


@study(
    "norms",
    title="Batch, group and layer norm",
    question="How much of ResNet V2 depends on the norm being taken over the batch?",
    defaults={**TRAINING, "epochs": 8, "seeds": 3},
    presets={"cifar10": STACK},
)
def norms(options: StudyOptions) -> Result:
    """Train a net with each norm and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
