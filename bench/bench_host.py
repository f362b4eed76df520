"""Processor time that a training step takes from the host, by unit and by step."""

from __future__ import annotations

import pytest

from bench.host import measure
from bench.suites import host_rows


def test_host(case, session):
    bench = session.enter("host")
    session.doing = case.name
    found = measure(bench, case)
    session.rows += host_rows(case, found)
    wrong = [
        f"{name}: {host.outcome.problem}"
        for name, host in found.items()
        if host.outcome.provider.ours and host.outcome.problem.startswith("failed")
    ]
    if wrong:
        pytest.fail("; ".join(wrong), pytrace=False)
