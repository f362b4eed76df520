"""Outcomes as rows of the report, suite by suite."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace

from bench.host import HostTime
from bench.kernel_steps import KernelTime
from bench.schema import MODE, Row, versions
from resnetv2.measuring.cases import Case
from resnetv2.measuring.providers import COMPILE, EAGER
from resnetv2.measuring.rounds import Bench, Outcome, quantiles, spread
from resnetv2.measuring.worker import Failure


def timed_rows(suite: str, case: Case, outcomes: dict[str, Outcome]) -> Iterator[Row]:
    """Time, images/s, peak memory and launches of every provider and mode, or why not."""
    for name, outcome in outcomes.items():
        for mode in case.modes:
            blank = Row(suite, case.name, name, mode, "time", "ms", None, dtype=case.dtype)
            times = outcome.times.get(mode)
            if outcome.problem or times is None:
                yield replace(blank, note=outcome.problem or "not run: eager has no time")
                continue
            p20, p50, p80 = (1e3 * value for value in quantiles(times.seconds))
            row = replace(
                blank,
                trials=len(times.seconds),
                ratio_to_eager=_median(times.to_eager),
                ratio_to_compile=_median(times.to_compile),
                spread=spread(times.seconds if name == EAGER else times.to_eager),
            )
            yield replace(row, value=p50, p20=p20, p50=p50, p80=p80)
            speeds = [1e3 * case.batch / ms for ms in (p80, p50, p20)]
            yield replace(
                row,
                metric="throughput",
                unit="images/s",
                value=speeds[1],
                p20=speeds[0],
                p50=speeds[1],
                p80=speeds[2],
                ratio_to_eager=_inverse(row.ratio_to_eager),
                ratio_to_compile=_inverse(row.ratio_to_compile),
            )
            yield replace(
                row,
                metric="peak",
                unit="MB",
                value=outcome.peaks[mode] / 1e6,
                ratio_to_eager=_ratio(outcome, outcomes.get(EAGER), mode),
                ratio_to_compile=_ratio(outcome, outcomes.get(COMPILE), mode),
                trials=1,
                spread=None,
            )
            once = replace(blank, trials=1)
            launches = outcome.launches.get(mode)
            if launches is not None:
                yield replace(once, metric="launches", unit="kernels", value=float(launches))
            if outcome.compile_seconds and mode == case.modes[-1]:
                seconds = outcome.compile_seconds
                yield replace(once, metric="compile and first step", unit="s", value=seconds)


def _median(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def _inverse(value: float | None) -> float | None:
    return None if value is None else 1 / value


def _ratio(mine: Outcome, base: Outcome | None, mode: str) -> float | None:
    if base is None or base.problem or not base.peaks.get(mode):
        return None
    return mine.peaks[mode] / base.peaks[mode]


def accuracy_rows(case: Case, outcomes: dict[str, Outcome]) -> Iterator[Row]:
    """Relative errors against float64 of outputs, gradients and running statistics."""
    eager = outcomes[EAGER].errors
    for name, outcome in outcomes.items():
        row = Row("accuracy", case.name, name, MODE, "error", "", None, dtype=case.dtype, trials=1)
        if not outcome.errors or outcome.problem:
            yield replace(row, metric="error of gradients", trials=0, note=outcome.problem)
        if outcome.problem and not outcome.problem.startswith("refused"):
            continue
        for kind, error in outcome.errors.items():
            yield replace(
                row,
                metric=f"error of {kind}",
                value=None if outcome.problem else error,
                ratio_to_eager=error / eager[kind] if eager.get(kind) else None,
                note=outcome.problem,
            )


def largest(needs: Callable[[int], int], budget: int, first: int) -> tuple[int, int, int]:
    """Largest n >= 1 with needs(n) <= budget; (n, needs(n), how often needs was asked).

    needs grows about in proportion to n, so the next guess is on the line through two known
    points; in the end n was asked and fits, and n + 1 was asked and does not. 0 where not even 1
    fits. first: the first guess after 1.
    """
    known = {1: needs(1)}
    if known[1] > budget:
        return 0, known[1], 1
    low, high, guess = 1, 0, first
    while high != low + 1:
        guess = max(low + 1, min(guess, high - 1) if high else guess)
        known[guess] = needs(guess)
        if known[guess] <= budget:
            low = guess
        else:
            high = guess
        other = high or max(n for n in known if n != low)
        slope = max((known[other] - known[low]) / (other - low), 1.0)
        # The line's last n that fits; if that is known to, the one after it.
        guess = low + max(1, int((budget - known[low]) / slope))
    return low, known[low], len(known)


def limit_rows(
    bench: Bench, case: Case, vary: str, budget: int, first: int
) -> dict[str, tuple[str, Row]]:
    """Provider to ("" or what went wrong, its row): how far ``vary`` ("batch", "depth") can go.

    A training step of the size found was run, and so was one of the next size, which needs more.
    """
    unit = "images" if vary == "batch" else "layers"
    per_unit = 9 if case.block == "bottleneck" else 6

    def sized(n: int) -> Case:
        if vary == "batch":
            return case._replace(batch=n)
        return case._replace(depth=per_unit * n + 2)

    rows: dict[str, tuple[str, Row]] = {}
    for provider in bench.providers:
        row = Row(
            "limits", case.name, provider.name, MODE, f"largest {vary}", unit, None,
            dtype=case.dtype,
        )  # fmt: skip
        problem = f"not run: {provider.missing}" if provider.missing else ""
        if provider.compiles:
            problem = "not run: every size would be compiled anew"
        elif provider.graph:
            problem = "not run: a graph keeps its own pool of memory for every size"
        if not problem:
            outcome = Outcome(provider)

            def needs(n: int, outcome: Outcome = outcome) -> int:
                bench.say(
                    f"{outcome.provider.name}, {vary} {n if vary == 'batch' else sized(n).depth}"
                )
                taken = bench.ask(outcome, "need", sized(n), outcome.provider)
                if outcome.problem == "out of memory":
                    return 2 * budget
                if outcome.problem:
                    raise Failure(outcome.problem)
                return int(taken)

            try:
                found, used, trials = largest(needs, budget, first)
                value = float(found if vary == "batch" else sized(found).depth) if found else 0.0
                row = replace(row, value=value, trials=trials, note=f"needs {used / 1e6:.1f} MB")
            except Failure as failure:
                problem = str(failure)
        rows[provider.name] = (problem, replace(row, note=problem) if problem else row)
    base = rows.get(EAGER)
    if base and base[1].value:
        for name, (problem, row) in rows.items():
            if row.value is not None:
                rows[name] = (problem, replace(row, ratio_to_eager=row.value / base[1].value))
    return rows


def host_rows(case: Case, found: dict[str, HostTime]) -> Iterator[Row]:
    """Processor time and Python functions, of a unit or of a network's step."""
    unit, scale = ("ms a step", 1e3) if case.depth else ("us a unit", 1e6)
    for name, host in found.items():
        row = Row("host", case.name, name, MODE, "host time", unit, None, dtype=case.dtype)
        row = replace(row, versions=versions(1))
        if host.outcome.problem:
            yield replace(row, note=host.outcome.problem)
            continue
        times = host.times
        p20, p50, p80 = (scale * value for value in quantiles(times.seconds))
        yield replace(
            row,
            value=p50,
            p20=p20,
            p50=p50,
            p80=p80,
            ratio_to_eager=_median(times.to_eager),
            ratio_to_compile=_median(times.to_compile),
            spread=spread(times.seconds if name == EAGER else times.to_eager or times.seconds),
            trials=len(times.seconds),
        )
        if host.functions is not None:
            yield replace(
                row, metric="Python functions", unit=unit[3:], value=host.functions, trials=1
            )


