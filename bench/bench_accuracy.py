"""Outputs, gradients and running statistics of every provider against float64."""

from __future__ import annotations

import pytest

from bench.suites import accuracy_rows


def test_accuracy(case, session):
    session.enter("accuracy")
    session.doing = case.name
    outcomes = session.bench.check_only(case)
    session.rows += accuracy_rows(case, outcomes)
    wrong = [
        f"{name}: {outcome.problem}"
        for name, outcome in outcomes.items()
        if outcome.provider.ours and outcome.problem.startswith(("failed", "refused"))
    ]
    if wrong:
        pytest.fail("; ".join(wrong), pytrace=False)
