"""The command line: a thin layer that says what it does and how to do it right."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from resnetv2 import plan, preact_resnet18
from resnetv2.cli.command import COMMANDS, main
from resnetv2.models import MODELS
from resnetv2.training.checkpoint import Checkpoints, read
from resnetv2.training.run import train_resnet_v2

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--depth", "8", "--epochs", "2", "--limit-batches", "2"]
QUICK = ["--backend", "aten", *SMALL]


pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_train_prints_epochs_and_writes_files(tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = run("train", *QUICK, "--data", "digits", "--out", str(out))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == (
        "digits: 1,437 training and 360 test images, 1x8x8, 10 classes; "
        "augmentation: crops of images padded by 1"
    )
    assert lines[1].startswith("PreActResNet-8 (basic): ")
    assert lines[2] == "4 steps of 128 images, 2 epochs, schedule step, lr 0.1"
    assert lines[3].startswith("epoch 1/2")
    assert lines[-2].startswith("test accuracy ")
    assert lines[-1] == f"wrote {out}: config.yaml, metrics.jsonl, curves.png, checkpoints"
    assert (out / "curves.png").exists()
    assert "\r" not in result.output  # no progress bar where there is no terminal


def test_default_folder_tells_runs_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        result = run("train", "--eager", *SMALL)
        assert result.exit_code == 0, result.output
    names = [f"digits-basic-8-eager{suffix}" for suffix in ("", "-2", "-3")]
    assert sorted(path.name for path in Path("runs").iterdir()) == names
    header = json.loads((Path("runs") / names[0] / "metrics.jsonl").read_text().split("\n")[0])
    assert header["backend"] == "eager"
    # The newest is gone on with; the options come from its config.yaml.
    result = run("train", "--eager", "--depth", "8", "--resume", "auto")
    assert result.exit_code == 0, result.output
    assert f"from runs/{names[2]}/checkpoints/step-00000004.pt" in result.stdout


def test_a_folder_that_holds_a_run(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "run")]
    assert run("train", *QUICK, *out).exit_code == 0
    result = run("train", *QUICK, *out)
    assert result.exit_code == 2
    assert "go on with it by --resume auto, replace it by --overwrite, or take" in result.stderr
    assert result.stderr.count("\n") == 1
    assert run("train", *QUICK, *out, "--seed", "1", "--overwrite").exit_code == 0
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["seed"] == 1
    result = run("train", *out, "--resume", "auto")
    assert result.exit_code == 0
    assert "the run is complete: all 4 steps are done" in result.stdout


def test_recipe_is_overridden(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps: 2\nlr: 0.05\nema: 0.9\n")
    out = tmp_path / "run"
    short = ["--device", "cpu", "--backend", "aten", "--depth", "8", "--limit-batches", "1"]
    result = run("train", "--recipe", str(recipe), "--lr", "0.07", *short, "--out", str(out))
    assert result.exit_code == 0, result.output
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert (config["steps"], config["lr"], config["ema"]) == (2, 0.07, 0.9)


def test_standard_nets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ["--backend", "aten", "--device", "cpu", "--steps", "1", "--limit-batches", "1"]
    result = run("train", "--model", "preact_resnet20", *short)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[1].startswith("preact_resnet20: 2")
    folder = Path("runs") / "digits-preact_resnet20"
    assert yaml.safe_load((folder / "config.yaml").read_text())["model"] == "preact_resnet20"
    assert "as the run recorded" in run("eval", str(folder)).stdout
    result = run("train", "--model", "preact_resnet20", "--resume", "auto")
    assert "the run is complete" in result.stdout, result.output
    # The bits of the same net by its depth.
    assert run("train", "--depth", "20", *short).exit_code == 0
    named, sized = (
        read(Path("runs") / name / "checkpoints" / "step-00000001.pt")["model"]
        for name in ("digits-preact_resnet20", "digits-basic-20")
    )
    assert all(torch.equal(named[name], value) for name, value in sized.items())


def test_list_models(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {name: MODELS[name] for name in ("preact_resnet50", "preact_resnet20")}
    monkeypatch.setattr("resnetv2.planning.cost.MODELS", few)
    result = run("train", "--list-models")
    assert result.exit_code == 0, result.output
    rows = [line.split("  ") for line in result.stdout.splitlines()[2:-1]]
    cells = {row[0]: [cell.strip() for cell in row[1:] if cell.strip()] for row in rows}
    # timm's resnetv2_50 has 25.55 M parameters; torchvision counts 4.09 G multiplications for its
    # resnet50, whose convolutions are the same.
    expected = ["bottleneck", "3, 4, 6, 3", "224x224", "25.55 M", "8.17 G"]
    assert cells == {
        "preact_resnet50": expected,
        "preact_resnet20": ["basic", "3, 3, 3", "32x32", "0.27 M", "0.08 G"],
    }


def test_plan_of_a_standard_net() -> None:
    result = run("plan", "--model", "preact_resnet18", "--batch-size", "2", "--budget", "1GiB")
    assert result.exit_code == 0, result.output
    expected = plan("preact_resnet18", 2, "1GiB", image_size=224)
    assert result.stdout == f"{expected}\n"
    assert plan(preact_resnet18(), 2, "1GiB", device="cpu") == expected


def test_eval_gives_the_test_error_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = run("train", *QUICK, "--out", str(out))
    assert trained.exit_code == 0, trained.output
    accuracy = float(trained.stdout.splitlines()[-2].split()[2])
    for checkpoint in ([], ["--checkpoint", "best"], ["--device", "cpu:0"]):
        result = run("eval", str(out), *checkpoint)
        assert result.exit_code == 0, result.output
        first, error, recorded = result.stdout.splitlines()
        assert first.startswith(str(out / "checkpoints"))
        assert recorded == "as the run recorded"
        if "best" not in checkpoint:
            assert first.endswith("step-00000004.pt: 2 epochs, 4 steps")
            assert float(error.split()[2]) == pytest.approx(100 - accuracy)
            assert error.endswith("on 360 images")


def started(out: Path, *options: str) -> "subprocess.Popen[str]":
    """A training process whose log has begun."""
    command = [sys.executable, "-m", "resnetv2", "train", "--device", "cpu", "--backend", "aten"]
    process = subprocess.Popen(
        [*command, "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, lambda: (out / "metrics.jsonl").exists())
    return process


def wait_for(process: "subprocess.Popen[str]", there: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The last checkpoint of a run of 120 steps that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    train_resnet_v2(
        depth=8, batch_size=16, steps=120, device="cpu", backend="aten", verbose=False, out=out
    )
    return read(out / "checkpoints" / "step-00000120.pt")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(number: int, code: int, whole: dict[str, Any], tmp_path: Path) -> None:
    """Saved, told how to go on, and then the bits of a run that was not stopped."""
    out = tmp_path / "run"
    process = started(
        out, "--depth", "8", "--batch-size", "16", "--steps", "120", "--checkpoint-every", "5"
    )
    wait_for(process, lambda: any(out.glob("checkpoints/step-*.pt")))
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    last = Checkpoints(out / "checkpoints").files()[0]
    step = read(last)["step"]
    assert step < 120
    assert errors.splitlines()[-1] == (
        f"stopped after step {step} of 120; saved {last}; go on with: "
        f"resnetv2 train --out {out} --resume auto"
    )
    result = run("train", "--out", str(out), "--resume", "auto")
    assert result.exit_code == 0, result.output
    mine = read(out / "checkpoints" / "step-00000120.pt")
    for name, value in whole["model"].items():
        assert torch.equal(value, mine["model"][name]), name
    tested = [[epoch["test_loss"] for epoch in state["history"]] for state in (mine, whole)]
    assert tested[0] == tested[1]


def test_second_signal_stops_at_once(tmp_path: Path) -> None:
    """In a step of many seconds."""
    process = started(tmp_path, "--depth", "1202", "--batch-size", "1024", "--steps", "2")
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping after this step (once more: at once)" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    started_at = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "stopped at once\n"
    assert time.monotonic() - started_at < 30
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_while_torch_is_imported(way: str, tmp_path: Path) -> None:
    """One line and exit code 130, from the first moment that the package runs."""
    started = tmp_path / "started"
    (tmp_path / "torch").mkdir()  # a torch that takes long
    (tmp_path / "torch" / "__init__.py").write_text(
        f"import pathlib, time\npathlib.Path({str(started)!r}).touch()\ntime.sleep(60)\n"
    )
    (tmp_path / "resnetv2").write_text("from resnetv2.cli import main\nmain()\n")
    command = ["-m", "resnetv2"] if way == "module" else [str(tmp_path / "resnetv2")]
    process = subprocess.Popen(
        [sys.executable, *command, "plan"],
        cwd="/",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts behind it ignores Ctrl-C, this test's children then too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    wait_for(process, started.exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped at once\n")


def test_the_profiler_says_nothing() -> None:
    code = "import torch\nfrom resnetv2.planning.memory import peak_bytes\n"
    code += "assert peak_bytes(lambda: torch.ones(1000) + 1, False) >= 8000"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_torchrun_is_told_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with a block of text that says "traceback"; a line of ours stands there."""
    file = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
    result = run("train", "--data", "nothing")
    assert result.exit_code == 2
    assert result.output == f"Error: {json.loads(file.read_text())['message']['message']}\n"


