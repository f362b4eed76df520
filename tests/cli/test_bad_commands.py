"""Bad input at the command line: one line that says what is wrong, exit code 2, nothing lost.

`tests/support/bad_commands.py` has the commands. Here they run in this process; what only a process
of its own shows (limits of the system, other processes, the environment at start) follows below.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from resnetv2.cli.command import main
from resnetv2.training import checkpoint, files, log
from resnetv2.training.checkpoint import read
from tests.support.bad_commands import CASES, IMAGES, RESUME, RUN, TORCHRUN, Case, Place
from tests.support.ports import free_port

ROOT = Path(__file__).parents[2]
LONGEST = 250
# What a message would have of Python's insides.
INSIDES = re.compile(
    r"Traceback|Errno|Error\(|<class| at 0x|INTERNAL|aten::|NoneType|__|object has no|must be str"
    r"|Please|\.py\b"
)


# Each command that fails collects garbage, twice.
pytestmark = pytest.mark.usefixtures("one_thread", "quick_collections")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that most cases spoil, finished."""
    out = tmp_path_factory.mktemp("template") / "run"
    result = run(RUN.replace("--out run", f"--out {out}"))
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def place(tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, template, monkeypatch)


def run(command: str, environment: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(main, shlex.split(command), env=environment)


def process(command: str, environment: dict[str, str] | None = None, **options: Any) -> Any:
    """`python -m resnetv2` as a user starts it, beside this one."""
    path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(
        [sys.executable, "-m", "resnetv2", *shlex.split(command)],
        env={**kept, **path, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def tree(folder: Path) -> dict[str, str | bytes]:
    """All that is in a folder."""
    found: dict[str, str | bytes] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = "folder" if path.is_dir() else "special"
    return found


def check_line(stderr: str, says: str, command: str = "") -> None:
    """One line, which says this, not too much, and nothing of Python's insides."""
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1
    assert stderr.endswith("\n")
    line = stderr[:-1]
    assert line.isprintable()
    assert says in line
    # A long name that was typed comes back.
    assert len(line) <= max(LONGEST, len(command) + 100)
    assert not INSIDES.search(line.removeprefix("Error: "))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_one_line_and_nothing_lost(
    case: Case, place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    if case.without_gpu and torch.cuda.is_available():
        pytest.skip("there is a GPU, and the command is right")
    if case.files is not None:
        case.files(place)
    before = tree(place.folder)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        result = run(case.command, case.environment)
    if not isinstance(result.exception, SystemExit) and result.exception is not None:
        raise result.exception
    assert result.exit_code == 2, result.output
    check_line(result.stderr, case.says, case.command)
    assert tree(place.folder) == before
    assert not warned, [str(warning.message) for warning in warned]
    # Neither did anything below Python print.
    assert capfd.readouterr() == ("", "")


# --- no space


@pytest.mark.parametrize("name", ["step-00000004.pt", "best.pt", "metrics.jsonl"])
def test_a_full_disk_keeps_the_older_checkpoint(
    name: str, place: Place, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = place.half_run() / "checkpoints"
    (checkpoints / "best.pt").write_bytes((checkpoints / "step-00000002.pt").read_bytes())
    make_best(place, -1.0 if name == "best.pt" else 1.0)
    before = tree(checkpoints)
    write = files.write_atomically

    def refuse(file: Any, data: Any) -> int:
        file.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise file.error

    def write_if_there_is_room(path: Path, *work: Any) -> None:
        with monkeypatch.context() as patch:
            if path.name == name:
                patch.setattr(files._RecordingFile, "write", refuse)
            write(path, *work)

    with monkeypatch.context() as patch:
        for module in (checkpoint, log):
            patch.setattr(module, "write_atomically", write_if_there_is_room)
        result = run(RESUME)
    assert result.exit_code == 2, result.output
    check_line(result.stderr, f"{name}: No space left on device")
    assert tree(checkpoints) == before
    finish(template)


def make_best(place: Place, accuracy: float) -> None:
    """Decide whether what comes next is the best so far."""
    path = place / "run/checkpoints/step-00000002.pt"
    state = torch.load(path, weights_only=True)
    state["best"] = accuracy
    torch.save(state, path)


def finish(template: Path) -> None:
    """Going on ends with the weights of the run that was never stopped."""
    result = run(RESUME)
    assert result.exit_code == 0, result.output
    mine, theirs = (
        read(folder / "checkpoints" / "step-00000004.pt") for folder in (Path("run"), template)
    )
    for part in ("model", "optimizer"):
        torch.testing.assert_close(mine[part], theirs[part], rtol=0, atol=0)


# --- images that are lost on the way


def test_an_image_lost_in_a_run_with_workers_keeps_its_checkpoints(place: Place) -> None:
    """Training goes well and testing finds the image; mended, the run ends as if it had not."""
    command = IMAGES + "--cache stream --batch-size 2 --checkpoint-every 1 --workers 1 "
    place.images()
    reference = run(command.replace("--out run", "--out whole"))
    assert reference.exit_code == 0, reference.output
    path = place / "images/test/cat/0.png"
    content = path.read_bytes()
    path.write_bytes(content[:45])  # its size can be read

    stopped = process(command, cwd=place.folder)
    _, stderr = stopped.communicate(timeout=120)
    assert stopped.returncode == 2, stderr
    check_line(stderr, "cannot read the image images/test/cat/0.png: ")
    assert read(place / "run/checkpoints/step-00000001.pt")["step"] == 1

    path.write_bytes(content)
    result = run(RESUME)
    assert result.exit_code == 0, result.output
    mine, theirs = (
        read(place / f"{name}/checkpoints/step-00000004.pt")["model"] for name in ("run", "whole")
    )
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


# --- what only a process of its own shows


def test_triton_without_a_gpu(place: Place) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU, and the command is right")
    stopped = process(RUN.replace("aten", "triton"), cwd=place.folder)
    _, stderr = stopped.communicate(timeout=120)
    assert stopped.returncode == 2, stderr
    check_line(stderr, "backend triton needs a GPU, and the device is cpu: take --backend aten")
    assert tree(place.folder) == {}


def test_a_port_that_is_taken(place: Place) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        stopped = process(RUN, {**TORCHRUN, "MASTER_PORT": port}, cwd=place.folder)
        _, stderr = stopped.communicate(timeout=120)
    assert stopped.returncode == 2, stderr
    check_line(stderr, f"port {port}")
    assert tree(place.folder) == {}


def test_a_batch_that_two_processes_do_not_divide(place: Place) -> None:
    port = str(free_port())
    both = [
        process(
            RUN + "--batch-size 3",
            {**TORCHRUN, "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank},
            cwd=place.folder,
        )
        for rank in ("0", "1")
    ]
    errors = [each.communicate(timeout=120)[1] for each in both]
    assert [each.returncode for each in both] == [2, 2], errors
    check_line("".join(errors), "a batch of 3 images cannot be divided by 2 processes")
    assert tree(place.folder) == {}
