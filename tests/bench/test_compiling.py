"""What a first step compiles: dry runs of three networks on every target, and the table of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the dry run needs Triton")

from bench import compiling
from bench.compiling import ATENS, NETS, OUT, Row
from resnetv2.kernels.inspect.dryrun import DEVICES
from tests.support.compiled import compiled

TARGETS = [*ATENS, *DEVICES]
LISTED = """
import json

import torch

from bench.compiling import FEW, NETS, step_of
from resnetv2.kernels.inspect.dryrun import DEVICES, dry_run

torch.set_num_threads(1)
found = {}
for net in NETS:
    step = step_of(net, "triton", FEW.get(net))
    for target in DEVICES:
        with dry_run(target, lambda digest: False) as run:
            step()
        digests = {each.digest for each in run.listed}
        found[f"{net} {target}"] = len(run.listed), len(digests), run.failures
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def listed() -> Any:
    return json.loads(compiled("-c", LISTED))


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("net", NETS)
def test_dry_run(net: str, target: str, listed: Any) -> None:
    """All launches are made, for few kernels."""
    launches, kernels, failures = listed[f"{net} {target}"]
    assert failures == []
    assert launches > 100
    assert 30 < kernels < 100


def test_below_sm80_nothing_is_compiled() -> None:
    assert {target: compiling.backend_on(target) for target in TARGETS} == {
        target: "aten" if target == "sm_75" else "triton" for target in TARGETS
    }


def row(net: str, target: str, seconds: float) -> Row:
    return Row(net, target, "triton", 500, 70, seconds, 30.0, 0, "_k 1.0", 128, 2, 0.1, 2, "torch")


def test_rows_of_others_stay(tmp_path: Path) -> None:
    first, second = NETS.keys() - {"preact_resnet50"}
    compiling.write(tmp_path, [row(first, "sm_90", 20.0), row(second, "sm_80", 30.0)], "command")
    compiling.write(tmp_path, [row(first, "sm_90", 25.0)], "command again")
    with (tmp_path / "networks.csv").open() as lines:
        found = {(e["network"], e["target"]): e["cpu_seconds"] for e in csv.DictReader(lines)}
    assert found == {(first, "sm_90"): "25.0", (second, "sm_80"): "30.0"}
    page = (tmp_path / "networks.md").read_text()
    assert "command again" in page
    assert "Most processor seconds of a network and target: 30.0" in page


def test_the_committed_table_is_whole_and_within_the_limit() -> None:
    with (OUT / "networks.csv").open() as lines:
        entries = list(csv.DictReader(lines))
    assert [(e["network"], e["target"]) for e in entries] == [(n, t) for n in NETS for t in TARGETS]
    for entry in entries:
        assert float(entry["cpu_seconds"]) <= 2 * compiling.LIMIT
        assert int(entry["again"]) == 0
        assert (entry["target"] in ATENS) == (entry["kernels"] == "0")
