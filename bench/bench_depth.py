"""A training step of a whole network against depth and against batch size."""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK, replay_step


@pytest.mark.benchmark(timer=CLOCK)
def test_step(case, mode, provider, session, replay, benchmark):
    replay_step(session.timed("depth", case)[provider], case, mode, replay, benchmark)
