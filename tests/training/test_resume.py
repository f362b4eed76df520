"""A run killed by SIGKILL at any moment goes on to the same bits (see resume_trials.py), and
checkpoints that are broken are passed over with a line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resnetv2.data.datasets import create_synthetic_dataset
from resnetv2.errors import InputError
from resnetv2.training.checkpoint import Checkpoints, read
from resnetv2.training.environment import cpu_threads
from resnetv2.training.log import read_config
from resnetv2.training.run import train_resnet_v2
from tests.support.resume_trials import KILLS, course, differences, newest, trials

ROOT = Path(__file__).parents[2]
TRIALS = trials()
# Seconds after which a trial hangs.
TIMEOUT = 1800
SMALL = create_synthetic_dataset(40, 4, image_size=8)


@pytest.fixture(autouse=True)
def _on_one_thread(one_thread: None) -> None:
    pass


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What came of every trial; they share one process that has imported everything."""
    if not hasattr(os, "fork"):
        pytest.skip("the trials are forks of one process, which this system has not")
    folder = tmp_path_factory.mktemp("trials")
    done = start(str(folder))
    assert done.returncode == 0, done.stderr[-4000:]
    yield {**json.loads((folder / "results.json").read_text()), "folder": folder}
    shutil.rmtree(folder)


