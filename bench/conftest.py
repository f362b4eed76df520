"""Options, progress and the report of `python -m pytest bench/`; see README, "Benchmarks"."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cases, report, schema
from bench.providers import all_providers, host_providers
from bench.schema import SUITES, Row
from bench.suites import timed_rows
from resnetv2.measuring.rounds import Bench, Outcome, Settings, quantiles

# What compiling may take in a quick run on a CPU: units are small, and a net of 20 layers is
# compiled whatever it takes, being the first.
COMPILE_SECONDS = {"unit": 180.0, "depth": 60.0, "accuracy": 240.0}
FILES = {f"bench_{name}.py": name for name in SUITES[:-1]}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench", "throughput and memory of residual networks")
    size = group.addoption
    size("--quick", action="store_true", help="few cases; the default without a GPU")
    size("--full", action="store_true", help="all cases; with --suite part by part")
    size("--suite", choices=SUITES[:-1], action="append", help="this suite only (repeatable)")
    size("--model", action="append", default=[], help="this standard net only (repeatable)")
    size("--graphs", action="store_true", help="each provider in a CUDA graph as well")
    size("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    size("--out", type=Path, help="the report's folder (default: bench/reports/<device>)")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("expected one of --quick and --full, got both")
    try:
        cases.model_cases(config.getoption("--model"), cuda=False)
    except ValueError as error:
        raise pytest.UsageError(f"--model: {error}") from error
    if "models" in (config.getoption("--suite") or ()) and not config.getoption("--model"):
        raise pytest.UsageError("expected --model NAME with --suite models, got none")
    # Providers in processes of their own inherit these.
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compile times as on a first run
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    os.environ.pop("TRITON_INTERPRET", None)
    if threads := config.getoption("--threads"):
        torch.set_num_threads(threads)
    config.stash[_SESSION] = Session(config)


_SESSION = pytest.StashKey["Session"]()


class Session:
    """One run: its providers' processes, its rows, and what it says meanwhile."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.full = bool(config.getoption("--full"))
        self.cuda = torch.cuda.is_available()
        self.threads = torch.get_num_threads()
        self.rows: list[Row] = []
        self.rates: dict[str, float] = {}
        self.outcomes: dict[tuple[str, str], dict[str, Outcome]] = {}
        self.start = time.monotonic()
        self.suite = ""
        self.doing = ""
        self._bench: Bench | None = None
        self._host_bench: Bench | None = None

    @property
    def settings(self) -> Settings:
        return Settings(
            seconds=4.0 if self.full else 1.3,
            patience=1800.0 if self.full else 300.0,
            threads=self.threads,
        )

    @property
    def bench(self) -> Bench:
        """Started when it is first needed."""
        if self._bench is None:
            providers = all_providers(bool(self.config.getoption("--graphs")))
            self._bench = Bench(providers, self.settings, say=self.say)
        return self._bench

    @property
    def host_bench(self) -> Bench:
        """Its providers are others, on one thread each; started when it is first needed."""
        if self._host_bench is None:
            settings = replace(self.settings, threads=1)
            self._host_bench = Bench(host_providers(), settings, say=self.say)
        return self._host_bench

    def enter(self, suite: str) -> Bench:
        """A case of ``suite`` follows: what compiling may take is a suite's."""
        bench = self.host_bench if suite == "host" else self.bench
        if suite != self.suite:
            self.suite = suite
            limit = COMPILE_SECONDS.get(suite, 60.0)
            bench.new_suite(30 * limit if self.full else 3 * limit if self.cuda else limit)
        return bench

    def say(self, what: str) -> None:
        """The progress line: minutes and seconds, suite, case, what is going on."""
        seconds = int(time.monotonic() - self.start)
        text = f"{seconds // 60:3}:{seconds % 60:02} {self.suite}: {self.doing}: {what}"
        stream = sys.__stderr__
        capture: Any = self.config.pluginmanager.getplugin("capturemanager")
        if stream is None:
            return
        with capture.global_and_fixture_disabled():
            if stream.isatty():
                stream.write(f"\r\x1b[K{text[:110]}")
            elif "round" not in what or what.split("round ")[1].startswith("1 "):
                stream.write(text + "\n")
            stream.flush()

    def timed(self, suite: str, case: cases.Case) -> dict[str, Outcome]:
        """The case's outcomes, measured when they are first asked for."""
        key = (suite, case.name)
        if key not in self.outcomes:
            self.enter(suite)
            self.doing = case.name
            self.outcomes[key] = self.bench.run(case)
            self.rows += timed_rows(suite, case, self.outcomes[key])
        return self.outcomes[key]

    def finish(self) -> Path | None:
        """End the processes and write the report; its folder, or None where nothing was run."""
        for bench in (self._bench, self._host_bench):
            if bench is not None:
                bench.close()
        if not self.rows:
            return None
        folder = self.config.getoption("--out") or schema.REPORTS / schema.device_name()
        arguments = [str(a) for a in self.config.invocation_params.args]
        kept = [a for a in arguments if not a.startswith(("--out", "-q", "-v", "-p"))]
        command = shlex.join(["python", "-m", "pytest", *kept])
        schema.renew(folder, self.rows, self.threads, command)
        report.render(folder)
        return folder


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Suites in their order, and only those that were asked for."""
    nets = config.getoption("--model")
    wanted = config.getoption("--suite") or (["models"] if nets else set(SUITES) - {"models"})
    suite = {item: FILES.get(item.path.name, "") for item in items}
    dropped = [item for item in items if suite[item] not in wanted]
    items[:] = [item for item in items if suite[item] in wanted]
    items.sort(key=lambda item: SUITES.index(suite[item]))
    config.hook.pytest_deselected(items=dropped)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case and provider of the module's suite, and each mode of the case."""
    if "case" not in metafunc.fixturenames:
        return
    session = metafunc.config.stash[_SESSION]
    suite = FILES[metafunc.definition.path.name]
    if suite == "models":
        all_cases = cases.model_cases(metafunc.config.getoption("--model"), session.cuda)
    else:
        chosen = getattr(cases, f"{'depth' if suite == 'limits' else suite}_cases")
        all_cases = chosen(session.full, session.cuda)
    names = [p.name for p in all_providers(bool(metafunc.config.getoption("--graphs")))]
    if "mode" in metafunc.fixturenames:
        values = [(c, m, n) for c in all_cases for m in c.modes for n in names]
        ids = [f"{c.name}-{m}-{n}" for c, m, n in values]
        metafunc.parametrize(("case", "mode", "provider"), values, ids=ids)
    elif "provider" in metafunc.fixturenames:
        pairs = [(c, n) for c in all_cases for n in names]
        metafunc.parametrize(("case", "provider"), pairs, ids=[f"{c.name}-{n}" for c, n in pairs])
    else:
        metafunc.parametrize("case", all_cases, ids=[c.name for c in all_cases])


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The run's session."""
    return request.config.stash[_SESSION]