def kernel_rows(case: Case, times: list[KernelTime], rates: dict[str, float]) -> Iterator[Row]:
    """Per kernel: time with cold and warm caches, bytes, FLOPs, floor and rates reached."""
    for kernel in times:
        for mode, seconds in (("cold", kernel.cold), ("warm", kernel.warm)):
            row = Row(
                "kernel", case.name, kernel.name, mode, "time", "ms", None, dtype=case.dtype,
                trials=len(seconds),
            )  # fmt: skip
            p20, p50, p80 = (1e3 * s for s in quantiles(seconds))
            yield replace(row, value=p50, p20=p20, p50=p50, p80=p80, spread=spread(seconds))
            figures: dict[str, tuple[str, float]] = {
                "bytes": ("MB", kernel.nbytes / 1e6),
                "FLOPs": ("MFLOP", kernel.flops / 1e6),
                "floor": ("ms", 1e3 * kernel.floor(rates)),
                "gap": ("x", p50 / (1e3 * kernel.floor(rates))),
                "bytes per second": ("GB/s", kernel.nbytes / p50 / 1e6),
                "FLOPs per second": ("GFLOP/s", kernel.flops / p50 / 1e6),
            }
            for metric, (unit, value) in figures.items():
                yield replace(row, metric=metric, unit=unit, value=value, trials=1)


def rate_rows(rates: dict[str, float], dtype: str) -> Iterator[Row]:
    """The device's own rates, as measured in the run."""
    for name, value in rates.items():
        unit = "GFLOP/s" if name == "multiply" else "GB/s"
        yield Row(
            "kernel", "device", "device", name, "rate", unit, value / 1e9, dtype=dtype, trials=1
        )
