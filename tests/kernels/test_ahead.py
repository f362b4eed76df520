"""A new program's kernels are compiled side by side, before the first of them is launched."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import ahead
from resnetv2.kernels.inspect import stub_driver
from tests.support.processes import python


def step(folder: Path, fails: str) -> dict[str, object]:
    """A bottleneck's first step, ``fails`` a kernel that does not compile."""
    if stub_driver.missing():
        pytest.skip(stub_driver.missing())
    if not ahead._RAISES:
        pytest.skip("this Triton launches what did not compile")
    found = python(
        "-m", "tests.support.ahead_checks", str(folder), fails,
        without=["TRITON_INTERPRET"], env={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    return json.loads(found)


def test_all_are_compiled_in_other_threads_and_once(tmp_path: Path) -> None:
    found = step(tmp_path, "none")
    assert Counter(found["compiled"]) == Counter(found["started"])
    assert len(found["compiled"]) > 10
    assert (found["in_main"], found["said"]) == (0, [])


def test_one_that_does_not_compile_is_replaced_at_its_launch(tmp_path: Path) -> None:
    found = step(tmp_path, "_norm_act_kernel")
    assert len(found["said"]) == 1
    assert "_norm_act_kernel: PassManager::run failed" in found["said"][0]


def test_a_step_does_not_depend_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_RAISES", True)
    monkeypatch.setattr(ahead, "processors", lambda: 2)
    monkeypatch.setattr(ahead.launch, "INTERPRET", False)
    monkeypatch.setattr(ahead.launch, "device_of", lambda tensor: None)

    def run() -> None:
        raise KeyError("no such operator on meta")

    with pytest.warns(RuntimeWarning, match="one at a time.*no such operator"):
        ahead.compile_ahead(run, torch.device("cpu"))