def start(*words: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(
            [sys.executable, str(ROOT / "tests/support/resume_trials.py"), *words],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(
            f"not done after {TIMEOUT} s, of which a free core needs a small part: a run hangs, or "
            f"this machine is loaded ({os.getloadavg()[0]:.0f} processes wait); {error.stderr!r}"
        )


@pytest.mark.parametrize("name", TRIALS)
def test_killed_run_ends_with_the_same_bits(name: str, results: dict[str, Any]) -> None:
    """Weights, momentum, average, statistics, scaler, random states, history and log."""
    deaths = results[name]["deaths"]
    assert [death["error"] for death in deaths] == [""] * len(TRIALS[name].kills)
    assert [death["killed"] for death in deaths] == [True] * len(TRIALS[name].kills)
    assert not results[name]["differs"]


def test_kills_came_at_all_stages(results: dict[str, Any]) -> None:
    """Or the trials above would show little."""
    plain = [results[name]["deaths"][0] for name in list(TRIALS)[:KILLS]]
    # A moment of the clock is another stage on another day, or under load.
    plain = [death for death in plain if death["how"] != "clock"]
    assert len(plain) == KILLS - 3
    assert {death["stage"] for death in plain} == {"start", "step", "checkpoint", "log", "test"}
    assert sum(death["checkpoints"] == 0 for death in plain) >= 2
    assert sum(death["torn"] for death in plain) >= 4, "few kills within a checkpoint's writing"
    assert len({death["steps"] for death in plain}) >= 8


def test_the_same_bits_from_processes_of_their_own(results: dict[str, Any]) -> None:
    """What a process imports on the way, and forks of a warm one have, changes no random state."""
    folder = results["folder"]
    out = folder / "dropout" / "cold"
    killed = start(str(folder), "dropout", str(out), "5")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert newest(out)["step"] == 3
    ended = start(str(folder), "dropout", str(out), "0")
    assert ended.returncode == 0, ended.stderr
    whole = folder / "dropout" / "whole"
    assert not list(differences(newest(out), newest(whole)))
    assert course(out) == course(whole)


def test_differences_sees_one_bit() -> None:
    weight = torch.arange(4.0)
    other = weight.clone()
    other[2] = torch.nextafter(other[2], torch.tensor(9.0))
    state = {"model": {"a": weight}, "history": [{"loss": 1.0, "seconds": 1.0}]}
    assert not list(differences(state, {**state, "history": [{"loss": 1.0, "seconds": 2.0}]}))
    assert list(differences(state, {**state, "model": {"a": other}})) == ["/model/a"]
    assert list(differences(state, {"model": {"a": weight}, "history": []})) == [
        "/history: 1 and 0"
    ]
    assert list(differences({"a": torch.tensor(0.0)}, {"a": torch.tensor(-0.0)})) == ["/a"]


# --- broken checkpoints


def run(out: Path, **options: Any) -> Any:
    defaults = {
        "depth": 8, "backend": "aten", "device": "cpu", "batch_size": 8, "epochs": 2,
        "checkpoint_every": 3, "log_steps": True, "verbose": False, "resume": "auto",
    }  # fmt: skip
    return train_resnet_v2(SMALL, **{**defaults, **options}, out=out)


@pytest.fixture
def broken_off(tmp_path: Path) -> Path:
    """The folder of a run that has its checkpoints of steps 3, 4 and 6, but not the last."""
    out = tmp_path / "run"
    run(out)
    for path in Checkpoints(out / "checkpoints").files():
        if path.name == "step-00000008.pt":
            path.unlink()
    (out / "checkpoints" / "best.pt").unlink()
    return out


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """A bit of the largest tensor: between tensors lies padding, which means nothing."""
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
        tensor = file.read(largest)
    content = bytearray(path.read_bytes())
    content[content.index(tensor) + len(tensor) // 2] ^= 4
    path.write_bytes(content)


def other_program(path: Path) -> None:
    torch.save({"state_dict": {"weight": torch.zeros(3)}, "epoch": 7}, path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "is a damaged checkpoint, cut off or overwritten"),
        (flip, "is a damaged checkpoint: .* fails its checksum"),
        (other_program, "is not a checkpoint of resnetv2 but another program's file"),
        (empty, "is empty, not a checkpoint"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_broken_newest_checkpoint_is_passed_over(
    damage: Any,
    reason: str,
    broken_off: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = Checkpoints(broken_off / "checkpoints").files()
    assert len(files) >= 2
    damage(files[0])
    run(broken_off, verbose=True)
    printed = capsys.readouterr().out.splitlines()
    said = [line for line in printed if str(files[0]) in line]
    assert len(said) == 1
    assert said[0].endswith(f"; trying {files[1].name} instead")
    assert re.search(reason, said[0])
    whole = tmp_path / "whole"
    run(whole)
    assert not list(differences(newest(broken_off), newest(whole)))
    assert course(broken_off) == course(whole)


def test_nothing_usable_is_an_error_and_nothing_is_lost(broken_off: Path) -> None:
    for path in Checkpoints(broken_off / "checkpoints").files():
        cut(path)
    before = {path: path.read_bytes() for path in broken_off.rglob("*") if path.is_file()}
    with pytest.raises(
        InputError, match=r"none of the \d checkpoints in .* can be used; the newest"
    ):
        run(broken_off)
    assert before == {path: path.read_bytes() for path in before}


def test_named_checkpoint_is_taken_or_refused(broken_off: Path, tmp_path: Path) -> None:
    older, other = Checkpoints(broken_off / "checkpoints").files()[1], tmp_path / "other"
    run(other, resume=older)
    whole = tmp_path / "whole"
    run(whole)
    assert not list(differences(newest(other), newest(whole)))
    cut(older)
    with pytest.raises(InputError, match="is a damaged checkpoint"):
        run(tmp_path / "third", resume=older)
    assert not (tmp_path / "third").exists()


def test_other_random_states_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial with a model that draws random numbers fails where they are not put back."""
    import resnetv2.training.loop as module

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 8 * 8, 4)
        )

    whole, out = tmp_path / "whole", tmp_path / "run"
    run(whole, model=model())
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate_as", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(out, model=model())
    again = tmp_path / "again"
    shutil.copytree(out, again)
    run(out, model=model())
    assert not list(differences(newest(out)["model"], newest(whole)["model"]))
    monkeypatch.setattr(module, "set_random_states", lambda *arguments: None)
    run(again, model=model())
    assert list(differences(newest(again)["model"], newest(whole)["model"]))


def test_beginning_where_a_run_was_to_go_on_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert len(run(out, verbose=True, steps=1, epochs=None).step_losses) == 1
    line = f"no checkpoint in {out} yet: the run begins at its first step"
    assert line in capsys.readouterr().out.splitlines()


# --- what decides bits beside the options


def test_threads_are_those_of_the_run(
    broken_off: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with cpu_threads(2):
        found = run(broken_off, verbose=True)
        assert torch.get_num_threads() == 2, "the caller's threads are put back"
    assert found.config["threads"] == 1
    assert newest(broken_off)["machine"]["threads"] == 1
    assert read_config(broken_off)["threads"] == 1
    whole = tmp_path / "whole"
    run(whole)
    assert not list(differences(newest(broken_off), newest(whole)))
    assert "other roundings" not in capsys.readouterr().out


def test_threads_without_a_configuration_are_the_checkpoints(
    broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (broken_off / "config.yaml").unlink()
    with cpu_threads(2):
        assert run(broken_off, verbose=True).config["threads"] == 1
    said = capsys.readouterr().out
    assert "goes on with threads 1 as before, without --resume it would be 2" in said


def test_other_threads_are_said_before_the_first_step(
    broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(broken_off, verbose=True, threads=2).config["threads"] == 2
    said = capsys.readouterr().out
    assert said.index("threads was 1 and is 2: the same function with other roundings") < (
        said.index("going on after step")
    )


def test_another_machine_is_said(broken_off: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = {"version of torch": "1.0", "version of triton": None, "device": "cuda (H100)"}
    for path in Checkpoints(broken_off / "checkpoints").files():
        state = read(path)
        assert others.keys() < state["machine"].keys()
        state["machine"].update(others)
        torch.save(state, path)
    run(broken_off, verbose=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "other roundings" in line]
    assert [name for name in others if f"{name} was {others[name]!r} and" in "\n".join(said)] == [
        *others
    ]
    assert len(said) == len(others)


def test_checkpoint_of_a_version_that_kept_no_machine(
    broken_off: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in Checkpoints(broken_off / "checkpoints").files():
        state = read(path)
        del state["machine"]
        torch.save(state, path)
    run(broken_off, verbose=True)
    assert "other roundings" not in capsys.readouterr().out