def test_help_names_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(name in result.output for name in COMMANDS)
    for name in COMMANDS:
        assert run(name, "--help").exit_code == 0


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


def test_help_lists_whole_sentences() -> None:
    listed = " ".join(run("--help").stdout.partition("Commands:")[2].split())
    for name in COMMANDS:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        assert f"{name} {command.get_short_help_str(1000)}" in listed
    assert "..." not in listed


def test_one_of_a_thing_is_no_plural(tmp_path: Path) -> None:
    one = ["--device", "cpu", "--backend", "aten", "--depth", "8", "--steps", "1"]
    result = run("train", *one, "--out", str(tmp_path / "run"), "--no-progress")
    assert result.exit_code == 0, result.output
    result_of_test = run("eval", str(tmp_path / "run"))
    for line in (*result.stdout.splitlines(), *result_of_test.stdout.splitlines()):
        assert not re.search(r"\b1 (steps|epochs|seeds)\b|\(s\)", line), line
    assert "\n1 step of 128 images, 1 epoch, " in result.stdout
    assert "1 epoch, 1 step" in result_of_test.stdout


def test_a_budget_is_said_as_it_was_given() -> None:
    result = run("plan", "--depth", "8", "--batch-size", "2", "--budget", "8GiB")
    assert "* fits 8 GiB (8.59 GB): what auto takes" in result.stdout
