"""Training regime against architecture: warm-up, augmentation and weight decay against the unit.

A regime is which of the three are on. The command keeps its name, `resnetv2 study recipe`; a
recipe elsewhere is a file of `resnetv2 train --recipe`.
"""

from __future__ import annotations

from dataclasses import replace

from ..core.table import counted
from ..data.batches import ImageData
from .comparing import (
    PAPER,
    TRAINING,
    UNFUSED,
    Factory,
    near_chance,
    network,
    percent,
    points,
    shape_of,
    trained,
)
from .harness import (
    Comparison,
    History,
    Result,
    Spread,
    StudyOptions,
    Table,
    compare,
    study,
)
from .variants import FULL_PREACTIVATION, ORIGINAL, ConstantScaling
from .visualizer import ResNetV2Visualizer

PLAIN, V1, V2 = "plain net", "original ResNet", "ResNet V2"
NOTHING, ALL = "none of them", "all three"


def architectures(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """The original unit without and with its shortcut, and the pre-activation unit."""
    return {
        PLAIN: network(
            options, data, ordering=ORIGINAL, join=lambda channels: ConstantScaling(0.0, 1.0)
        ),
        V1: network(options, data, ordering=ORIGINAL),
        V2: network(options, data, ordering=FULL_PREACTIVATION),
    }


def regimes(options: StudyOptions, data: ImageData) -> dict[str, tuple[StudyOptions, ImageData]]:
    """Options and data of each regime; the schedule after the warm-up is the same in all.

    The warm-up lasts `options.warmup_steps`, or one epoch: the paper's 400 steps of 128 images are
    one epoch of CIFAR-10.
    """
    steps = max(1, len(data.train) // options.batch_size)
    warmup = steps if options.warmup_steps is None else options.warmup_steps
    bare = replace(options, schedule="paper", warmup_steps=0, weight_decay=0.0)
    still = replace(data, crop_padding=0, flip=False)
    decay = options.weight_decay
    return {
        NOTHING: (bare, still),
        "warm-up": (replace(bare, warmup_steps=warmup), still),
        "augmentation": (bare, data),
        "weight decay": (replace(bare, weight_decay=decay), still),
        ALL: (replace(bare, warmup_steps=warmup, weight_decay=decay), data),
    }


def label(architecture: str, regime: str) -> str:
    """The name of a run in the joint comparison."""
    return f"{architecture}, {regime}"


def train(options: StudyOptions, data: ImageData) -> Comparison:
    """Every architecture under every regime, in one comparison."""
    histories: dict[str, list[History]] = {}
    for name, (settings, images) in regimes(options, data).items():
        factories = architectures(settings, images)
        runs = compare({label(a, name): make for a, make in factories.items()}, images, settings)
        histories |= runs.histories
    return Comparison(histories, options.target)


def effects(comparison: Comparison, names: tuple[str, ...] = (PLAIN, V1, V2)) -> list[str]:
    """The gain of all three ingredients in each architecture, and of V2 with and without them."""

    def gain(better: str, worse: str) -> tuple[Spread, str]:
        difference = comparison.difference(better, worse)
        around = f" ± {100 * difference.std:.1f}" if len(difference.values) > 1 else ""
        return difference, points(difference.mean).replace(" ", f"{around} ")

    of_regime = {name: gain(label(name, ALL), label(name, NOTHING)) for name in names}
    of_v2 = {name: gain(label(V2, name), label(V1, name)) for name in (NOTHING, ALL)}
    # A seed's mean over both nets, or over both regimes: the effect of one choice alone.
    by_regime = _means(of_regime[V1][0], of_regime[V2][0])
    by_architecture = _means(of_v2[NOTHING][0], of_v2[ALL][0])
    gap = Spread(tuple(abs(a) - abs(b) for a, b in zip(by_regime.values, by_architecture.values)))
    seeds = counted(len(gap.values), "seed")
    told = len(gap.values) > 1 and all(value * gap.mean > 0 for value in gap.values)
    if told and abs(gap.mean) > gap.std:
        larger = "regime" if gap.mean > 0 else "architecture"
        weighed = f"the {larger} makes the larger difference here, in each of {seeds}."
    else:
        weighed = f"which of them makes the larger difference cannot be read from {seeds}."
    return [
        "All three against none of them: "
        + ", ".join(f"{name} {words}" for name, (_, words) in of_regime.items())
        + ".",
        f"{V2} against the {V1}: {of_v2[NOTHING][1]} without the three, {of_v2[ALL][1]} with them.",
        f"Over these two nets the regime gives {points(by_regime.mean)} on average, V2 instead of "
        f"the original unit {points(by_architecture.mean)}: {weighed}",
    ]


def _means(first: Spread, second: Spread) -> Spread:
    return Spread(tuple((a + b) / 2 for a, b in zip(first.values, second.values)))


def grid(comparison: Comparison, regime_names: list[str], architecture_names: list[str]) -> Table:
    """Test accuracy, a row a regime, a column an architecture."""
    rows = [
        [r, *(percent(comparison, label(a, r)) for a in architecture_names)] for r in regime_names
    ]
    return Table("Test accuracy under each regime", ["regime", *architecture_names], rows)


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from the histories."""
    names = list(regimes(options, data))
    nets = list(architectures(options, data))
    where = f"{shape_of(options)}, {data.name}, {trained(options)}"
    values = {
        net: {
            name: [
                100 * run.final("test_accuracy") for run in comparison.histories[label(net, name)]
            ]
            for name in names
        }
        for net in nets
    }
    guessing = near_chance(comparison, len(data.classes))
    ends = {key: runs for key, runs in comparison.histories.items() if not _single(key)}
    visualizer = ResNetV2Visualizer()
    return Result(
        tables=[
            grid(comparison, names, nets),
            comparison.table(f"Training, {where}"),
        ],
        conclusions=effects(comparison) if guessing is None else [guessing],
        figures={
            "regimes": visualizer.plot_groups(values, "test accuracy (%)", where),
            "curves": visualizer.plot_curves(ends, title=where),
        },
        series=comparison.series(),
        notes=[
            "One schedule for all: the learning rate falls to a tenth at a half and at three "
            "quarters of the run. Warm-up is one epoch at a tenth, unless told otherwise.",
            UNFUSED,
        ],
    )


def _single(key: str) -> bool:
    return not key.endswith((NOTHING, ALL))


@study(
    "recipe",
    title="Training regime and architecture",
    question=(
        "How much of the result comes from warm-up, augmentation and weight decay, and how much "
        "from the shortcut and the order of the unit?"
    ),
    defaults={**TRAINING, "depth": 32, "epochs": 5, "weight_decay": 5e-4},
    presets={"paper": {**PAPER, "weight_decay": 1e-4}},
)
def recipe(options: StudyOptions) -> Result:
    """Train every architecture under every regime and weigh both."""
    data = options.load()
    return summarise(train(options, data), options, data)
