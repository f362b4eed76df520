"""Runs of several gloo processes, in a process of its own, for tests/training/test_torchrun.py.

Everything is imported once and each rank is a fork of this process, with torchrun's environment:
starting an interpreter for every rank of every run would take minutes. The runs that need torchrun
itself are in the test.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from resnetv2.errors import InputError
from tests.support.ports import free_port
from tests.support.resume_trials import course, differences, newest

STEPS = 20
OPTIONS: dict[str, Any] = {
    "data": "digits", "depth": 8, "backend": "aten", "device": "cpu", "batch_size": 64,
    "steps": STEPS, "limit_batches": 8, "checkpoint_every": 3, "log_steps": True, "lr": 0.02,
    "ema": 0.9,
}  # fmt: skip


def arguments() -> list[str]:
    """`OPTIONS` on the command line."""
    words = []
    for name, value in OPTIONS.items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return words


def launch(
    folder: Path, size: int, work: Callable[[], Any], moment: Callable[[], None] | None = None
) -> list[dict[str, Any]]:
    """Run `work` in `size` processes, all killed by SIGKILL when `moment`, if given, returns.

    Returns:
        By rank: exit code (negative: the signal), what it printed, and what `work` returned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            )  # fmt: skip
            if size == 1:
                for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                    del os.environ[name]
            file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            code = 1
            try:
                (folder / f"{rank}.json").write_text(json.dumps(work()))
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    if moment is not None:
        moment()
        for child in children:
            os.kill(child, signal.SIGKILL)
    results = []
    for rank, child in enumerate(children):
        status = os.waitpid(child, 0)[1]
        told = folder / f"{rank}.json"
        results.append({
            "code": os.waitstatus_to_exitcode(status),
            "printed": (folder / f"{rank}.txt").read_text(),
            "told": json.loads(told.read_text()) if status == 0 and told.exists() else None,
        })  # fmt: skip
    return results


def digest(values: Any) -> str:
    hashed = hashlib.sha256()
    for value in values:
        hashed.update(value.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()


def distance(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Between two nets' parameters, as a part of their size."""
    names = [name for name, value in mine.items() if value.is_floating_point()]
    a, b = (
        torch.cat([state[name].double().flatten() for name in names if "running" not in name])
        for state in (mine, theirs)
    )
    return float((a - b).norm() / b.norm())


def run(out: Path | None, moved: int = 0, **options: Any) -> Any:
    """A training run that tells what this rank has in the end.

    moved: with a number, from initial weights that are 2^-20 of themselves away, drawn by it.
    """
    from resnetv2.training import run as training

    if moved:
        build = training.build_model

        def build_moved(*arguments: Any) -> torch.nn.Module:
            model = build(*arguments)
            generator = torch.Generator().manual_seed(moved)
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1 + 2**-20 * torch.randn(weight.shape, generator=generator))
            return model

        training.build_model = build_moved

    resume = None if out is None else "auto"
    given = {**OPTIONS, **options, "out": out, "resume": resume, "progress": False}
    result = training.train_resnet_v2(**given)
    return {
        "parameters": digest(result.model.parameters()),
        "buffers": digest(result.model.buffers()),
        "losses": result.step_losses,
        "history": [[e.train_loss, e.test_loss, e.test_accuracy] for e in result.history],
    }


def command(*words: str, full_after: int = 0) -> Any:
    """The command line in this process; it exits.

    full_after: with a disk that is full after so many checkpoints.
    """
    from resnetv2.cli.command import main
    from resnetv2.training import checkpoint

    write, written = checkpoint.write_atomically, 0

    def on_a_full_disk(path: Path, *work: Any) -> None:
        nonlocal written
        written += 1
        if written > full_after:
            full = OSError(errno.ENOSPC, "No space left on device")
            raise InputError(f"cannot write {path}: {full.strerror}") from full
        write(path, *work)

    if full_after:
        checkpoint.write_atomically = on_a_full_disk
    main(list(words))


def compare(run_folder: Path, whole: Path) -> list[str]:
    found = list(differences(newest(run_folder), newest(whole)))
    return (found + list(differences(course(run_folder), course(whole), "metrics.jsonl")))[:10]


def main(folder: Path) -> None:
    import tqdm

    from resnetv2.training import loop
    from resnetv2.training.run import train_resnet_v2

    tqdm.tqdm.monitor_interval = 0  # a thread would not survive a fork
    torch.set_num_threads(1)
    loop.plot_curves = lambda *arguments: None  # a second for each run, and no part of its state
    warm = {**OPTIONS, "steps": 2, "limit_batches": 2, "verbose": False}
    train_resnet_v2(**warm)

    results: dict[str, Any] = {}
    for size in (1, 2, 4):
        results[f"{size}"] = launch(folder / f"{size}", size, lambda: run(folder / f"run-{size}"))  # noqa: B023
    # One process from weights that are a few roundings away: how far these runs part by themselves.
    for draw in range(1, 4):
        launch(folder / "moved", 1, lambda: run(folder / f"run-moved-{draw}", moved=draw))  # noqa: B023
    one = newest(folder / "run-1")["model"]
    results["distance"] = {
        name: distance(newest(folder / f"run-{name}")["model"], one)
        for name in ("2", "4", "moved-1", "moved-2", "moved-3")
    }

    numbers = random.Random(7)
    for trial in (1, 2):
        out = folder / f"run-killed-{trial}"
        step, seconds = 3 * numbers.randint(1, 5), 0.05 * numbers.random()

        def moment() -> None:
            end = time.monotonic() + 60
            while not (out / "checkpoints" / f"step-{step:08d}.pt").exists():  # noqa: B023
                assert time.monotonic() < end
                time.sleep(0.001)
            time.sleep(seconds)  # noqa: B023

        killed = launch(folder / "killed", 2, lambda: run(out), moment)  # noqa: B023
        at = newest(out)["step"]
        again = launch(folder / "again", 2, lambda: run(out))  # noqa: B023
        results[f"killed {trial}"] = {
            "killed": killed, "at": at, "again": again, "differs": compare(out, folder / "run-2"),
        }  # fmt: skip

    # Another number of processes goes on where two have stopped.
    for size in (1, 4):
        out = folder / f"run-2-then-{size}"
        shutil.copytree(folder / "run-2", out)
        (out / "checkpoints" / f"step-{STEPS:08d}.pt").unlink()
        (out / "checkpoints" / "best.pt").unlink()
        results[f"2 then {size}"] = launch(folder / "then", size, lambda: run(out))  # noqa: B023

    local = {"sync_bn": False, "steps": 8}
    results["local"] = launch(folder / "local", 2, lambda: run(folder / "run-local", **local))
    wrong = {
        "share": ["--batch-size", "15"],
        "option": ["--lr", "-1"],
        "device": ["--device", "abacus"],
        "recipe": ["--recipe", "fastest"],
        "depth": ["--depth", "21"],
        "diverged": ["--lr", "1e30", "--steps", "9"],
    }
    for name, words in wrong.items():
        out = str(folder / f"run-{name}")
        results[name] = launch(
            folder / name,
            2,
            lambda: command("train", *arguments(), "--out", out, *words),  # noqa: B023
        )
    full = ["train", *arguments(), "--out", str(folder / "run-full")]
    results["full"] = launch(folder / "full", 2, lambda: command(*full, full_after=2))
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
