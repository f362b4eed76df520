"""A training step of a whole network against depth and against batch size."""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK, settle
from bench.measure import quantiles


@pytest.mark.benchmark(timer=CLOCK)
def test_step(case, mode, provider, session, replay, benchmark):
    outcome = session.timed("depth", case)[provider]
    settle(outcome.problem, outcome.provider.ours, benchmark)
    times = outcome.times[mode]
    info = {"peak_bytes": outcome.peaks[mode], "ratio_to_eager": quantiles(times.to_eager)[1]}
    replay(f"{case.name}, {mode}", times.seconds, info)
