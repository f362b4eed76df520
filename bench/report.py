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

from bench.cases import network_of
from bench.plots import demo_figures, depth_cases, plot_demo, plot_depth, plot_roofline
from bench.schema import CSV_NAME, MODE, REPORTS, Rows, read
from resnetv2.measuring.providers import EAGER
from resnetv2.names import MEMORY_MODES as OURS

PAGE = "README.md"
DEMO_PICTURE = "demo.png"


def figure(value: float | None) -> str:
    """A figure as tables print it: three to four significant digits, no exponent; "" for None."""
    if value is None:
        return ""
    if value >= 1000:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A ratio as tables print it; "" for None."""
    if value is None:
        return ""
    return f"{value:.3f}x" if value < 0.1 else f"{value:.2f}x"


def table(header: Sequence[str], lines: Iterable[Sequence[str]], left: int = 1) -> str:
    """A Markdown table; the first ``left`` columns to the left, the others to the right."""
    rows = [header, ["---"] * left + ["--:"] * (len(header) - left), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(rows: Rows, case: str, provider: str) -> str:
    time = rows.one(suite="depth", case=case, provider=provider, metric="time", mode=MODE)
    peak = rows.one(suite="depth", case=case, provider=provider, metric="peak", mode=MODE)
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
        block, depth, batch = network_of(case)
        header.append(f"ResNet-{depth} ({block}, batch {batch})")
    lines = []
    missing: dict[tuple[str, str], list[str]] = {}  # provider and reason to depths
    for provider in rows.names("provider", suite="depth"):
        cells = [_cell(rows, case, provider) for case in chosen]
        for case, cell in zip(chosen, cells):
            if cell == "-":
                row = rows.one(suite="depth", case=case, provider=provider, metric="time")
                depth = str(network_of(case)[1])
                # What a case says of its own depth holds for the others that were not run.
                note = row.note.replace(f"{depth} layers would", "more would") if row else "not run"
                missing.setdefault((provider, note), []).append(depth)
        if any(cell != "-" for cell in cells):
            lines.append([f"`{provider}`", *cells])
    under = (
        "In brackets: of eager. `checkpoint`: `torch.utils.checkpoint`, about as many segments a "
        "stage as blocks a segment. "
    )
    text = [table(header, lines), "", under + _conditions(rows, "depth")]
    if missing:
        text += ["", "Not in the table: " + "; ".join(_reasons(missing, len(chosen))) + "."]
    return "\n".join(text)


def _reasons(missing: dict[tuple[str, str], list[str]], cases: int) -> list[str]:
    """Each reason once, with the providers and depths that it holds for."""
    shared: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (provider, note), depths in missing.items():
        shared.setdefault((note, tuple(depths)), []).append(f"`{provider}`")
    return [
        ", ".join(providers)
        + (f" ({', '.join(depths)} layers)" if len(depths) < cases else "")
        + f": {note}"
        for (note, depths), providers in shared.items()
    ]


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


def picture(rows: Rows) -> str:
    """The picture of a deep net's step in the demo's modes, with its figures as words; the README
    holds a copy."""
    title, peaks, times = demo_figures(rows)
    words = "; ".join(f"{m} {figure(peaks[m])} MB, {figure(times[m])} ms" for m in peaks)
    folder = f"{REPORTS.parent.name}/{REPORTS.name}/{rows.where(suite='depth')[0].device}"
    return f"![{title}: {words}]({folder}/{DEMO_PICTURE})"


def summary(rows: Rows) -> str:
    """What this project's modes cost and save, over all networks measured, and where it loses."""
    lines = []
    for mode in OURS:
        times = rows.where(suite="depth", provider=mode, metric="time", mode=MODE)
        peaks = rows.where(suite="depth", provider=mode, metric="peak", mode=MODE)
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
        (peak,) = rows.where(**key, metric="peak")
        line = [
            time.case,
            f"`{time.provider}`",
            time.mode,
            f"{figure(time.value)} ({figure(time.p20)}, {figure(time.p80)})",
            figure(rows.value(**key, metric="throughput")),
            ratio(time.ratio_to_eager),
            ratio(time.ratio_to_compile),
            f"{time.spread:.0%}" if time.spread is not None else "",
            figure(peak.value),
            ratio(peak.ratio_to_eager),
        ]
        if has_launches:
            launches = rows.value(**key, metric="launches")
            line.append(f"{launches:.0f}" if launches else "")
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


