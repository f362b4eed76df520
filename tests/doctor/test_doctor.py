"""``doctor`` finds what is wrong, says what it could not check, and writes what it documents."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import resnetv2
from resnetv2.cli import main
from resnetv2.doctor import examination, report, surroundings
from resnetv2.doctor.report import NOT_CHECKED, RIGHT, WRONG, Check, Diagnosis
from resnetv2.doctor.surroundings import environment, missing
from resnetv2.doctor.verdict import verdict
from resnetv2.kernels import dispatch, reference, triton_engine
from resnetv2.kernels.inspect import accuracy
from resnetv2.kernels.inspect.accuracy import Steps
from resnetv2.kernels.inspect.cases import ODD
from resnetv2.measuring.cases import Case
from resnetv2.measuring.worker import Worker
from resnetv2.names import MEMORY_MODES
from tests.support.tape import Tape
from tests.support.yardstick import DEVICE, needs_triton

pytestmark = pytest.mark.usefixtures("one_thread")

FACTS = {"versions": {"torch": "2"}, "device": "cpu", "threads": 2, "backend": "aten",
         "variables": {}, "missing": [],
         "choices": {"file": "choices.json", "number": 0, "digest": None, "note": ""}}  # fmt: skip
GPU = {**FACTS, "capability": [9, 0], "backend": "triton"}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, quick_collections: None) -> None:
    """One unit of odd shape, and cases of a few pixels; on a CPU without its interpreter."""
    monkeypatch.setenv("RESNETV2_BACKEND", "triton" if DEVICE.type == "cuda" else "aten")
    unit = Case("a unit", "basic", 2, 0, 4, 4, size=4)
    monkeypatch.setattr(examination._Examination, "_cases", lambda self: [(unit, True)])
    monkeypatch.setattr(examination, "_SHAPES", (("basic", 5, 5, 1, 4, 3, "batch", "relu"),))
    monkeypatch.setattr(examination, "_LIMITS", {True: math.inf})


def test_the_json_holds_what_it_documents(small: None, tmp_path: Path) -> None:
    path = tmp_path / "doctor.json"
    result = CliRunner().invoke(main, ["doctor", "--quick", "--json", str(path)])
    assert result.exit_code == 0, result.output
    found = json.loads(path.read_text(encoding="utf-8"))
    described = set(re.findall(r"``(\w+)``", report.__doc__ or ""))
    assert found["schema"] == 1
    assert found["right"] is True
    assert found.keys() - {"schema"} < described
    assert found["environment"].keys() <= described
    assert {check["part"] for check in found["checks"]} == set(report.PARTS)
    for check in found["checks"]:
        assert check.keys() == {"part", "name", "state", "detail", "figures"}
        assert check["state"] in report.STATES
        assert check["state"] == RIGHT or check["detail"]
        assert check["figures"].keys() <= described
    speeds = {c["name"]: c["figures"] for c in found["checks"] if c["part"] == "speed"}
    assert speeds["a unit, eager"]["to_eager"] == 1
    for mode in MEMORY_MODES:
        assert speeds[f"a unit, {mode}"]["seconds"] > 0
        assert speeds[f"a unit, {mode}"]["peak_to_eager"] > 0
    assert found["verdict"].splitlines() == [found["verdict"]]
    assert found["verdict"] in result.stdout
    assert "speed: a unit" in result.stderr


def test_a_wrong_unit_is_found(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.norm_act

    def wrong(*args: Any) -> torch.Tensor:
        return right(*args) * 1.01

    monkeypatch.setattr(reference, "norm_act", wrong)
    monkeypatch.setattr(dispatch.AtenEngine, "moments", lambda self, x, norm=None: (
        reference.batch_moments(x)
    ))  # fmt: skip
    result = CliRunner().invoke(main, ["doctor", "--quick"])
    assert result.exit_code == 1
    assert "wrong: " in result.output.splitlines()[-1]
    assert "refused: relative error" in result.output


def test_what_is_out_of_time_is_said(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_LIMITS", {True: 0.0})
    found = resnetv2.doctor(quick=True)
    assert found.right
    assert {check.state for check in found.checks} == {NOT_CHECKED}
    assert found.verdict.startswith("nothing was checked: the 0 s")


@needs_triton
@pytest.mark.parametrize("unit", ODD[1:], ids=lambda unit: unit.name)
def test_kernels_are_right(unit: Any) -> None:
    """Of all that a chain launches, in the interpreter or on a GPU."""
    steps = Steps(unit, "fp32", DEVICE)
    labels = steps.labels()
    assert not steps.failures
    for label in labels:
        assert steps.kernels[label], label
        name, excess = steps.check(label).worst()
        assert excess <= 1, (label, name)


@needs_triton
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_engine.TritonEngine.moments
    monkeypatch.setattr(accuracy, "MOST_DRAWS", 1)
    engine = triton_engine.TritonEngine
    monkeypatch.setattr(engine, "moments", lambda self, x, norm=None: right(self, x, norm) * 1.001)
    (check,) = (
        check
        for check in examination._steps(ODD[1], "fp32", DEVICE)
        if check.name == "odd bottleneck, moments, fp32"
    )
    assert check.state == WRONG
    assert "_moments_kernel" in check.detail


@needs_triton
def test_a_kernel_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> Any:
        raise RuntimeError("no such thing\nat all")

    monkeypatch.setattr(triton_engine.TritonEngine, "moments", failing)
    (check,) = examination._steps(ODD[1], "fp32", DEVICE)
    assert (check.state, check.detail) == (WRONG, "RuntimeError: no such thing")


def test_bits_in_a_graph_are_compared(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with the tests' recorder."""
    monkeypatch.setenv("RESNETV2_BACKEND", "aten")
    recorder = {} if DEVICE.type == "cuda" else {"recorder": Tape}
    checks = list(examination._Examination(True, print).bits(lambda: Worker(**recorder)))
    assert [check.state for check in checks] == [RIGHT] * 4, checks
    assert sum("CUDA graph" in check.name for check in checks) == 2


