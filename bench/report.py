"""The report of a device: a Markdown page and plots, rendered from its CSV.

    python -m bench.report [FOLDER ...] [--readme]

FOLDER defaults to every folder under bench/reports/. Pages say only what the CSV says. --readme
also renews the tables of the project's README, which stand between comments that name them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.providers import COMPILE, EAGER
from bench.schema import CSV_NAME, REPORTS, Row, read

OURS = ("recompute", "invert_h1", "invert", "segment")
PAGE = "README.md"
STEP = "forward+backward"

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


def figure(value: float) -> str:
    """A figure as tables print it: three to four significant digits, no exponent."""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A ratio as tables print it."""
    if value is None:
        return ""
    return f"{value:.3f}x" if value < 0.1 else f"{value:.2f}x"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    rows = [header, ["---"] + ["--:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


class Rows:
    """Rows of a report, to be looked up."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def where(self, **columns: str) -> list[Row]:
        """Rows whose columns have these values, in order."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in columns.items())]

    def one(self, **columns: str) -> Row | None:
        """The row, or None where there is none."""
        found = self.where(**columns)
        return found[0] if found else None

    def names(self, column: str, **columns: str) -> list[str]:
        """Distinct values of a column, in order."""
        return list(dict.fromkeys(getattr(r, column) for r in self.where(**columns)))


def _network(case: str) -> tuple[str, int, int]:
    """(block, depth, batch) of a network's case."""
    found = re.fullmatch(r"(\w+) ResNet-(\d+), batch (\d+)", case)
    if found is None:
        raise ValueError(f"expected a network's case, got {case!r}")
    return found[1], int(found[2]), int(found[3])


def depth_cases(rows: Rows) -> list[str]:
    """Of each depth the case that was measured first: the axis of depth."""
    first: dict[int, str] = {}
    for case in rows.names("case", suite="depth"):
        first.setdefault(_network(case)[1], case)
    return list(first.values())


def _cell(rows: Rows, case: str, provider: str) -> str:
    time = rows.one(suite="depth", case=case, provider=provider, metric="time", mode=STEP)
    peak = rows.one(suite="depth", case=case, provider=provider, metric="peak", mode=STEP)
    if time is None or time.value is None or peak is None or peak.value is None:
        return "-"
    if provider == EAGER:
        return f"{figure(time.value)} ms, {figure(peak.value)} MB"
    return (
        f"{figure(time.value)} ms ({ratio(time.ratio_to_eager)}), "
        f"{figure(peak.value)} MB ({ratio(peak.ratio_to_eager)})"
    )


def opening(rows: Rows) -> str:
    """A training step against depth, every provider, with the conditions under it."""
    chosen = depth_cases(rows)
    if not chosen:
        return ""
    header = ["a step"]
    for case in chosen:
        block, depth, batch = _network(case)
        header.append(f"ResNet-{depth} ({block}, batch {batch})")
    lines = []
    missing: dict[str, list[str]] = {}
    for provider in rows.names("provider", suite="depth"):
        cells = [_cell(rows, case, provider) for case in chosen]
        for case, cell in zip(chosen, cells):
            if cell == "-":
                row = rows.one(suite="depth", case=case, provider=provider, metric="time")
                note = row.note if row else "not run"
                missing.setdefault(f"`{provider}`: {note}", []).append(str(_network(case)[1]))
        if any(cell != "-" for cell in cells):
            lines.append([f"`{provider}`", *cells])
    under = (
        "In brackets: of eager. `checkpoint`: `torch.utils.checkpoint`, about as many segments a "
        "stage as blocks a segment. "
    )
    text = [table(header, lines), "", under + _conditions(rows, "depth")]
    unmeasured = [
        f"{note} ({', '.join(depths)} layers)" if len(depths) < len(chosen) else note
        for note, depths in missing.items()
    ]
    if unmeasured:
        text += ["", "Not in the table: " + "; ".join(unmeasured) + "."]
    return "\n".join(text)


def _conditions(rows: Rows, suite: str) -> str:
    """Under which conditions a suite was measured, in a line."""
    timed = [r for r in rows.where(suite=suite) if r.metric == "time" and r.value is not None]
    first = timed[0]
    trials = sorted({r.trials for r in timed})
    spreads = [r.spread for r in timed if r.spread is not None and r.provider != EAGER]
    many = f"{trials[0]} to {trials[-1]}" if len(trials) > 1 else f"{trials[0]}"
    worst = f", spread of ratios at most {max(spreads):.0%}" if spreads else ""
    middle = sorted(spreads)[len(spreads) // 2] if spreads else 0.0
    typical = f" (half of them below {middle:.0%})" if spreads else ""
    return (
        f"{first.device}, {first.versions}, {first.dtype}, {first.layout}, images of 32x32. Time: "
        f"median of {many} rounds in which every provider takes its turn, each in a process of its "
        f"own, in which glibc keeps freed memory; of eager: the median of the ratios within a "
        f"round{worst}{typical}. Memory: peak of a step's allocations beyond "
        f"parameters and gradients. `{first.command}`"
    )


def memory_table(rows: Rows, depth: int) -> str:
    """Memory and time of every provider at one depth; the README holds a copy."""
    case = next(c for c in depth_cases(rows) if _network(c)[1] == depth)
    block, _, batch = _network(case)
    lines = []
    for provider in rows.names("provider", suite="depth", case=case, metric="peak"):
        peak = rows.one(suite="depth", case=case, provider=provider, metric="peak")
        time = rows.one(suite="depth", case=case, provider=provider, metric="time")
        assert peak is not None
        assert time is not None
        assert peak.value is not None
        assert time.value is not None
        lines.append(
            [
                f"`{provider}`",
                f"{figure(peak.value)} MB",
                ratio(peak.ratio_to_eager),
                f"{figure(time.value)} ms",
                ratio(time.ratio_to_eager),
            ]
        )
    under = f"ResNet-{depth} ({block}) at 32x32, batch {batch}, {_conditions(rows, 'depth')}"
    header = ["provider", "peak", "of eager", "a step", "of eager"]
    return table(header, lines) + "\n\n" + under


def summary(rows: Rows) -> str:
    """What this project's modes cost and save, over all networks measured, and where it loses."""
    lines = []
    for mode in OURS:
        times = rows.where(suite="depth", provider=mode, metric="time", mode=STEP)
        peaks = rows.where(suite="depth", provider=mode, metric="peak", mode=STEP)
        slow = [r.ratio_to_eager for r in times if r.ratio_to_eager]
        small = [r.ratio_to_eager for r in peaks if r.ratio_to_eager]
        if not slow or not small:
            continue
        above = sum(r > 1 for r in slow)
        lines.append(
            f"- `{mode}`: {ratio(min(small))} to {ratio(max(small))} of eager's memory in "
            f"{ratio(min(slow))} to {ratio(max(slow))} of its time; slower than eager in {above} "
            f"of {len(slow)} networks."
        )
    compared = [
        r
        for r in rows.rows
        if r.metric == "time" and r.provider in OURS and r.ratio_to_compile is not None
    ]
    if compared:
        slower = sum(r.ratio_to_compile > 1 for r in compared if r.ratio_to_compile)
        lines.append(
            f"- Where `torch.compile` was run, units and networks, this project is slower than it "
            f"in {slower} of {len(compared)} comparisons (all modes)."
        )
    return "\n".join(lines)


def _timed_table(rows: Rows, suite: str) -> str:
    header = [
        "case", "provider", "mode", "ms (p20, p80)", "images/s", "of eager", "of compile",
        "spread", "peak MB", "of eager",
    ]  # fmt: skip
    has_launches = any(r.metric == "launches" for r in rows.where(suite=suite))
    lines = []
    for time in rows.where(suite=suite, metric="time"):
        key = {
            "suite": suite, "case": time.case, "provider": time.provider, "mode": time.mode,
        }  # fmt: skip
        if time.value is None or time.p20 is None or time.p80 is None:
            blank = [""] * (len(header) - 4 + has_launches)
            lines.append([time.case, f"`{time.provider}`", time.mode, time.note, *blank])
            continue
        speed = rows.one(**key, metric="throughput")
        peak = rows.one(**key, metric="peak")
        assert speed is not None
        assert peak is not None
        assert speed.value is not None
        assert peak.value is not None
        launches = rows.one(**key, metric="launches")
        line = [
            time.case,
            f"`{time.provider}`",
            time.mode,
            f"{figure(time.value)} ({figure(time.p20)}, {figure(time.p80)})",
            figure(speed.value),
            ratio(time.ratio_to_eager),
            ratio(time.ratio_to_compile),
            f"{time.spread:.0%}" if time.spread is not None else "",
            figure(peak.value),
            ratio(peak.ratio_to_eager),
        ]
        if has_launches:
            line.append(f"{launches.value:.0f}" if launches and launches.value else "")
        lines.append(line)
    return table(header + ["launches"] * has_launches, lines)


def _limits_table(rows: Rows) -> str:
    lines = []
    for row in rows.where(suite="limits"):
        found = "" if row.value is None else f"{row.value:.0f} {row.unit}"
        lines.append(
            [row.case, f"`{row.provider}`", row.metric, found, ratio(row.ratio_to_eager), row.note]
        )
    return table(["case", "provider", "figure", "found", "of eager", "note"], lines)


def _accuracy_table(rows: Rows) -> str:
    kinds = ["error of out", "error of dx", "error of gradients", "error of buffers"]
    lines = []
    for case in rows.names("case", suite="accuracy"):
        for provider in rows.names("provider", suite="accuracy", case=case):
            cells = []
            note = ""
            for kind in kinds:
                row = rows.one(suite="accuracy", case=case, provider=provider, metric=kind)
                if row is None or row.value is None:
                    note = note or (row.note if row else "")
                    cells.append("")
                    continue
                of = "" if row.ratio_to_eager is None else f" ({row.ratio_to_eager:.2f}x)"
                cells.append(f"{row.value:.1e}{of if provider != EAGER else ''}")
            lines.append([case, f"`{provider}`", *cells, note])
    heads = ["output", "dx", "gradients", "running statistics"]
    return table(["case", "provider", *heads, "note"], lines)


def _kernel_table(rows: Rows) -> str:
    lines = []
    for case in rows.names("case", suite="kernel", metric="time"):
        for name in rows.names("provider", suite="kernel", case=case):
            cells = {}
            for mode in ("cold", "warm"):
                for row in rows.where(suite="kernel", case=case, provider=name, mode=mode):
                    if row.value is not None:
                        cells[mode, row.metric] = row.value
            lines.append(
                [
                    case,
                    name,
                    figure(cells["cold", "bytes"]),
                    figure(cells["cold", "FLOPs"]),
                    f"{cells['cold', 'floor']:.3f}",
                    f"{cells['cold', 'time']:.3f}",
                    f"{cells['cold', 'gap']:.1f}x",
                    f"{cells['warm', 'time']:.3f}",
                    f"{cells['warm', 'gap']:.1f}x",
                    figure(cells["warm", "bytes per second"]),
                    figure(cells["warm", "FLOPs per second"]),
                ]
            )
    header = [
        "unit", "call", "MB", "MFLOP", "floor ms", "cold ms", "gap", "warm ms", "gap",
        "warm GB/s", "warm GFLOP/s",
    ]  # fmt: skip
    return table(header, lines)


def _rates_line(rows: Rows) -> str:
    parts = [
        f"{r.mode} {figure(r.value)} {r.unit}"
        for r in rows.where(suite="kernel", case="device")
        if r.value is not None
    ]
    return "Rates of the device, measured in the same run: " + ", ".join(parts) + "."


SECTIONS: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "depth": (
        "Networks against depth and batch",
        "Spread: distance between the 20th and 80th percentile of the ratio to eager over its "
        "median (for eager, of its own time).",
        lambda rows: _timed_table(rows, "depth"),
    ),
    "unit": (
        "One unit",
        "Forward is a training forward, which keeps what its backward needs.",
        lambda rows: _timed_table(rows, "unit"),
    ),
    "limits": (
        "What fits a budget",
        "The budget is for parameters, gradients, momentum and all that a step allocates. A step "
        "of the size found was run, and one of the next size needs more.",
        _limits_table,
    ),
    "kernel": (
        "Kernels",
        "Calls that a unit's chain makes, each alone. Bytes and FLOPs: the cost model's "
        "(`resnetv2.cost`). Floor: the larger of bytes over the faster copy rate and FLOPs over "
        "the rate of matrix products, launch by launch; gap: time over floor. Cold: a buffer "
        "larger than the L2 caches is written in between.",
        _kernel_table,
    ),
    "accuracy": (
        "Accuracy against float64",
        "Relative error (Euclidean norm over all elements), in brackets over eager's. More than "
        "twice eager's error of output or gradients is refused.",
        _accuracy_table,
    ),
}


def page(rows: Rows, device: str) -> str:
    """The Markdown page."""
    parts = [f"# Benchmarks on {device}"]
    if rows.where(suite="depth"):
        parts += [opening(rows), summary(rows), "![A step against depth](depth.png)"]
    for suite, (title, text, render_table) in SECTIONS.items():
        if not rows.where(suite=suite):
            continue
        parts += [f"## {title}", text]
        if suite == "kernel":
            parts += [_rates_line(rows), "![Roofline](roofline.png)"]
        parts += [render_table(rows), f"`{rows.where(suite=suite)[0].command}`"]
    extreme = rows.where(suite="extreme depth")
    if extreme:
        parts += ["## Extreme depth", extreme_text(rows)]
    return "\n\n".join(parts) + "\n"


def extreme_text(rows: Rows) -> str:
    """The steps of bench.extreme_depth in a paragraph."""
    losses = [r.value for r in rows.where(suite="extreme depth", metric="loss") if r.value]
    peak = rows.one(suite="extreme depth", metric="peak")
    assert peak is not None
    assert peak.value is not None
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    return (
        f"{peak.case} in mode `{peak.provider}`: a step's peak is {figure(peak.value)} MB beyond "
        f"parameters, gradients and momentum. Mean loss of the first {half} steps {first:.3f}, of "
        f"the last {len(losses) - half} {second:.3f}. `{peak.command}`"
    )


def _panel(axes: Any, rows: Rows, metric: str, figure_of: Callable[[Row, int], float]) -> None:
    """A line for each provider: ``figure_of(row, batch)`` of a metric against depth."""
    from matplotlib.ticker import NullLocator

    for provider in rows.names("provider", suite="depth"):
        points = []
        for case in depth_cases(rows):
            row = rows.one(suite="depth", case=case, provider=provider, metric=metric, mode=STEP)
            if row is not None and row.value:
                _, depth, batch = _network(case)
                points.append((depth, figure_of(row, batch)))
        if points:
            colour, marker, line = _STYLES.get(provider, _OTHER)
            axes.plot(
                *zip(*sorted(points)), color=colour, marker=marker, linestyle=line, label=provider,
                markersize=6, linewidth=1.4,
            )  # fmt: skip
    axes.set(xscale="log", xlabel="layers")
    depths = sorted(_network(case)[1] for case in depth_cases(rows))
    axes.set_xticks(depths, [str(d) for d in depths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)


def plot_depth(rows: Rows, path: Path) -> None:
    """Time an image, time over eager's and peak memory an image against depth."""
    from matplotlib.figure import Figure

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


def plot_roofline(rows: Rows, path: Path) -> None:
    """FLOP/s reached against FLOPs a byte, under the roofs that the device's rates make."""
    import numpy as np
    from matplotlib.figure import Figure

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
                flops, size = rows.one(**key, metric="FLOPs"), rows.one(**key, metric="bytes")
                speed = rows.one(**key, metric="FLOPs per second")
                if flops and size and speed and flops.value and size.value and speed.value:
                    points.append((flops.value / size.value, speed.value))
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


def render(folder: Path) -> None:
    """Write the page and the plots of ``folder`` from its CSV."""
    rows = Rows(read(folder / CSV_NAME))
    (folder / PAGE).write_text(page(rows, folder.name), encoding="utf-8")
    if depth_cases(rows):
        plot_depth(rows, folder / "depth.png")
    if rows.where(suite="kernel", metric="time"):
        plot_roofline(rows, folder / "roofline.png")


README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[Rows], str]] = {
    "opening": opening,
    "memory": lambda rows: memory_table(rows, 1001),
}


def with_blocks(text: str) -> str:
    """``text`` with every block ``<!-- bench: NAME DEVICE -->`` filled from DEVICE's CSV."""

    def fill(match: re.Match[str]) -> str:
        rows = Rows(read(REPORTS / match[3] / CSV_NAME))
        return f"{match[1]}{BLOCKS[match[2]](rows)}\n{match[4]}"

    return _BLOCK.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Render the folders named, or all; 2 where one has no CSV."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    parser.add_argument("--readme", action="store_true", help="renew the README's tables as well")
    args = parser.parse_args(arguments)
    found = sorted(path.parent for path in REPORTS.glob(f"*/{CSV_NAME}"))
    for folder in args.folders or found:
        try:
            render(folder)
        except (OSError, ValueError) as error:
            print(f"expected a folder with {CSV_NAME}: {error}", file=sys.stderr)
            return 2
        print(folder / PAGE)
    if args.readme:
        README.write_text(with_blocks(README.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
