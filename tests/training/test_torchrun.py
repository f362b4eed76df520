"""Training in several gloo processes: under torchrun, and as its ranks (see rank_trials.py)."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.rank_trials import STEPS, arguments, compare
from tests.support.resume_trials import newest, write_images

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available() and hasattr(os, "fork")),
    reason="needs gloo and fork",
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("ranks")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    """What came of the runs of rank_trials.py, in one process that has imported everything."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/support/rank_trials.py"), str(folder)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_have_the_same(size: int, results: dict[str, Any]) -> None:
    ranks = results[f"{size}"]
    assert [rank["code"] for rank in ranks] == [0] * size
    for rank in ranks[1:]:
        assert rank["told"] == ranks[0]["told"]
        assert not rank["printed"]
    assert f"{size} processes, {64 // size} images each a step" in ranks[0]["printed"]
    assert len(ranks[0]["told"]["losses"]) == STEPS


@pytest.mark.parametrize("size", [2, 4])
def test_many_processes_train_as_one_does(size: int, results: dict[str, Any]) -> None:
    """The first steps to rounding. Later a ReLU's sign flips somewhere, and runs part; no further
    than runs of one process do whose first weights are 2^-20 of themselves apart."""
    one, many = (results[f"{n}"][0]["told"] for n in (1, size))
    assert many["losses"][:5] == pytest.approx(one["losses"][:5], rel=1e-6)
    assert many["losses"] == pytest.approx(one["losses"], rel=0.01)
    distances = results["distance"]
    assert distances[f"{size}"] <= max(distances[f"moved-{draw}"] for draw in (1, 2, 3))


def test_without_synchronised_norms(results: dict[str, Any]) -> None:
    """Parameters are the same in both; moments each rank's own, and so not those of one process."""
    first, second = (rank["told"] for rank in results["local"])
    assert first["parameters"] == second["parameters"]
    assert (first["losses"], first["history"]) == (second["losses"], second["history"])
    synced = results["2"][0]["told"]
    assert first["losses"][1] != pytest.approx(synced["losses"][1], rel=1e-4)


def test_test_is_of_the_weights_that_are_saved(results: dict[str, Any], folder: Path) -> None:
    """Also where norms are not synchronised: `eval` gives what the run recorded."""
    from resnetv2.training.evaluate import evaluate_run

    for name in ("2", "local"):
        found = evaluate_run(folder / f"run-{name}")
        assert found.recorded == found.accuracy
        loss = results[name][0]["told"]["history"][-1][1]
        assert found.loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("trial", [1, 2])
def test_killed_run_of_two_ends_with_the_same_bits(trial: int, results: dict[str, Any]) -> None:
    found = results[f"killed {trial}"]
    assert [rank["code"] for rank in found["killed"]] == [-signal.SIGKILL] * 2
    assert 3 <= found["at"] < STEPS
    assert [rank["code"] for rank in found["again"]] == [0, 0]
    assert f"going on after step {found['at']}" in found["again"][0]["printed"]
    assert not found["differs"]
    assert found["again"][0]["told"]["parameters"] == results["2"][0]["told"]["parameters"]
    assert found["again"][1]["told"]["buffers"] == results["2"][1]["told"]["buffers"]


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("share", 2, "a batch of 15 images cannot be divided by 2 processes: take a multiple of 2"),
        ("option", 2, "lr must be a number above 0, got -1.0"),
        ("device", 2, "there is no device 'abacus'"),
        ("recipe", 2, "unknown recipe 'fastest': choose from fast, paper"),
        ("depth", 2, "depth must be 6n+2 for PreActBlock, got 21"),
        ("diverged", 1, "the training loss is nan in step 1 (epoch 1): try a learning rate below"),
    ],
)
def test_error_is_one_line_of_the_main_process(
    name: str, code: int, message: str, results: dict[str, Any]
) -> None:
    first, second = results[name]
    assert (first["code"], second["code"]) == (code, code)
    assert f"Error: {message}" in first["printed"]
    assert first["printed"].count("Error") == 1
    assert "Traceback" not in first["printed"]
    assert not second["printed"]


def test_full_disk_of_the_main_process_ends_all(results: dict[str, Any], folder: Path) -> None:
    first, second = results["full"]
    assert (first["code"], second["code"]) == (2, 2)
    (line,) = [line for line in first["printed"].splitlines() if "Error" in line]
    assert "No space left on device; the older checkpoints are untouched (newest: step-" in line
    assert not second["printed"]
    assert newest(folder / "run-full")["step"] == 6


@pytest.mark.parametrize("size", [1, 4])
def test_another_number_of_processes_goes_on(size: int, results: dict[str, Any]) -> None:
    """With a note, and from the same state to rounding."""
    then, whole = results[f"2 then {size}"], results["2"][0]["told"]
    assert [rank["code"] for rank in then] == [0] * size
    assert f"processes were 2 and are {size}: the same function with other" in then[0]["printed"]
    told = then[0]["told"]
    assert len(told["losses"]) == 2
    assert told["losses"] == pytest.approx(whole["losses"][-2:], rel=1e-4)
    assert told["history"][-1][0] == pytest.approx(whole["history"][-1][0], rel=1e-4)


# --- torchrun itself


def torchrun(*words: str) -> "subprocess.Popen[str]":
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *start, "-m", "resnetv2", "train", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process: "subprocess.Popen[str]", there: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.002)


def workers(process: "subprocess.Popen[str]") -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]

    def rank(pid: int) -> int:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return int(next(v for v in variables if v.startswith(b"RANK=")).partition(b"=")[2])

    return sorted(pids, key=rank)


def test_torchrun_and_going_on_after_it(results: dict[str, Any], folder: Path) -> None:
    """One rank is killed: the job ends with an error within a minute, and the run goes on by the
    same command to the bits of one that was never stopped."""
    out = folder / "run-torchrun"
    command = [*arguments(), "--out", str(out), "--resume", "auto", "--no-progress"]
    process = torchrun(*command)
    wait_for(process, lambda: any(out.glob("checkpoints/step-*.pt")))
    os.kill(workers(process)[1], signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - killed < 60
    assert process.returncode != 0
    assert "Error: process 0 has lost another one" in errors
    assert "go on with --resume auto" in errors
    step = newest(out)["step"]
    assert step < STEPS, "it had ended before the kill"

    process = torchrun(*command)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"going on after step {step}" in printed
    assert printed.count("test accuracy") == 1
    assert not compare(out, folder / "run-2")


def test_sigterm_to_torchrun_saves_and_stops_all(folder: Path) -> None:
    """With processes that load images, which get the signal too."""
    out, images = folder / "run-stopped", folder / "images"
    write_images(images)
    streamed = ["--data", f"imagefolder:{images}", "--cache", "stream", "--image-size", "16"]
    sizes = ["--depth", "8", "--batch-size", "8", "--steps", "400", "--checkpoint-every", "3"]
    process = torchrun(
        *streamed, *sizes, "--workers", "1", "--backend", "aten", "--device", "cpu",
        "--out", str(out),
    )  # fmt: skip
    wait_for(process, lambda: any(out.glob("checkpoints/step-*.pt")))
    ranks = workers(process)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    state = newest(out)
    assert state["step"] < 400
    (line,) = [line for line in errors.splitlines() if "stopped after step" in line]
    assert f"stopped after step {state['step']} of 400; saved {out}" in line
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def test_input_error_ends_torchrun(folder: Path) -> None:
    process = torchrun("--data", "mnist", "--out", str(folder / "run-mnist"))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("Error: unknown data set 'mnist': choose from digits") == 1
    assert not printed
    assert not (folder / "run-mnist").exists()
