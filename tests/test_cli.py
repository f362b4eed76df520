"""The command line: a thin layer that says what it does and how to do it right."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from resnetv2.cli import COMMANDS, main

ROOT = Path(__file__).parents[1]
SMALL = ["--device", "cpu", "--depth", "8", "--epochs", "2", "--limit-batches", "2"]
QUICK = ["--backend", "aten", *SMALL]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors are too small to share, and threads of parallel tests would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_train_prints_epochs_and_writes_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", *QUICK, "--data", "digits", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "digits: 1,437 training and 360 test images, 1x8x8, 10 classes"
    assert lines[1].startswith("PreActResNet-8 (basic): ")
    assert lines[2].startswith("epoch 1/2")
    assert lines[-2].startswith("test accuracy ")
    assert (out / "curves.png").exists()
    assert "\r" not in result.output  # no progress bar where there is no terminal


def test_default_folder_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("train", "--eager", *SMALL)
    assert result.exit_code == 0, result.output
    header = json.loads(Path("runs/digits-basic-8-eager/metrics.jsonl").read_text().split("\n")[0])
    assert header["backend"] == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "Error: unknown data set 'mnist': choose from digits"),
        (["--data", "imagefolder:/no/such"], "Error: /no/such does not exist: imagefolder:PATH needs"),
        (["--depth", "21"], "Error: "),
        (["--lr", "-1"], "Error: the learning rate must be positive, got -1.0"),
        (["--resume", "/no/such.pt"], "Error: no checkpoint at /no/such.pt"),
    ],
    ids=["data", "folder", "depth", "lr", "resume"],
)
def test_wrong_input_is_one_line_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    result = run("train", *QUICK, "--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help").exit_code == 0


def test_unknown_command() -> None:
    result = run("tarin")
    assert result.exit_code == 2
    assert "No such command 'tarin'" in result.stderr


def test_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "resnetv2", "train", "--data", "mnist"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("Error: unknown data set 'mnist'")
