"""A run's files beside its checkpoints: the same lines with and without a kill in between."""

import errno
import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resnetv2.errors import InputError
from resnetv2.training.checkpoint import Checkpoints
from resnetv2.training.log import RunLog, holds_a_run, read_config, write_config

CONFIG = {"data": "digits", "lr": 0.1, "workers": 0}


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(log: RunLog, first: int, last: int, steps_per_epoch: int = 4) -> None:
    """Steps `first` to `last` - 1, and an epoch's line after every fourth."""
    for step in range(first, last):
        log.write({"event": "step", "step": step, "loss": 1 / (step + 1), "lr": 0.1})
        if (step + 1) % steps_per_epoch == 0:
            epoch = (step + 1) // steps_per_epoch
            log.write({"event": "epoch", "epoch": epoch, "step": step + 1, "train_loss": 1 / epoch})


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    with RunLog(tmp_path / "runs" / "a", CONFIG) as log:
        assert records(tmp_path / "runs" / "a") == [{"event": "config", **CONFIG}]
        for step in range(3):
            log.write({"event": "step", "step": step})
            assert records(tmp_path / "runs" / "a")[-1] == {"event": "step", "step": step}
        log.sync()


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with RunLog(None, CONFIG, tensorboard=True) as log:
        log_steps(log, 0, 5)
        log.sync()
    assert list(tmp_path.iterdir()) == []


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    with RunLog(tmp_path, {"versions": {"torch": torch.__version__}, "out": tmp_path}) as log:
        log.write(
            {
                "event": "end",
                "losses": [float("nan"), (float("-inf"), 1.5)],
                "tensor": torch.tensor(2.0),
                "numpy": np.float32("inf"),
                "count": np.int64(3),
                "dtype": torch.float16,
            }
        )
    config, end = records(tmp_path)
    assert config["versions"] == {"torch": str(torch.__version__)}
    assert config["out"] == str(tmp_path)
    assert end == {
        "event": "end",
        "losses": [None, [None, 1.5]],
        "tensor": 2.0,
        "numpy": None,
        "count": 3,
        "dtype": "torch.float16",
    }


@pytest.mark.parametrize("resume_step", [0, 1, 3, 4, 5, 8, 9, 10, 50])
def test_resumed_log_has_the_lines_of_an_uninterrupted_one(
    tmp_path: Path, resume_step: int
) -> None:
    """Killed at step 10, whatever the step of the checkpoint."""
    with RunLog(tmp_path / "whole", CONFIG) as log:
        log_steps(log, 0, 60)
    with RunLog(tmp_path / "killed", CONFIG) as log:
        log_steps(log, 0, max(10, resume_step))
    with RunLog(tmp_path / "killed", CONFIG, resume_step=resume_step) as log:
        log_steps(log, resume_step, 60)
    lines = records(tmp_path / "killed")
    assert lines.count({"event": "resume", "step": resume_step}) == 1
    lines.remove({"event": "resume", "step": resume_step})
    assert lines == records(tmp_path / "whole")


