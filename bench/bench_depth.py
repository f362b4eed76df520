"""A training step of a whole network against depth and against batch size."""

from __future__ import annotations

from bench.conftest import record_step


def test_step(case, mode, provider, session, benchmark):
    record_step(session.timed("depth", case)[provider], case, mode, benchmark)
