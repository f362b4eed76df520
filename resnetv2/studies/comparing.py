"""Common to the studies that train: options, nets, and conclusions within the spread over seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..core.table import counted
from ..data.batches import ImageData
from ..models import PreActResNet
from .harness import Comparison, Result, StudyOptions, Table
from .variants import ResidualNetwork, layout
from .visualizer import Picture, ResNetV2Visualizer

# Digits need no download, and depth 20 trains on them in seconds. The batch is half of the paper's,
# so that 1,437 images make 22 steps an epoch.
TRAINING: dict[str, Any] = {
    "data": "digits",
    "root": "data",
    "image_size": None,
    "depth": 20,
    "width": 16,
    "stages": 3,
    "epochs": 6,
    "batch_size": 64,
    "lr": 0.1,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "paper",
    "step_epochs": 10,
    "warmup_steps": None,
    "augment": True,
    "seeds": 2,
    "train_images": None,
    "test_images": None,
    "target": 0.9,
    "dtype": "fp32",
}

# The paper's training of ResNet-110 (section "Implementation details"): 64k iterations of 128
# images after 400 of warm-up; for a GPU.
PAPER: dict[str, Any] = {
    "data": "cifar10",
    "depth": 110,
    "width": 16,
    "stages": 3,
    "epochs": 164,
    "batch_size": 128,
    "lr": 0.1,
    "weight_decay": 1e-4,
    "schedule": "paper",
    "warmup_steps": 400,
    "augment": True,
    "seeds": 5,
}

# Twenty-five blocks of 64 channels on CIFAR-10.
STACK: dict[str, Any] = {
    "data": "cifar10",
    "depth": 50,
    "width": 64,
    "stages": 1,
    "epochs": 30,
    "batch_size": 128,
    "lr": 0.01,
    "schedule": "step",
    "step_epochs": 10,
    "weight_decay": 1e-4,
    "augment": True,
    "seeds": 1,
}

UNFUSED = (
    "Every variant runs unfused, layer by layer, so that times compare architectures and not "
    "kernels."
)

Factory = Callable[[], nn.Module]


def network(options: StudyOptions, data: ImageData, **choices: Any) -> Factory:
    """A factory of `ResidualNetwork`s of the asked depth; `choices` are its arguments."""
    layers, widths = layout(options.one_depth, options.width, options.stages)

    def make() -> nn.Module:
        return ResidualNetwork(
            layers,
            widths,
            num_classes=len(data.classes),
            in_channels=data.channels,
            **choices,
        )

    return make


def library_network(options: StudyOptions, data: ImageData, **choices: Any) -> Factory:
    """A factory of the library's own `PreActResNet`s, unfused; `choices` go to the blocks."""
    layers, widths = layout(options.one_depth, options.width, options.stages)

    def make() -> nn.Module:
        return PreActResNet(
            "basic",
            layers,
            len(data.classes),
            widths=widths,
            stem_width=widths[0],
            in_channels=data.channels,
            backend="eager",
            **choices,
        )

    return make


def shape_of(options: StudyOptions) -> str:
    """The nets in words, as a title needs them."""
    layers, widths = layout(options.one_depth, options.width, options.stages)
    if len(layers) == 1:
        return f"{layers[0]} blocks of {widths[0]} channels"
    return f"{options.one_depth} layers, {widths[0]} to {widths[-1]} channels"


def trained(options: StudyOptions) -> str:
    """How long and how often, as a title needs it."""
    return f"{counted(options.epochs, 'epoch')}, {counted(options.seeds, 'seed')}"


# Nets have learned next to nothing where they are not this part of the way from chance to 100 %.
_LEARNED = 0.05


def near_chance(comparison: Comparison, classes: int) -> str | None:
    """A sentence where every variant's mean test accuracy is about that of guessing, else None."""
    chance = 1 / classes
    highest = max(comparison.spread(name).mean for name in comparison.histories)
    if highest > chance + _LEARNED * (1 - chance):
        return None
    return (
        f"No order can be read: every net is near chance, the best at {100 * highest:.1f} %, where "
        f"guessing among {classes} classes gives {100 * chance:.1f} %. More epochs may tell."
    )


