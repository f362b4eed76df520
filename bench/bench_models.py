"""A training step of the standard nets that ``--model`` names."""

from __future__ import annotations

from bench.conftest import record_step


def test_step(case, mode, provider, session, benchmark):
    record_step(session.timed("models", case)[provider], case, mode, benchmark)
