"""The plots of a device's report: a training step against depth, and kernels under the roofline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.cases import network_of
from bench.schema import MODE, Row, Rows
from resnetv2.measuring.providers import COMPILE, EAGER
from resnetv2.studies.demo import MODES, draw

# Okabe and Ito's palette: told apart with any colour vision; markers and lines tell in print.
_STYLES = {
    EAGER: ("#000000", "o", "-"),
    COMPILE: ("#56B4E9", "s", "-"),
    "compile max-autotune": ("#56B4E9", "D", ":"),
    "checkpoint": ("#E69F00", "^", "-"),
    "recompute": ("#0072B2", "v", "--"),
    "invert_h1": ("#009E73", "P", "--"),
    "invert": ("#D55E00", "X", "--"),
    "segment": ("#CC79A7", "*", "--"),
}
_OTHER = ("#F0E442", "h", "-.")


def depth_cases(rows: Rows) -> list[str]:
    """Of each depth the case that was measured first: the axis of depth."""
    first: dict[int, str] = {}
    for case in rows.names("case", suite="depth"):
        first.setdefault(network_of(case)[1], case)
    return list(first.values())


def _panel(axes: Any, rows: Rows, metric: str, figure_of: Callable[[Row, int], float]) -> None:
    """A line for each provider: ``figure_of(row, batch)`` of a metric against depth."""
    for provider in rows.names("provider", suite="depth"):
        points = []
        for case in depth_cases(rows):
            row = rows.one(suite="depth", case=case, provider=provider, metric=metric, mode=MODE)
            if row is not None and row.value:
                _, depth, batch = network_of(case)
                points.append((depth, figure_of(row, batch)))
        if points:
            colour, marker, line = _STYLES.get(provider, _OTHER)
            axes.plot(
                *zip(*sorted(points)), color=colour, marker=marker, linestyle=line, label=provider,
                markersize=6, linewidth=1.4,
            )  # fmt: skip
    axes.set(xscale="log", xlabel="layers")
    depths = sorted(network_of(case)[1] for case in depth_cases(rows))
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def plot_depth(rows: Rows, path: Path) -> None:
    """Time an image, time over eager's and peak memory an image against depth."""
    drawing = Figure(figsize=(13, 4.8), layout="constrained")
    left, middle, right = drawing.subplots(1, 3)
    _panel(left, rows, "time", lambda row, batch: (row.value or 0.0) / batch)
    left.set(yscale="log", title="ms an image, forward and backward")
    _panel(middle, rows, "time", lambda row, batch: row.ratio_to_eager or float("nan"))
    middle.set(ylim=(0, None), title="time over eager's")
    _panel(right, rows, "peak", lambda row, batch: (row.value or 0.0) / batch)
    right.set(yscale="log", title="peak MB an image")
    handles, labels = left.get_legend_handles_labels()
    drawing.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
    first = rows.where(suite="depth")[0]
    name = first.device or "this device"
    drawing.suptitle(f"A training step, {name}, {first.dtype}", fontsize=11)
    drawing.savefig(path, dpi=110, format="png")


def demo_figures(rows: Rows) -> tuple[str, dict[str, float], dict[str, float]]:
    """A title, and peak MB and ms of a step by mode: those of ``resnetv2 demo``, deepest net."""
    case = max(depth_cases(rows), key=lambda name: network_of(name)[1])
    block, depth, batch = network_of(case)
    peaks, times = {}, {}
    for mode in MODES:
        key = {"suite": "depth", "case": case, "provider": mode, "mode": MODE}
        peak, time = rows.value(**key, metric="peak"), rows.value(**key, metric="time")
        if peak and time:
            peaks[mode], times[mode] = peak, time
    title = f"A training step of ResNet-{depth} ({block}), {batch} images of 32x32"
    return title, peaks, times


def plot_demo(rows: Rows, path: Path) -> None:
    """The picture of ``resnetv2 demo``, from the report's figures, which stand in the file too."""
    title, peaks, times = demo_figures(rows)
    drawing = draw(peaks, times, f"{title}, {rows.where(suite='depth')[0].device}")
    figures = {"peak MB": peaks, "ms a step": times}
    metadata = {"Description": json.dumps(figures)}
    drawing.savefig(path, dpi=130, format="png", metadata=metadata)


def plot_roofline(rows: Rows, path: Path) -> None:
    """FLOP/s reached against FLOPs a byte, under the roofs that the device's rates make."""
    rates = {
        r.mode: r.value for r in rows.where(suite="kernel", case="device") if r.value is not None
    }
    drawing = Figure(figsize=(8, 5), layout="constrained")
    axes = drawing.subplots()
    cases = rows.names("case", suite="kernel", metric="time")
    colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
    low, high = 0.1, 100.0
    for number, case in enumerate(cases):
        for mode, filled in (("cold", False), ("warm", True)):
            points = []
            for name in rows.names("provider", suite="kernel", case=case):
                key = {"suite": "kernel", "case": case, "provider": name, "mode": mode}
                flops, size = rows.value(**key, metric="FLOPs"), rows.value(**key, metric="bytes")
                speed = rows.value(**key, metric="FLOPs per second")
                if flops and size and speed:
                    points.append((flops / size, speed))
            if not points:
                continue
            colour = colours[number % len(colours)]
            axes.scatter(
                *zip(*points), s=42, marker="os^DvP"[number % 6], edgecolors=colour,
                facecolors=colour if filled else "none", label=f"{case}, {mode}",
            )  # fmt: skip
            low = min(low, *(p[0] / 2 for p in points))
            high = max(high, *(p[0] * 2 for p in points))
    x = np.geomspace(low, high, 200)
    for mode, style in (("copy cold", "--"), ("copy warm", "-")):
        roof = np.minimum(rates["multiply"], x * rates[mode])
        axes.plot(x, roof, color="black", linestyle=style, linewidth=1.2, label=f"roof, {mode}")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="best")
    first = rows.where(suite="kernel")[0]
    axes.set_title(f"Calls of a unit's chain, {first.device}, {first.dtype}", fontsize=11)
    drawing.savefig(path, dpi=130, format="png")