def _host_table(rows: Rows) -> str:
    lines = []
    for time in rows.where(suite="host", metric="host time"):
        head = [time.case, f"`{time.provider}`"]
        if time.value is None:
            lines.append([*head, time.note, "", "", "", ""])
            continue
        key = {"suite": "host", "case": time.case, "provider": time.provider}
        functions = rows.value(**key, metric="Python functions")
        lines.append(
            [
                *head,
                f"{figure(time.value)} {time.unit} ({figure(time.p20)}, {figure(time.p80)})",
                ratio(time.ratio_to_eager),
                ratio(time.ratio_to_compile),
                f"{time.spread:.0%}" if time.spread is not None else "",
                "" if functions is None else figure(functions),
            ]
        )
    header = [
        "case", "provider", "host time (p20, p80)", "of eager", "of compile", "spread",
        "Python functions",
    ]  # fmt: skip
    return table(header, lines, left=2)


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
    rates = rows.where(suite="kernel", case="device")
    parts = [f"{r.mode} {figure(r.value)} {r.unit}" for r in rates]
    return "Rates of the device, measured in the same run: " + ", ".join(parts) + "."


SECTIONS: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "depth": (
        "Networks against depth and batch",
        "Spread: distance between the 20th and 80th percentile of the ratio to eager over its "
        "median (for eager, of its own time).",
        lambda rows: _timed_table(rows, "depth"),
    ),
    "models": (
        "Standard nets",
        "On images of the size that a net is made for: 32x32, or 224x224 with ImageNet's stem.",
        lambda rows: _timed_table(rows, "models"),
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
        "(`resnetv2.planning.cost`). Floor: the larger of bytes over the faster copy rate and "
        "FLOPs over the rate of matrix products, launch by launch; gap: time over floor. Cold: a "
        "buffer larger than the L2 caches is written in between.",
        _kernel_table,
    ),
    "accuracy": (
        "Accuracy against float64",
        "Relative error (Euclidean norm over all elements), in brackets over eager's. More than "
        "twice eager's error of output or gradients is refused.",
        _accuracy_table,
    ),
    "host": (
        "Time of the host",
        "Processor time of a forward and a backward on one thread, without a CUDA graph, images of "
        "2x2 (networks: 8x8), 2 in a batch; median of rounds in which every provider takes its "
        "turn. A unit: difference of stages of 36 and 4 units over 32. Python functions: entered "
        "in the same. On a CPU eager's and ATen's kernels run and count; Triton's are launched by "
        "its own launcher over a driver that does nothing, as if for an H100.",
        _host_table,
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
    (peak,) = rows.where(suite="extreme depth", metric="peak")
    half = len(losses) // 2
    first, second = sum(losses[:half]) / half, sum(losses[half:]) / (len(losses) - half)
    return (
        f"{peak.case} in mode `{peak.provider}`: a step's peak is {figure(peak.value)} MB beyond "
        f"parameters, gradients and momentum. Mean loss of the first {half} steps {first:.3f}, of "
        f"the last {len(losses) - half} {second:.3f}. `{peak.command}`"
    )


def render(folder: Path) -> None:
    """Write the page and the plots of ``folder`` from its CSV."""
    rows = Rows(read(folder / CSV_NAME))
    (folder / PAGE).write_text(page(rows, folder.name), encoding="utf-8")
    if depth_cases(rows):
        plot_depth(rows, folder / "depth.png")
        plot_demo(rows, folder / DEMO_PICTURE)
    if rows.where(suite="kernel", metric="time"):
        plot_roofline(rows, folder / "roofline.png")


README = Path(__file__).parent.parent / "README.md"
_BLOCK = re.compile(r"(<!-- bench: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
BLOCKS: dict[str, Callable[[Rows], str]] = {
    "opening": opening,
    "demo": picture,
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
