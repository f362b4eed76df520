"""How a case is measured: every provider in turn, once it is right.

Providers run in processes of their own, which take their samples in turns, round after round, so
that all see the same machine; a ratio is the median over rounds of the ratio within a round.
Nothing is timed before outputs and gradients agree with float64.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..kernels.inspect.yardstick import allowed
from ..names import DTYPES
from .cases import Case
from .providers import COMPILE, EAGER, Provider
from .worker import Failure, Process

# A value within rounding of 0 may get the other sign, and its gradient passes a ReLU or does not:
# in eager as anywhere, but not the same values. So many of the smallest activated tensor's
# gradients may be wrong altogether, where eager was lucky.
FLIPS = 4
# What is wrong by half is refused however wrong eager is: gradients of zero are wrong by 1.
MOST = 0.5
GATED = ("out", "dx", "gradients")
LEAST_SAMPLE = 0.06  # seconds: shorter steps are repeated within a sample


@dataclass(frozen=True)
class Settings:
    """seconds: of timing a case's mode, per provider. rounds: least and most.

    patience: seconds after which a provider's process is given up. threads: 0 for torch's own.
    """

    seconds: float = 1.5
    rounds: tuple[int, int] = (8, 17)
    patience: float = 240.0
    threads: int = 0


@dataclass
class Times:
    """A provider's samples of one mode: seconds a run, one per round; ratios within a round."""

    seconds: list[float]
    to_eager: list[float] = field(default_factory=list)
    to_compile: list[float] = field(default_factory=list)


@dataclass
class Outcome:
    """What is known of one provider for one case. problem: why there are no figures, or ""."""

    provider: Provider
    problem: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    times: dict[str, Times] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)
    compile_seconds: float = 0.0


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[1], statistics.median(values), cuts[7]


def spread(values: Sequence[float]) -> float:
    """Distance between the 20th and the 80th percentile, over the median."""
    low, middle, high = quantiles(values)
    return (high - low) / middle


