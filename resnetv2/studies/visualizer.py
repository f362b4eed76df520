"""The plots of ResNet V2's experiments, for a notebook or a page.

    from resnetv2.visualization import ResNetV2Visualizer
    ResNetV2Visualizer().plot_lines({"V2": ([20, 50], [0.9, 0.8])}, "layers", "gradient norm")

Every method returns a matplotlib Figure and draws what it is given, nothing else.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from torch import nn

from ..training.plots import Picture
from .drawing import draw_block
from .histories import Comparison, History
from .tracing import Diagram, Step, trace

__all__ = ["Picture", "ResNetV2Visualizer"]

# Okabe and Ito's palette without its yellow, which is pale on white: told apart with any colour
# vision; line styles and markers tell the same apart in print.
COLOURS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999"),
    *("#882255", "#117733"),  # Tol's, for the ninth and tenth curve
)
STYLES = ("-", "--", "-.", ":")
HISTOGRAM_BINS = 30
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")

METRICS = {
    "train_loss": "training loss",
    "train_accuracy": "training accuracy (%)",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy (%)",
    "gradient_norm": "gradient norm",
    "seconds": "seconds of training",
}


class ResNetV2Visualizer:
    """Draws curves, bars, diagrams and distributions in one style.

    Args:
        out: folder that each picture is also written to, as NAME.png after the method
            (`plot_curves` writes curves.png); created if missing. None writes nothing.
        panel: width and height of one panel in inches.
    """

    def __init__(
        self, out: str | Path | None = None, panel: tuple[float, float] = (4.0, 3.2)
    ) -> None:
        self.out = None if out is None else Path(out)
        self.panel = panel

    def plot_curves(
        self,
        histories: Comparison | Mapping[str, Sequence[History]],
        metrics: str | Sequence[str] = ("train_loss", "test_accuracy", "gradient_norm"),
        title: str = "",
    ) -> Picture:
        """A panel a metric against epochs: the mean over seeds, shaded from least to greatest.

        Args:
            histories: of a comparison, or by variant.
            metrics: of `METRICS`. Losses and gradient norms that span a factor of ten are drawn
                on a logarithmic scale.
            title: one line above the panels.

        A cross marks the last finite value of a run that diverged.
        """
        runs_of = _histories(histories)
        metrics = (metrics,) if isinstance(metrics, str) else metrics
        picture, panels = self._panels(len(metrics), title)
        for axes, metric in zip(panels, metrics):
            scale = 100 if metric.endswith("accuracy") else 1
            drawn: list[float] = []
            for number, (name, runs) in enumerate(runs_of.items()):
                look = _look(number)
                curves = [[scale * value for value in run.curve(metric)] for run in runs]
                epochs, low, mean, high = _envelope(curves)
                drawn += mean
                few = look | {"markersize": 4} if len(epochs) <= 20 else look | {"marker": ""}
                axes.plot(epochs, mean, label=name, **few)
                axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)
                for run, curve in zip(runs, curves):
                    finite = [(i, v) for i, v in enumerate(curve, 1) if math.isfinite(v)]
                    if run.diverged is not None and finite:
                        axes.plot(*finite[-1], "x", color=look["color"], markersize=10, mew=2.5)
            axes.set(xlabel="epoch", ylabel=METRICS.get(metric, metric))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            if drawn and scale == 1 and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
                _log(axes, drawn)
        _legend(picture, panels[0])
        what = [METRICS.get(metric, metric).partition(" (")[0] for metric in metrics]
        several = any(len(runs) > 1 for runs in runs_of.values())
        spread = ": mean over seeds, shaded from the least to the greatest" if several else ""
        return self._finish(picture, "curves", f"{_and(what)} after every epoch{spread}")

    def plot_bars(
        self,
        histories: Comparison | Mapping[str, Sequence[History]],
        metric: str = "test_accuracy",
        title: str = "",
    ) -> Picture:
        """A bar a variant: the metric after the last epoch, mean over seeds, a dot a seed.

        The whisker is the standard deviation over seeds. Bars of accuracy begin at 0, so that
        their lengths may be compared. Seeds that diverged in a loss have no dot; the label says.
        """
        runs_of = _histories(histories)
        scale = 100 if metric.endswith("accuracy") else 1
        values_of: dict[str, list[float]] = {}
        for name, runs in runs_of.items():
            values = [run.seconds if metric == "seconds" else run.final(metric) for run in runs]
            lost = sum(not math.isfinite(value) for value in values)
            label = f"{name}\n({lost} of {len(runs)} diverged)" if lost else name
            values_of[label] = [scale * value for value in values if math.isfinite(value)]
        label = METRICS.get(metric, metric)
        several = any(len(values) > 1 for values in values_of.values())
        spread = ": mean over seeds, a dot for each, whiskers of one standard deviation"
        return self._finish(
            self._bars(values_of, label, title),
            f"bars-{metric}",
            f"{label.partition(' (')[0]} after the last epoch{spread if several else ''}",
        )

    def plot_values(
        self, values: Mapping[str, float | Sequence[float]], ylabel: str, title: str = ""
    ) -> Picture:
        """Bars of any values: a number a name, or several whose mean and spread are drawn."""
        as_lists = {
            name: list(value) if isinstance(value, Sequence) else [value]
            for name, value in values.items()
        }
        return self._finish(self._bars(as_lists, ylabel, title), "values", ylabel)

    def plot_groups(
        self,
        values: Mapping[str, Mapping[str, Sequence[float]]],
        ylabel: str,
        title: str = "",
    ) -> Picture:
        """Marks side by side in every group, one a name: mean with standard deviation, a dot a
        value. Groups have no order, so that no line joins them.

        Args:
            values: by line, then by group; every line has the same groups.
        """
        picture, (axes,) = self._panels(1, title, scale=1.4)
        groups = list(next(iter(values.values())))
        for number, (name, of_group) in enumerate(values.items()):
            look = _look(number) | {"markersize": 7, "linestyle": "none"}
            # Side by side, so that whiskers of one group do not cover each other.
            shift = 0.12 * (number - (len(values) - 1) / 2)
            x = [index + shift for index in range(len(groups))]
            means = [statistics.fmean(of_group[group]) for group in groups]
            spreads = [
                statistics.stdev(of_group[group]) if len(of_group[group]) > 1 else 0.0
                for group in groups
            ]
            axes.errorbar(x, means, yerr=spreads, capsize=4, label=name, **look)
            for place, group in zip(x, groups):
                dots = of_group[group]
                axes.plot([place] * len(dots), dots, ".", color="black", markersize=3)
        axes.set_xticks(range(len(groups)), groups)
        axes.set_ylabel(ylabel)
        _legend(picture, axes)
        what = ylabel.partition(" (")[0]
        return self._finish(
            picture, "groups", f"{what}: mean with standard deviation, a dot for each seed"
        )

    def _bars(self, values_of: Mapping[str, list[float]], label: str, title: str) -> Picture:
        # Horizontal: names of variants are words, and words are read from left to right.
        picture = Picture(figsize=(6.4, 1.2 + 0.5 * len(values_of)), layout="constrained")
        axes = picture.subplots()
        ends = {number: _reach(values) for number, values in enumerate(values_of.values())}
        largest = max(ends.values(), default=1.0)
        for number, values in enumerate(values_of.values()):
            if not values:
                continue
            mean = statistics.fmean(values)
            spread = statistics.stdev(values) if len(values) > 1 else None
            colour = COLOURS[number % len(COLOURS)]
            axes.barh(number, mean, color=colour, alpha=0.75, xerr=spread, capsize=4)
            if len(values) > 1:
                axes.plot(values, [number] * len(values), "o", color="black", markersize=3)
            text = f"{mean:.4g}" if spread is None else f"{mean:.4g} ± {spread:.2g}"
            axes.text(ends[number] + 0.015 * largest, number, text, va="center", fontsize=9)
        axes.set_yticks(range(len(values_of)), list(values_of))
        axes.invert_yaxis()
        axes.set_xlim(0, 1.25 * largest)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        if title:
            picture.suptitle(title, fontsize=10)  # over the labels too: a wide title fits
        return picture

    def plot_lines(
        self,
        lines: Mapping[str, tuple[Sequence[float], Sequence[float]]],
        xlabel: str,
        ylabel: str,
        *,
        log: str = "",
        threshold: float | None = None,
        title: str = "",
    ) -> Picture:
        """Any curves, (x values, y values) by name.

        Args:
            log: axes on a logarithmic scale: "", "x", "y" or "xy".
            threshold: a horizontal line there.
        """
        picture, (axes,) = self._panels(1, title, scale=1.4)
        for number, (name, (x, y)) in enumerate(lines.items()):
            look = _look(number)
            axes.plot(x, y, label=name, **look | {"markersize": 4 if len(x) <= 40 else 0})
        if threshold is not None:
            axes.axhline(threshold, color="black", linewidth=1, linestyle=(0, (1, 1)))
            axes.annotate(
                f"{threshold:g}",
                (1, threshold),
                xycoords=("axes fraction", "data"),
                xytext=(-3, 3),
                textcoords="offset points",
                ha="right",
            )
        if "x" in log:
            axes.set_xscale("log")
            ticks = _apart({value for x, _ in lines.values() for value in x})
            if len(ticks) <= 10:
                axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
                axes.set_xticks([], minor=True)
        if "y" in log:
            _log(axes, [value for _, y in lines.values() for value in y])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(picture, axes)
        return self._finish(picture, "lines", f"{ylabel.partition(' (')[0]} against {xlabel}")

    def plot_architecture(self, blocks: Mapping[str, Diagram | nn.Module]) -> Picture:
        """Blocks side by side as boxes and arrows, from the input down to the output.

        Args:
            blocks: diagrams by `resnetv2.studies.tracing.trace`, or modules with a `conv1`,
                which are traced.
        """
        diagrams = {
            name: block if isinstance(block, Diagram) else trace(block, _in_channels(block))
            for name, block in blocks.items()
        }
        levels = 1 + max(node.level for diagram in diagrams.values() for node in diagram.nodes)
        picture = Picture(figsize=(4.2 * len(diagrams), 0.62 * levels + 0.7), layout="constrained")
        panels = picture.subplots(1, len(diagrams), squeeze=False)[0]
        for axes, (name, diagram) in zip(panels, diagrams.items()):
            draw_block(axes, diagram)
            axes.set(title=name, xlim=(-1.25, 2.5), ylim=(levels - 0.25, -0.4))
            axes.axis("off")
        return self._finish(
            picture,
            "architecture",
            f"From the input down to the output, the shortcut on the right: {_and(list(blocks))}",
        )

    def plot_steps(self, steps: Sequence[Step], gradients: Sequence[float]) -> Picture:
        """How values are distributed after each step of a block, and the gradient's norm there.

        Args:
            steps: as of `resnetv2.studies.tracing.trace_block`.
            gradients: one norm a step.
        """
        picture, (values, norms) = self._panels(2, "")
        outputs = [step.output.detach().float().flatten().cpu().numpy() for step in steps]
        names = [step.name for step in steps]
        positions = range(len(steps))
        values.boxplot(
            outputs,
            positions=positions,
            whis=(1, 99),
            showfliers=False,
            showmeans=True,
            widths=0.6,
            medianprops={"color": COLOURS[0]},
            meanprops={"marker": "D", "markerfacecolor": COLOURS[1], "markeredgecolor": "none"},
        )
        values.set(ylabel="value", xlabel="box: quartiles; whiskers: 1 % and 99 %; diamond: mean")
        norms.bar(positions, gradients, color=COLOURS[2], alpha=0.75)
        norms.set_ylabel("gradient norm")
        norms.set_ylim(0, 1.15 * max(gradients))
        for i, gradient in enumerate(gradients):
            norms.text(i, gradient, f"{gradient:.2f}", ha="center", va="bottom", fontsize=8)
        for axes in (values, norms):
            axes.set_xticks(positions, names, rotation=35)
            axes.grid(axis="x", visible=False)
            axes.set_axisbelow(True)
        values.set_title("output of each step", fontsize=11)
        norms.set_title("gradient that arrives there", fontsize=11)
        caption = "Values after each step of the block, and the norm of the loss's gradient there"
        return self._finish(picture, "steps", caption)

    def plot_distributions(
        self, values: Mapping[str, Sequence[float]], label: str, title: str = ""
    ) -> Picture:
        """Histogram and box plot of samples by name, over one range of values."""
        picture, (histogram, boxes) = self._panels(2, title)
        everything = [value for sample in values.values() for value in sample]
        low, high = min(everything), max(everything)
        margin = 0.02 * (high - low) or 0.5
        edges = [
            low - margin + (high - low + 2 * margin) * i / HISTOGRAM_BINS
            for i in range(HISTOGRAM_BINS + 1)
        ]
        for number, (name, sample) in enumerate(values.items()):
            colour = COLOURS[number % len(COLOURS)]
            histogram.hist(sample, edges, color=colour, alpha=0.6, label=name)
        histogram.set(xlabel=label, ylabel="inputs")
        drawn = boxes.boxplot(
            list(values.values()), patch_artist=True, widths=0.5, medianprops={"color": "black"}
        )
        for number, box in enumerate(drawn["boxes"]):
            box.set(facecolor=COLOURS[number % len(COLOURS)], alpha=0.6)
        names = [name.replace(" (", "\n(") for name in values]
        boxes.set_xticks(range(1, len(names) + 1), names)
        boxes.set_ylabel(label)
        _legend(picture, histogram)
        return self._finish(
            picture, "distributions", f"Histogram and box plot of {label}, an input a value"
        )

    def plot_block_norms(
        self, nets: Mapping[str, Mapping[str, Sequence[float]]], title: str = ""
    ) -> Picture:
        """Norms along a net: |x| and |out - x| of every block, and their ratio.

        Args:
            nets: by name, "identity", "residual" and "ratio", a value a block.
        """
        picture, panels = self._panels(3, title)
        labels = ("|x|", "|out - x|", "|out - x| / |x|")
        for axes, part, label in zip(panels, ("identity", "residual", "ratio"), labels):
            for number, (name, norms) in enumerate(nets.items()):
                look = _look(number) | {"markersize": 4 if len(norms[part]) <= 30 else 0}
                axes.plot(range(len(norms[part])), norms[part], label=name, **look)
            axes.set(xlabel="block", ylabel=label, ylim=(0, None))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(picture, panels[0])
        caption = "Block by block: the norm of its input, of what it adds to it, and their ratio"
        return self._finish(picture, "block_norms", caption)

    def plot_gradients(
        self, norms: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, ylabel: str
    ) -> Picture:
        """A panel a depth: a gradient norm for each layer, a curve a net, on a logarithmic scale.

        Args:
            norms: by the panel's title and the net's name, from the first layer to the last.
        """
        picture, panels = self._panels(len(norms), "")
        values = [v for nets in norms.values() for curve in nets.values() for v in curve if v > 0]
        for axes, (title, nets) in zip(panels, norms.items()):
            for number, (name, curve) in enumerate(nets.items()):
                look = _look(number) | {"markersize": 4 if len(curve) <= 30 else 0}
                axes.plot(range(len(curve)), curve, label=name, **look)
            axes.set(xlabel=xlabel, ylabel=ylabel, title=title)
            _log(axes, values)
            if values:
                axes.set_ylim(min(values) / 1.5, max(values) * 1.5)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _legend(picture, panels[0])
        caption = f"{ylabel} against {xlabel.partition(' (')[0]}, a panel for each depth"
        return self._finish(picture, "gradients", caption)

    def _panels(
        self, count: int, title: str, scale: float = 1.0, columns: int = 3
    ) -> tuple[Picture, list[Axes]]:
        columns = min(count, columns)
        rows = -(-count // columns)
        width, height = (scale * side for side in self.panel)
        picture = Picture(figsize=(columns * width, rows * height + 0.3), layout="constrained")
        grid = picture.subplots(rows, columns, squeeze=False)
        panels = list(grid.flat)
        for spare in panels[count:]:
            spare.remove()
        for axes in panels[:count]:
            axes.grid(alpha=0.3)
        if title:
            picture.suptitle(title, fontsize=11)
        return picture, panels[:count]

    def _finish(self, picture: Picture, name: str, caption: str) -> Picture:
        picture.caption = f"{caption[:1].upper()}{caption[1:]}."
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{name}.png").write_bytes(picture.png())
        return picture


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic y axis; with plain numbers where values lie within a factor of a hundred."""
    axes.set_yscale("log")
    positive = [value for value in values if value > 0]
    if positive and min(positive) >= 1e-3 and max(positive) <= min(100 * min(positive), 1e5):
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())


