"""Shortcuts other than the identity (section 3, Figure 2, Table 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..data.batches import ImageData
from .comparing import PAPER, TRAINING, Factory, network, report
from .harness import Comparison, Result, StudyOptions, compare, study
from .variants import (
    ORIGINAL,
    ConstantScaling,
    ConvolutionShortcut,
    DropoutShortcut,
    ExclusiveGating,
    Join,
    ShortcutOnlyGating,
)

IDENTITY = "identity"

JOINS: Mapping[str, Callable[[int], Join]] = {
    IDENTITY: lambda channels: Join(),
    "scaled: 0.5 x + F": lambda channels: ConstantScaling(0.5, 1.0),
    "scaled: 0.5 x + 0.5 F": lambda channels: ConstantScaling(0.5, 0.5),
    "exclusive gating, bias 0": lambda channels: ExclusiveGating(channels, 0.0),
    "exclusive gating, bias -6": lambda channels: ExclusiveGating(channels, -6.0),
    "shortcut-only gating, bias 0": lambda channels: ShortcutOnlyGating(channels, 0.0),
    "shortcut-only gating, bias -6": lambda channels: ShortcutOnlyGating(channels, -6.0),
    "1x1 convolution": ConvolutionShortcut,
    "dropout 0.5": lambda channels: DropoutShortcut(0.5),
}

# Test error on CIFAR-10, ResNet-110; "fail" is an error above 20 %.
TABLE_1: Mapping[str, str | float] = {
    IDENTITY: 6.61,
    "scaled: 0.5 x + F": "fail",
    "scaled: 0.5 x + 0.5 F": 12.35,
    "exclusive gating, bias 0": "fail",
    "exclusive gating, bias -6": 8.70,
    "shortcut-only gating, bias 0": 12.86,
    "shortcut-only gating, bias -6": 6.91,
    "1x1 convolution": 12.22,
    "dropout 0.5": "fail",
}


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """Table 1's shortcuts in nets of original units, as in the paper's section 3."""
    return {
        name: network(options, data, ordering=ORIGINAL, join=join) for name, join in JOINS.items()
    }


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    return report(
        comparison,
        options,
        data,
        IDENTITY,
        paper=("Table 1 (ResNet-110, CIFAR-10)", TABLE_1),
        conclusions=[agreement(comparison)],
        notes=[
            'The units are the original ones (ReLU after the addition), as in Table 1; "fail" is '
            "an error above 20 %. Where a unit changes the shape, its 1x1 projection comes before "
            "the scaling, gate, convolution or dropout."
        ],
    )


def agreement(comparison: Comparison) -> str:
    """In the paper every other shortcut is worse than the identity: which of them are here."""
    others = [name for name in comparison.histories if name != IDENTITY]
    sides = {name: comparison.standing(name, IDENTITY) for name in others}
    worse = sum(side < 0 for side in sides.values())
    better = [name for name, side in sides.items() if side > 0]
    return (
        f"Worse than the identity by more than the spread over seeds: {worse} of {len(others)} "
        f"here, all {len(others)} in the paper"
        + (f"; better: {', '.join(better)}." if better else ".")
    )


@study(
    "shortcuts",
    title="Shortcuts other than the identity",
    question=(
        "What happens to training when the shortcut is scaled, gated, convolved or dropped out? "
        "(Table 1)"
    ),
    # At 0.1, and at 0.05, the original units of 56 layers hardly start within so few steps.
    defaults={**TRAINING, "depth": 56, "epochs": 5, "lr": 0.02},
    presets={"paper": PAPER},
)
def shortcuts(options: StudyOptions) -> Result:
    """Train a net with each shortcut and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
