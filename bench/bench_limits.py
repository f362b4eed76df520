"""The largest batch and the greatest depth whose training step fits a budget."""

from __future__ import annotations

import pytest

from bench.suites import limit_rows
from resnetv2.measuring.cases import network

# Bytes for parameters, momentum, gradients and all else, without a GPU and with one.
BUDGET = {False: 64 * 10**6, True: 8 * 10**9}


@pytest.mark.parametrize("vary", ["batch", "depth"])
def test_limit(vary, session):
    session.enter("limits")
    dtype = "bf16" if session.cuda else "fp32"
    budget = BUDGET[session.cuda]
    if vary == "batch":
        block, depth = ("bottleneck", 164) if session.cuda else ("basic", 56)
        case = network(block, depth, 1, dtype)
        name, first = f"{block} ResNet-{depth} in {budget / 1e6:.0f} MB", 2
    else:
        case = network("bottleneck", 11, 128 if session.cuda else 4, dtype)
        name, first = f"bottleneck ResNets, batch {case.batch}, in {budget / 1e6:.0f} MB", 4
    session.doing = name
    rows = limit_rows(session.bench, case._replace(name=name), vary, budget, first)
    session.rows += [row for _, row in rows.values()]
    ours = {p.name for p in session.bench.providers if p.ours}
    wrong = [f"{n}: {problem}" for n, (problem, _) in rows.items() if n in ours and problem]
    assert not [w for w in wrong if "not run" not in w], wrong