def against(comparison: Comparison, reference: str) -> list[str]:
    """How every other variant stands to the reference, in sentences made of this run's numbers."""
    others = [name for name in comparison.histories if name != reference]
    seeds = len(comparison.histories[reference])
    base = f"{reference} ({percent(comparison, reference)})"

    def listed(names: list[str]) -> str:
        return ", ".join(
            f"{name} ({points(comparison.difference(name, reference).mean)}"
            f"{_lost(comparison, name)})"
            for name in names
        )

    if seeds < 2:
        return [f"Test accuracy against {base}, one seed, so without a spread: {listed(others)}."]
    groups: dict[int, list[str]] = {-1: [], 0: [], 1: []}
    for name in others:
        groups[comparison.standing(name, reference)].append(name)
    sentences = []
    for side, words in ((-1, "Worse than"), (1, "Better than")):
        if groups[side]:
            sentences.append(
                f"{words} {base} by more than the spread, in each of {seeds} seeds: "
                f"{listed(groups[side])}."
            )
    if groups[0]:
        sentences.append(
            f"Not told apart from {base} by {seeds} seeds (the difference is within their spread "
            f"or changes its sign): {listed(groups[0])}."
        )
    return sentences


def points(difference: float) -> str:
    """A difference of accuracies in percentage points, with its sign, "+1.2 points"."""
    return f"{round(100 * difference, 1) + 0.0:+.1f} points"  # + 0.0: no minus before a zero


def percent(comparison: Comparison, variant: str) -> str:
    """The variant's final test accuracy with its spread, "97.2 ± 0.3 %"."""
    spread = comparison.spread(variant)
    around = f" ± {100 * spread.std:.1f}" if len(spread.values) > 1 else ""
    return f"{100 * spread.mean:.1f}{around} %"


def best(comparison: Comparison) -> str:
    """The variant of highest mean test accuracy, and which others the run cannot tell from it."""
    names = list(comparison.histories)
    first = max(names, key=lambda name: comparison.spread(name).mean)
    if len(comparison.histories[first]) < 2:
        return (
            f"No order can be read from one seed each; the highest test accuracy is "
            f"{percent(comparison, first)}, of {first}."
        )
    close = [n for n in names if n != first and comparison.standing(n, first) == 0]
    if close and len(close) == len(names) - 1:
        return (
            f"No order can be read in test accuracy: {first} has the highest mean "
            f"({percent(comparison, first)}), not told apart from {', '.join(close)}."
        )
    told = f"; not told apart from it: {', '.join(close)}" if close else ", apart from all others"
    return f"Highest mean test accuracy: {first} ({percent(comparison, first)}){told}."


def figures(comparison: Comparison, title: str) -> dict[str, Picture]:
    """The curves an epoch and the final test accuracy."""
    visualizer = ResNetV2Visualizer()
    return {
        "curves": visualizer.plot_curves(comparison, title=title),
        "test-accuracy": visualizer.plot_bars(comparison, title=title),
    }


def reference_table(
    comparison: Comparison, title: str, paper: Mapping[str, str | float | None]
) -> Table:
    """This run's test error beside the paper's (%, ResNet-110 on CIFAR-10, 164 epochs)."""
    rows = []
    for name in comparison.histories:
        spread = comparison.spread(name)
        around = f" ± {100 * spread.std:.2f}" if len(spread.values) > 1 else ""
        rows.append([name, f"{100 * (1 - spread.mean):.2f}{around}", _text(paper.get(name))])
    return Table(title, ["variant", "test error % here", "test error % in the paper"], rows)


def report(
    comparison: Comparison,
    options: StudyOptions,
    data: ImageData,
    reference: str,
    *,
    paper: tuple[str, Mapping[str, str | float | None]] | None = None,
    conclusions: list[str] | None = None,
    notes: list[str] | None = None,
) -> Result:
    """The result of a study that compares variants with a reference.

    Args:
        reference: the variant that the others are held against.
        paper: a table's name in the paper and its errors by variant.
        conclusions, notes: further ones, after the common ones.
    """
    where = f"{shape_of(options)}, {data.name}, {trained(options)}"
    tables = [comparison.table(f"Training, {where}")]
    if paper is not None:
        tables.append(reference_table(comparison, f"The same beside {paper[0]}", paper[1]))
    guessing = near_chance(comparison, len(data.classes))
    found = [*against(comparison, reference), best(comparison), *(conclusions or [])]
    return Result(
        tables=tables,
        conclusions=found if guessing is None else [guessing],
        figures=dict(figures(comparison, where)),
        series=comparison.series(),
        notes=[*(notes or []), UNFUSED],
    )


def _lost(comparison: Comparison, name: str) -> str:
    count = comparison.diverged(name)
    return f", {count} of {len(comparison.histories[name])} diverged" if count else ""


def _text(value: str | float | None) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.2f}"
