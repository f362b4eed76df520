"""The plots of ResNet V2's experiments, for a notebook or a page.

    from resnetv2.visualization import ResNetV2Visualizer
    ResNetV2Visualizer().plot_curves(comparison)   # a cell's last line shows it

Every method returns a matplotlib Figure and draws what it is given, nothing else.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from resnetv2.studies.training import Comparison, History

__all__ = ["Picture", "ResNetV2Visualizer"]

# Okabe and Ito's palette without its yellow, which is pale on white: told apart with any colour
# vision; line styles and markers tell the same apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

METRICS = {
    "train_loss": "training loss (cross-entropy)",
    "train_accuracy": "training accuracy (%)",
    "test_loss": "test loss (cross-entropy)",
    "test_accuracy": "test accuracy (%)",
    "gradient_norm": "gradient norm (all parameters)",
    "seconds": "seconds of training",
}


class Picture(Figure):
    """A Figure that notebooks show without pyplot and its global state."""

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self, dpi: int = 150) -> bytes:
        """The picture as the content of a PNG file."""
        file = io.BytesIO()
        self.savefig(file, dpi=dpi, format="png")
        return file.getvalue()


class ResNetV2Visualizer:
    """Draws curves, bars, diagrams and distributions in one style.

    Args:
        out: folder that each picture is also written to, as NAME.png after the method
            (`plot_curves` writes curves.png); created if missing. None writes nothing.
        panel: width and height of one panel in inches.
    """

    def __init__(
        self, out: str | Path | None = None, panel: tuple[float, float] = (4.5, 3.4)
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
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if drawn and scale == 1 and min(drawn) > 0 and max(drawn) > 10 * min(drawn):
                axes.set_yscale("log")
        _legend(picture, panels[0])
        return self._finish(picture, "curves")

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
        return self._finish(
            self._bars(values_of, METRICS.get(metric, metric), title), f"bars-{metric}"
        )

    def plot_values(
        self, values: Mapping[str, float | Sequence[float]], ylabel: str, title: str = ""
    ) -> Picture:
        """Bars of any values: a number a name, or several whose mean and spread are drawn."""
        as_lists = {
            name: list(value) if isinstance(value, Sequence) else [value]
            for name, value in values.items()
        }
        return self._finish(self._bars(as_lists, ylabel, title), "values")

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
            axes.set_title(title, fontsize=10)
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
        if "y" in log:
            axes.set_yscale("log")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _legend(picture, axes)
        return self._finish(picture, "lines")

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

    def _finish(self, picture: Picture, name: str) -> Picture:
        if self.out is not None:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{name}.png").write_bytes(picture.png())
        return picture


def _histories(
    given: Comparison | Mapping[str, Sequence[History]],
) -> Mapping[str, Sequence[History]]:
    return given if isinstance(given, Mapping) else given.histories


def _reach(values: Sequence[float]) -> float:
    """Where a bar with its whisker and dots ends; 0 for one without values."""
    if len(values) < 2:
        return max(values, default=0.0)
    return max(*values, statistics.fmean(values) + statistics.stdev(values))


def _look(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": STYLES[number % len(STYLES)],
        "marker": MARKERS[number % len(MARKERS)],
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