class Bench:
    """Runs cases over providers; keeps one host each for as long as it lives.

    Args:
        providers: eager among them. host: ``Process`` or, for tests, ``Inline``.
        say: is told what is going on, in a few words.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        settings: Settings,
        host: Callable[[int], Any] = Process,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.providers = list(providers)
        self.settings = settings
        self.say = say
        self.hosts = {p.name: host(settings.threads) for p in providers}
        self.reference = host(settings.threads)
        self.compiled: list[tuple[int, float]] = []  # (layers, seconds), of one suite
        self.compile_limit = math.inf
        self.checked: dict[Case, dict[str, Outcome]] = {}

    def close(self) -> None:
        """End all processes."""
        for host in (*self.hosts.values(), self.reference):
            host.close()

    def new_suite(self, compile_limit: float) -> None:
        """The cases that follow share ``compile_limit`` seconds of compiling."""
        self.compile_limit = compile_limit
        self.compiled.clear()

    def skip(self, case: Case, provider: Provider) -> str:
        """Why a provider is not asked at all, or ""."""
        if provider.missing:
            return f"not run: {provider.missing}"
        if not provider.compiles or not self.compiled:
            return ""
        layers, seconds = self.compiled[-1]
        limit = self.compile_limit
        ahead = seconds * case.layers / layers
        if sum(s for _, s in self.compiled) + ahead <= limit:
            return ""
        return (
            f"not run: compiling {layers} layers took {seconds:.0f} s, {case.layers} layers would "
            f"pass the {limit:.0f} s that compiling may take in a suite"
        )

    def check(self, case: Case) -> dict[str, Outcome]:
        """Build the case everywhere and hold results against float64; times are not taken.

        An outcome without a problem is ready to be timed.
        """
        outcomes = {p.name: Outcome(p, self.skip(case, p)) for p in self.providers}
        asked = [o for o in outcomes.values() if not o.problem]
        self.say("float64")
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "reference.pt")
            self.reference.send("reference", case, path)
            self.reference.receive(self.settings.patience)
            self.say("building and checking")
            for outcome in asked:
                self.hosts[outcome.provider.name].send("build", case, outcome.provider)
            for outcome in asked:
                self._receive(outcome)
            asked = [o for o in asked if not o.problem]
            for outcome in asked:
                self.hosts[outcome.provider.name].send("errors", path)
            for outcome in asked:
                answer = self._receive(outcome)
                if answer is not None:
                    outcome.errors, seconds = answer
                    outcome.compile_seconds = seconds if outcome.provider.compiles else 0.0
        spent = [o.compile_seconds for o in asked if o.provider.compiles]
        if spent:
            self.compiled.append((case.layers, max(spent)))
        eager = outcomes[EAGER]
        for outcome in outcomes.values():
            if not outcome.problem:
                outcome.problem = disagreement(outcome.errors, eager.errors, case)
        self.checked[case] = outcomes
        return outcomes

    def _receive(self, outcome: Outcome, patience: float = 0.0) -> Any:
        """A host's answer; None, and ``outcome.problem`` says why, if it failed."""
        try:
            host = self.hosts[outcome.provider.name]
            return host.receive(patience or self.settings.patience)
        except Failure as failure:
            text = str(failure)
            outcome.problem = text if text == "out of memory" else f"failed: {text}"
            return None

    def ask(self, outcome: Outcome, order: str, *arguments: Any, patience: float = 0.0) -> Any:
        """One order to one host, and its answer as ``_receive`` gives it.

        patience: seconds, 0 for the settings'.
        """
        self.hosts[outcome.provider.name].send(order, *arguments)
        return self._receive(outcome, patience)

    def run(self, case: Case) -> dict[str, Outcome]:
        """Check a case, and time what is right: provider's name to what came out."""
        outcomes = self.check(case)
        try:
            for mode in case.modes:
                self._time(case, mode, outcomes)
            for mode in case.modes:
                self.say(f"memory, {mode}")
                for outcome in self._right(outcomes):
                    outcome.peaks[mode] = self.ask(outcome, "peak", mode)
                for outcome in self._right(outcomes):
                    outcome.launches[mode] = self.ask(outcome, "launches", mode)
        finally:
            self._drop(outcomes)
        return outcomes

    def check_only(self, case: Case) -> dict[str, Outcome]:
        """``check``, or its outcome where the case was checked before; nothing stays built."""
        if case not in self.checked:
            self._drop(self.check(case))
        return self.checked[case]

    def _drop(self, outcomes: dict[str, Outcome]) -> None:
        for outcome in outcomes.values():
            if outcome.errors:
                try:
                    self.hosts[outcome.provider.name].send("drop")
                    self.hosts[outcome.provider.name].receive(self.settings.patience)
                except Failure:
                    continue

    @staticmethod
    def _right(outcomes: dict[str, Outcome]) -> list[Outcome]:
        return [outcome for outcome in outcomes.values() if not outcome.problem]

    def _time(self, case: Case, mode: str, outcomes: dict[str, Outcome]) -> None:
        """Warm up, then rounds in which every provider takes one sample, in a rotating order."""
        self.say(f"warming up, {mode}")
        seconds = {}
        for _ in range(2):  # first steps fault their pages in
            for outcome in self._right(outcomes):
                seconds[outcome.provider.name] = self.ask(outcome, "sample", mode, 1)
        eager = seconds.get(EAGER)
        if not eager:
            return
        repeats = max(1, math.ceil(LEAST_SAMPLE / eager))
        least, most = self.settings.rounds
        rounds = max(least, min(most, int(self.settings.seconds / (repeats * eager))))
        samples: dict[str, list[float]] = {o.provider.name: [] for o in self._right(outcomes)}
        for number in range(rounds):
            self.say(f"{mode}, round {number + 1} of {rounds}")
            order = self._right(outcomes)
            if not order:
                return
            turn = number % len(order)
            for outcome in order[turn:] + order[:turn]:
                taken = self.ask(outcome, "sample", mode, repeats)
                if taken is not None:
                    samples[outcome.provider.name].append(taken / repeats)
        for outcome in self._right(outcomes):
            mine = samples[outcome.provider.name]
            times = Times(mine)
            for base, ratios in ((EAGER, times.to_eager), (COMPILE, times.to_compile)):
                if base in samples and len(samples[base]) == len(mine):
                    ratios += [a / b for a, b in zip(mine, samples[base])]
            outcome.times[mode] = times


def disagreement(errors: dict[str, float], eager: dict[str, float], case: Case) -> str:
    """Why a provider's results are refused, or "": errors against float64, eager's beside them."""
    if not eager:
        return "not run: eager, which it is held against, has no results"
    flipped = math.sqrt(FLIPS / case.narrowest)
    for kind in GATED:
        if kind not in eager:
            continue
        most = allowed(eager[kind], 1.0, DTYPES[case.dtype])
        if kind != "out":
            most += flipped
        if not errors[kind] <= min(most, MOST):
            return (
                f"refused: relative error of {kind} {errors[kind]:.1e}, eager's {eager[kind]:.1e}"
            )
    return ""