@pytest.mark.parametrize("kept", range(1, 42))
def test_torn_last_line(tmp_path: Path, kept: int) -> None:
    """A kill in the middle of a line: the rest of it is dropped unless it is whole."""
    torn = b'{"event": "step", "step": 4, "loss": 0.5}\n'
    assert len(torn) == 42
    with RunLog(tmp_path, CONFIG) as log:
        log_steps(log, 0, 4)
    before = records(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(torn[:kept])
    with RunLog(tmp_path, CONFIG, resume_step=5):
        pass
    last = [json.loads(torn)] if kept == 41 else []
    assert records(tmp_path) == [*before, *last, {"event": "resume", "step": 5}]


def test_foreign_lines_stay(tmp_path: Path) -> None:
    with RunLog(tmp_path, CONFIG) as log:
        log_steps(log, 0, 2)
    foreign = [b'{"event": "note", "step": 99}\n', b"\xff not JSON\n", b"[1, 2]\n", b"\n"]
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.writelines([*foreign, b'{"event": "step", "step": 2}\n', b"\x00\x00\x00"])
    with RunLog(tmp_path, CONFIG, resume_step=1):
        pass
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert lines[2:-1] == foreign
    assert [json.loads(line).get("step") for line in lines[:2]] == [None, 0]


def test_end_of_a_run_that_goes_on_is_no_end(tmp_path: Path) -> None:
    with RunLog(tmp_path, CONFIG) as log:
        log.write({"event": "end", "step": 4})
        log.write({"event": "end", "step": 9})
    with RunLog(tmp_path, CONFIG, resume_step=4):
        pass
    assert [record.get("step") for record in records(tmp_path)] == [None, 4, 4]


def test_resume_line_says_what_changed(tmp_path: Path) -> None:
    with RunLog(tmp_path, CONFIG):
        pass
    for workers in (2, 2, 0):
        with RunLog(tmp_path, {**CONFIG, "workers": workers}, resume_step=1):
            pass
    notes = [record.get("changes") for record in records(tmp_path)[1:]]
    assert notes == [{"workers": 2}, None, {"workers": 0}]


@pytest.mark.parametrize("content", [None, b"", b'{"event": "con'], ids=["none", "empty", "torn"])
def test_resume_without_a_file_starts_one(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    with RunLog(tmp_path, CONFIG, resume_step=3):
        pass
    assert records(tmp_path) == [{"event": "config", **CONFIG}, {"event": "resume", "step": 3}]


def test_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """The kernel refuses to make the file larger, in the middle of a line."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    path = checkpoints.save({"model": torch.ones(3)}, 1)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RunLog(tmp_path, CONFIG) as log:
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 60, hard))
        try:
            log.write({"event": "step", "step": 0})
            log.write({"event": "step", "step": 1})
            with pytest.raises(InputError) as error:
                log.write({"event": "step", "step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "File too large; checkpoints are untouched" in str(error.value)
        assert "\n" not in str(error.value)
        assert [record.get("step") for record in records(tmp_path)] == [None, 0, 1]
        log.write({"event": "step", "step": 2})
    assert [record.get("step") for record in records(tmp_path)] == [None, 0, 1, 2]
    assert path.read_bytes() == before


def test_disk_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old log is not lost to the attempt to rewrite it."""
    with RunLog(tmp_path, CONFIG) as log:
        log_steps(log, 0, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left"):
        RunLog(tmp_path, CONFIG, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make the folder"):
        RunLog(tmp_path / "file", CONFIG)
    with pytest.raises(InputError, match="is a file, expected a folder"):
        holds_a_run(tmp_path / "file")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="an optional package")
    epoch = {"event": "epoch", "train_accuracy": 0.5, "test_loss": 2.0, "images_per_second": 9.0}
    with RunLog(tmp_path, CONFIG, tensorboard=True) as log:
        log_steps(log, 0, 4)
        log.write({**epoch, "epoch": 1, "step": 4, "lr": 0.1})
        log_steps(log, 4, 7)
    with RunLog(tmp_path, CONFIG, resume_step=4, tensorboard=True) as log:
        log_steps(log, 4, 8)
        log.sync()
    shown = scalars(tmp_path)
    assert [step for step, _ in shown["step/loss"]] == list(range(8))
    assert shown["train/loss"] == [(3, 1.0), (7, 0.5)]
    assert shown["test/loss"] == [(3, 2.0)]
    assert shown.keys() == {
        *("step/loss", "step/lr", "train/loss", "train/accuracy", "test/loss"),
        *("lr", "images_per_second"),
    }


def test_tensorboard_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ImportError, match="python -m pip install tensorboard"):
        RunLog(tmp_path / "run", CONFIG, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_config_comes_back(tmp_path: Path) -> None:
    config = {
        "data": "imagefolder:data/Bäume",
        "lr": 1e-4,
        "weight_decay": 1e-5,
        "steps": None,
        "graph": False,
        "dtype": "1e-4",
        "budget": "8GiB",
        "nan": float("inf"),
    }
    write_config(tmp_path / "run", {**config, "root": Path("data"), "size": (3, 4)})
    assert read_config(tmp_path / "run") == {**config, "root": "data", "size": [3, 4]}
    text = (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8")
    assert text.startswith("# What this run was started with.\ndata: imagefolder:data/Bäume\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not the folder of a run: it has no config.yaml"),
        (b"depth: [1, 2\nlr: 3", r"config.yaml is not YAML \(line 2, column 3\)"),
        (b"\xff\xfe\xff", "config.yaml is not YAML"),
        (b"", "must be a mapping of options to values, it holds nothing"),
        (b"- a\n- b", "it holds a list"),
        (b"1: 2", "every option"),
        (b"a: !!python/object:os.system {}", "config.yaml is not YAML"),
    ],
    ids=["missing", "syntax", "encoding", "empty", "list", "number", "object"],
)
def test_config_that_cannot_be_read(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_what_a_folder_holds(tmp_path: Path) -> None:
    assert holds_a_run(tmp_path / "missing") is None
    (tmp_path / "notes.txt").write_text("mine")
    assert holds_a_run(tmp_path) is None
    with RunLog(tmp_path, CONFIG):
        pass
    assert holds_a_run(tmp_path) == "metrics.jsonl"
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save({}, 1, best=True)
    assert holds_a_run(tmp_path) == "metrics.jsonl, 1 checkpoint, best.pt"
    checkpoints.save({}, 2)
    write_config(tmp_path, CONFIG)
    assert holds_a_run(tmp_path) == "config.yaml, metrics.jsonl, 2 checkpoints, best.pt"