def settle(outcome: Outcome) -> None:
    """End a test whose provider has no figures: a failure where this project is at fault."""
    if not outcome.problem:
        return
    if outcome.provider.ours and outcome.problem.startswith(("failed", "refused")):
        pytest.fail(outcome.problem, pytrace=False)
    pytest.skip(outcome.problem)


def record(benchmark: Any, group: str, seconds: list[float], figures: dict[str, Any]) -> None:
    """Hand finished samples to pytest-benchmark, for its table and its JSON.

    It is not asked to measure: it would time one provider after another, in this process. Its
    fixture has no public way in for samples, so the method is called that its own runs call.
    """
    benchmark.group = group
    benchmark.extra_info.update(figures)
    if benchmark.enabled:
        stats = benchmark._make_stats(iterations=1)
        for sample in seconds:
            stats.update(sample)


def record_step(outcome: Outcome, case: cases.Case, mode: str, benchmark: Any) -> None:
    """A test of one provider's steps: ends it where there are no figures, or records them."""
    benchmark.skipped = True  # of its own measuring; it would warn that it was not used
    settle(outcome)
    times = outcome.times[mode]
    figures = {"peak_bytes": outcome.peaks[mode], "ratio_to_eager": quantiles(times.to_eager)[1]}
    record(benchmark, f"{case.name}, {mode}", times.seconds, figures)


@pytest.fixture(autouse=True, scope="session")
def _written(session: Session) -> Iterator[None]:
    yield
    folder = session.finish()
    if folder is not None:
        session.doing, session.suite = "", "report"
        session.say(f"wrote {folder}")
