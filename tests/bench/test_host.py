"""The suite "host": differences of stages, what has no figures, calls that no load changes."""

import pytest

from bench import cases, host, report, schema
from bench.providers import host_providers
from bench.suites import host_rows
from resnetv2.kernels.inspect import host_time, stub_driver
from resnetv2.measuring.providers import EAGER, Provider
from resnetv2.measuring.rounds import Bench, Settings
from resnetv2.measuring.worker import Inline, Process

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = Settings(patience=300.0, threads=1)
UNITS = [case for case in cases.host_cases(False, False) if not case.depth]
CHAINS = [case for case in UNITS if case.dtype == "bf16"]
# Entered for a unit, forward and backward: 31 and 41 in mode recompute, fewer in invert.
FUNCTIONS = {"basic": 34, "bottleneck": 45}
TOY = cases.network("basic", 8, 2, "bf16")._replace(size=8)


def raises(case):
    raise RuntimeError("taken out")


def measure(providers, case, kind=Inline, few=1):
    bench = Bench(providers, SETTINGS, host=kind)
    try:
        return host.measure(bench, case, few=few, rounds=2)
    finally:
        bench.close()


def on_aten():
    return [p for p in host_providers() if p.name == EAGER or p.name.endswith("ATen")]


def test_calls_are_counted():
    def inner():
        return len([])

    def step():
        inner()
        inner()

    assert host_time.calls(step) == 3


@pytest.mark.parametrize("case", [CHAINS[0]._replace(units=3), TOY], ids=["units", "network"])
def test_rows(case, tmp_path):
    providers = [*on_aten(), Provider("broken", raises), Provider("peer", raises, missing="no GPU")]
    found = measure(providers, case)
    rows = list(host_rows(case, found))
    for name in (p.name for p in on_aten()):
        mine = {r.metric: r for r in rows if r.provider == name}
        assert mine["host time"].trials == 2
        assert mine["host time"].unit == ("ms a step" if case.depth else "us a unit")
        assert mine["Python functions"].value > 1
    assert found[EAGER].times.to_eager == [1.0, 1.0]
    notes = {r.provider: r.note for r in rows if r.value is None}
    assert notes == {"broken": "failed: RuntimeError: taken out", "peer": "not run: no GPU"}

    schema.renew(tmp_path, rows, 2, "python -m pytest bench/ --suite host")
    kept = schema.Rows(schema.read(tmp_path / schema.CSV_NAME))
    assert all("1 threads" in row.versions for row in kept.rows)
    text = report.page(kept, "here")
    assert "## Time of the host" in text
    assert "| `peer` | not run: no GPU |" in text


def test_what_compiles_has_a_limit():
    compiled = Provider("compile", raises, compiles=True)
    bench = Bench([on_aten()[0], compiled], SETTINGS, host=Inline)
    bench.new_suite(10.0)
    bench.compiled.append((4, 10.0))
    found = host.measure(bench, CHAINS[0]._replace(units=3), few=1, rounds=2)
    bench.close()
    assert "compiling 4 layers took 10 s" in found["compile"].outcome.problem


@pytest.mark.parametrize("case", CHAINS, ids=lambda case: case.block)
def test_python_functions_of_a_unit_on_triton(case, monkeypatch):
    """By Triton's real launcher, in processes where kernels are compiled."""
    if stub_driver.missing():
        pytest.skip(stub_driver.missing())
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    names = (EAGER, "recompute, Triton", "invert, Triton")
    providers = [p for p in host_providers() if p.name in names]
    found = measure(providers, case._replace(units=12), Process, few=4)
    for name in names[1:]:
        assert found[name].outcome.problem == ""
        assert 0 < found[name].functions <= FUNCTIONS[case.block]
