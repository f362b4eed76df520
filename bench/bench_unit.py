"""One residual unit, forward and forward+backward, over the shapes of real networks."""

from __future__ import annotations

import pytest

from bench.conftest import CLOCK, settle
from bench.measure import quantiles


@pytest.mark.benchmark(timer=CLOCK)
def test_unit(case, mode, provider, session, replay, benchmark):
    outcome = session.timed("unit", case)[provider]
    settle(outcome.problem, outcome.provider.ours, benchmark)
    times = outcome.times[mode]
    info = {"peak_bytes": outcome.peaks[mode], "ratio_to_eager": quantiles(times.to_eager)[1]}
    replay(f"{case.name}, {mode}", times.seconds, info)
