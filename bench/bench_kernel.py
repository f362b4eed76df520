"""Kernels alone, with cold and warm caches, beside the floor of the cost model."""

from __future__ import annotations

from bench import kernel_steps
from bench.suites import kernel_rows, rate_rows


def test_kernels(case, session):
    session.suite, session.doing = "kernel", case.name
    if not session.rates:
        session.say("the device's rates")
        session.rates = kernel_steps.device_rates(case.dtype)
        session.rows += rate_rows(session.rates, case.dtype)
    times = kernel_steps.measure(case, 100 if session.full else 30, 1.0, session.say)
    session.rows += kernel_rows(case, times, session.rates)
    assert all(kernel.nbytes > 0 for kernel in times)
