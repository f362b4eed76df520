"""One residual unit, forward and forward+backward, over the shapes of real networks."""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK, replay_step


@pytest.mark.benchmark(timer=CLOCK)
def test_unit(case, mode, provider, session, replay, benchmark):
    replay_step(session.timed("unit", case)[provider], case, mode, replay, benchmark)
