"""Time of the host for a unit and for a step: every provider in turn, in processes of their own.

What a unit costs is the difference of a step of many units and one of few, over the difference of
their numbers. Without a GPU the kernels are launched by Triton's own launcher over a driver that
does nothing (``resnetv2.kernels.inspect.stub_driver``), so results are not looked at here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from resnetv2.measuring.cases import Case
from resnetv2.measuring.providers import COMPILE, EAGER
from resnetv2.measuring.rounds import Bench, Outcome, Times

FEW = 4  # units of the shorter stage
ROUNDS = 10
WARM_UP = 3


@dataclass
class HostTime:
    """A provider's processor time for a unit or a step, round by round.

    functions: Python functions entered, where backward runs in the thread that asks for it.
    """

    outcome: Outcome
    times: Times
    functions: float | None = None


def measure(bench: Bench, case: Case, few: int = FEW, rounds: int = ROUNDS) -> dict[str, HostTime]:
    """Provider's name to what it takes: seconds for a step of a network, or for a unit."""
    outcomes = {p.name: Outcome(p, bench.skip(case, p)) for p in bench.providers}
    cases = [case] if case.depth else [case, case._replace(units=few)]
    extra = 1 if case.depth else case.units - few
    try:
        for outcome in outcomes.values():
            _warm_up(bench, cases, outcome)
        taken: dict[str, list[list[float]]] = {name: [] for name in outcomes}
        for number in range(rounds):
            bench.say(f"round {number + 1} of {rounds}")
            order = [outcome for outcome in outcomes.values() if not outcome.problem]
            turn = number % max(1, len(order))
            for outcome in order[turn:] + order[:turn]:
                answer = bench.ask(outcome, "host_seconds")
                if answer is not None:
                    taken[outcome.provider.name].append(answer)
        result = {}
        for name, outcome in outcomes.items():
            functions = None if outcome.problem else bench.ask(outcome, "host_calls")
            result[name] = HostTime(
                outcome,
                Times([_difference(sample) / extra for sample in taken[name]]),
                functions and _difference(functions) / extra,
            )
    finally:
        for outcome in outcomes.values():
            if not outcome.problem:
                bench.ask(outcome, "drop")
    for mine in result.values():
        for base, ratios in ((EAGER, mine.times.to_eager), (COMPILE, mine.times.to_compile)):
            other = result[base].times.seconds if base in result else []
            if len(other) == len(mine.times.seconds):
                ratios += [a / b for a, b in zip(mine.times.seconds, other)]
    return result


def _warm_up(bench: Bench, cases: list[Case], outcome: Outcome) -> None:
    """First steps, in which kernels and programs are made; what compiles has its limit for it."""
    if outcome.problem:
        return
    name, compiles = outcome.provider.name, outcome.provider.compiles
    bench.say(f"building and first steps, {name}")
    bench.ask(outcome, "host_build", cases, outcome.provider)
    left = bench.compile_limit - sum(seconds for _, seconds in bench.compiled)
    start = time.perf_counter()
    for _ in range(WARM_UP):
        if not outcome.problem:
            bench.ask(outcome, "host_seconds", patience=left if compiles else 0.0)
    if compiles:
        bench.compiled.append((sum(c.layers for c in cases), time.perf_counter() - start))
        if "gave up" in outcome.problem:
            outcome.problem = f"not run: compiling passed the {left:.0f} s that were left for it"


def _difference(values: list[float]) -> float:
    """Of the first and the second, where there is one."""
    return values[0] - sum(values[1:])
