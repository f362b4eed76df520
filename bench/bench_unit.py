"""One residual unit, forward and forward+backward, over the shapes of real networks."""

from __future__ import annotations

from bench.conftest import record_step


def test_unit(case, mode, provider, session, benchmark):
    record_step(session.timed("unit", case)[provider], case, mode, benchmark)
