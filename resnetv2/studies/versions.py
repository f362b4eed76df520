"""The original ResNet against ResNet V2 on the same data, settings and seeds (section 4)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core.table import counted
from ..data.batches import ImageData
from .comparing import PAPER, STACK, TRAINING, Factory, network, report
from .harness import Comparison, Result, StudyOptions, Table, compare, study
from .variants import FULL_PREACTIVATION, ORIGINAL

V1 = "original ResNet"
V2 = "ResNet V2"

NOISE: dict[str, Any] = {
    "data": "noise",
    "depth": 16,
    "width": 64,
    "stages": 1,
    "batch_size": 64,
    "epochs": 15,
    "lr": 0.01,
    "schedule": "constant",
    "weight_decay": 1e-4,
    "augment": False,
    "seeds": 1,
}

# Fewer epochs of a net have no median worth the name.
_TIMED = 3

# Table 3: test error on CIFAR-10, basic units of 110 layers.
TABLE_3: Mapping[str, str | float] = {V1: 6.61, V2: 6.37}


def variants(options: StudyOptions, data: ImageData) -> dict[str, Factory]:
    """Both nets; they have equally many parameters."""
    return {
        V1: network(options, data, ordering=ORIGINAL),
        V2: network(options, data, ordering=FULL_PREACTIVATION),
    }


def summarise(comparison: Comparison, options: StudyOptions, data: ImageData) -> Result:
    """Tables, conclusions and figures from both nets' histories."""
    result = report(
        comparison,
        options,
        data,
        V1,
        paper=("Table 3 (ResNet-110, CIFAR-10)", TABLE_3),
        conclusions=[losses(comparison), speed(comparison), duration(comparison)],
    )
    result.tables.append(epochs_table(comparison))
    return result


def losses(comparison: Comparison) -> str:
    """Which net fits its training images better, by the mean training loss of the last epoch."""
    first, second = (comparison.spread(name, "train_loss") for name in (V1, V2))
    if lost := [name for name in (V1, V2) if comparison.diverged(name)]:
        counts = " and ".join(
            f"{name} in {comparison.diverged(name)} of {len(comparison.histories[name])} runs"
            for name in lost
        )
        return f"The training loss stopped being finite: {counts}."
    seeds = counted(len(first.values), "seed")
    side = comparison.standing(V2, V1, "train_loss")
    if side == 0:
        return (
            f"Not told apart by {seeds}: the training losses at the end, {second} of {V2} and "
            f"{first} of {V1}."
        )
    words = "lower" if side < 0 else "higher"
    return f"{V2} ends with a {words} training loss ({second} against {first}) in each of {seeds}."


def speed(comparison: Comparison) -> str:
    """Epochs to the target accuracy, of both."""
    reached = {name: comparison.epochs_to_target(name) for name in (V1, V2)}
    target = f"{100 * comparison.target:g} % test accuracy"
    if all(value == "not reached" for value in reached.values()):
        return f"Neither reaches {target}."
    return f"Epochs to {target}: {', '.join(f'{name} {value}' for name, value in reached.items())}."


def duration(comparison: Comparison) -> str:
    """Time of an epoch, as a ratio of medians: means would tell of what else the machine did."""
    fewest = min(sum(len(run.epochs) for run in comparison.histories[name]) for name in (V1, V2))
    if fewest < _TIMED:
        return f"Times are not compared: {counted(fewest, 'epoch')} of a net tell too little."
    first, second = map(comparison.epoch_seconds, (V1, V2))
    return (
        f"An epoch of {V2} takes {second / first:.2f} times that of the {V1} "
        f"(median {second:.3g} s)."
    )


def epochs_table(comparison: Comparison) -> Table:
    """Loss, accuracy and gradient norm of both after every epoch, means over seeds."""
    columns = ["epoch"]
    cells: list[list[float | None]] = []
    longest = max(len(run.epochs) for runs in comparison.histories.values() for run in runs)
    for name, runs in comparison.histories.items():
        for metric, words, scale in (
            ("train_loss", "training loss", 1),
            ("test_accuracy", "test accuracy %", 100),
            ("gradient_norm", "gradient norm", 1),
        ):
            columns.append(f"{name}: {words}")
            means: list[float | None] = []
            for epoch in range(longest):
                values = [curve[epoch] for run in runs if epoch < len(curve := run.curve(metric))]
                means.append(scale * sum(values) / len(values) if values else None)
            cells.append(means)
    rows = [[epoch + 1, *(column[epoch] for column in cells)] for epoch in range(longest)]
    return Table("Epoch by epoch, means over seeds", columns, rows)


@study(
    "versions",
    title="The original ResNet and ResNet V2",
    question=(
        "On the same data, settings and seeds: does a net of pre-activation units train faster and "
        "end better than one of the original units? (section 4, Table 3)"
    ),
    # Deep enough that the order of BN, ReLU and addition matters within minutes. The paper warms
    # ResNet-110 up for one epoch (400 steps of 128 images), which of these images is 22 steps.
    defaults={**TRAINING, "depth": 110, "epochs": 6, "warmup_steps": 22},
    presets={"noise": NOISE, "cifar10": STACK, "paper": PAPER},
)
def versions(options: StudyOptions) -> Result:
    """Train both nets and compare them."""
    data = options.load()
    return summarise(compare(variants(options, data), data, options), options, data)