def _and(words: Sequence[str]) -> str:
    """Words in a row: "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _in_channels(block: nn.Module) -> int:
    for attribute in ("in_channels", "conv1.in_channels"):
        value: Any = block
        for name in attribute.split("."):
            value = getattr(value, name, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"{type(block).__name__} has no in_channels and no conv1 that has")


def _histories(
    given: Comparison | Mapping[str, Sequence[History]],
) -> Mapping[str, Sequence[History]]:
    return given if isinstance(given, Mapping) else given.histories


def _apart(values: set[float]) -> list[float]:
    """Positive values in order, without those less than a quarter above the one before."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > 1.25 * kept[-1]:
            kept.append(value)
    return kept


def _reach(values: Sequence[float]) -> float:
    """Where a bar with its whisker and dots ends; 0 for one without values."""
    if len(values) < 2:
        return max(values, default=0.0)
    return max(*values, statistics.fmean(values) + statistics.stdev(values))


def _look(number: int) -> dict[str, Any]:
    again = number // len(COLOURS)  # a colour's second line has another style and marker
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[(number + again) % len(STYLES)],
        "marker": MARKERS[(number + 3 * again) % len(MARKERS)],
    }


def _envelope(
    curves: Sequence[Sequence[float]],
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Epochs from 1, and at each the least, mean and greatest of the curves' finite values."""
    epochs, low, mean, high = [], [], [], []
    for epoch in range(1, 1 + max(map(len, curves))):
        values = [c[epoch - 1] for c in curves if len(c) >= epoch and math.isfinite(c[epoch - 1])]
        if values:
            epochs.append(epoch)
            low.append(min(values))
            mean.append(statistics.fmean(values))
            high.append(max(values))
    return epochs, low, mean, high


def _legend(picture: Figure, axes: Axes) -> None:
    """One legend for all panels, below them, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        widest = max(map(len, labels))
        fit = max(1, int(picture.get_figwidth() * 11 / (widest + 6)))
        picture.legend(handles, labels, loc="outside lower center", ncols=fit, frameon=False)