def speed(name: str, seconds: float, **figures: float) -> Check:
    values = {"seconds": seconds, "to_eager": seconds, "peak_to_eager": 0.5, **figures}
    return Check("speed", name, RIGHT, "", values)


EAGER = speed("a net, eager", 1.0)


@pytest.mark.parametrize(
    ("checks", "facts", "expected"),
    [
        ([EAGER, speed("a net, recompute", 0.4)], GPU, "right, 2.5x eager (a net), 0.5x its"),
        (
            [EAGER, speed("a net, eager + graph", 0.9), speed("a net, recompute", 0.5),
             speed("a net, recompute + graph", 0.3)],
            GPU,
            "right, 2x eager (a net; both in a CUDA graph 3x), 0.5x its memory",
        ),
        ([EAGER, speed("a net, recompute", 1.25)], FACTS,
         "right, but slower than eager for a net (0.80x): on a CPU"),
        (
            [EAGER, speed("a net, recompute", 2.0, host_seconds=1.9),
             speed("a net, recompute + graph", 0.5)],
            GPU,
            "(0.50x): the host takes 1.9e+03 ms of a step of 2e+03 ms: capture it as a CUDA graph, "
            "which takes 500 ms",
        ),
        ([EAGER, speed("a net, recompute", 2.0)], {**GPU, "backend": "aten", "capability": [7, 5]},
         "below sm_80"),
        ([EAGER, speed("a net, recompute", 2.0)], GPU, "report it"),
        ([Check("bits", "recompute, twice", WRONG, "other bits in dx"), EAGER], GPU,
         "wrong: 1 of 2 checks failed: recompute, twice: other bits in dx"),
        ([Check("bits", "a", RIGHT), Check("bits", "b", NOT_CHECKED, "no GPU")], GPU,
         "right; nothing was timed; 1 of 2 checks could not be made"),
    ],
)  # fmt: skip
def test_the_verdict(checks: list[Check], facts: dict[str, Any], expected: str) -> None:
    text = verdict(checks, facts, "recompute", "eager")
    assert expected in text
    printed = str(Diagnosis({**FACTS}, tuple(checks), text, True, 1.0, "now"))
    assert printed.endswith(text)


def test_what_is_missing_comes_with_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "has_triton", lambda: False)
    triton = next(each for each in missing(torch.device("cpu")) if each["what"] == "triton")
    assert triton["command"] == "python -m pip install triton"
    printed = str(Diagnosis(environment(torch.device("cpu")), (), "", True, 1.0, "now"))
    assert "missing: triton (" in printed


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--json", "none/here/d.json"], {}, "there is no folder"),
        (["--json", "."], {}, "directory"),
        (["--fast"], {}, "--fast"),
        ([], {"RESNETV2_BACKEND": "cuda"}, "RESNETV2_BACKEND must be one of"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], variables: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        result = CliRunner(env=variables).invoke(main, ["doctor", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
