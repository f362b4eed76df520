"""Training runs, killed and resumed, in a process of their own, for tests/training/test_resume.py.

Everything is imported once, and each run is a fork of this process: 20 kills take a minute rather
than ten. Children die by SIGKILL, from their parent at a moment of the clock, or from themselves at
a moment that is exact: a function call, a byte of a checkpoint, half a line of the log.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

KILLS = 20
STEPS = 40
TIMING = {"seconds", "images_per_second", "memory"}


class Kill(NamedTuple):
    """When a run is killed.

    Args:
        how: "call": after a part `at` of all its Python calls. "clock": after a part `at` of the
            seconds that it takes. "write": in the `number`-th checkpoint's file, after a part `at`
            of its bytes. "line": in the `number`-th line of the log, after a part `at` of it.
            "enter": as it enters `function`, "module:name", the `number`-th time.
    """

    how: str
    at: float = 0.0
    number: int = 1
    function: str = ""


class Trial(NamedTuple):
    """A kind of run, and the kills of its first, second, ... part."""

    kind: str
    kills: list[Kill]


def trials() -> dict[str, Trial]:
    """All of them by name: the 20 of the plain run, the random ones drawn from one seed."""
    numbers = random.Random(2026)
    plain = [Kill("call", numbers.random()) for _ in range(6)]
    plain += [Kill("clock", numbers.random()) for _ in range(3)]
    plain += [Kill("write", numbers.random(), numbers.randint(1, 10)) for _ in range(4)]
    plain += [
        Kill("call", 0.002),  # before the first checkpoint
        Kill("line", numbers.random(), 2),
        Kill("line", numbers.random(), 30),
        Kill("enter", number=3, function="resnetv2.training.evaluate:compute_logits"),
        # After a checkpoint has its name, and before the folder or the older ones know of it.
        Kill("enter", number=12, function="resnetv2.training.files:_sync_folder"),
        Kill("enter", number=5, function="resnetv2.training.checkpoint:_step_of"),
        # Between best.pt and the step's own file.
        Kill("enter", number=2, function="resnetv2.training.files:_linked"),
    ]
    assert len(plain) == KILLS
    result = {
        f"{number + 1} {kill.how}": Trial("plain", [kill]) for number, kill in enumerate(plain)
    }
    result["three in a row"] = Trial(
        "plain", [Kill("write", 0.5, 2), Kill("call", 0.3), Kill("write", 0.9, 1)]
    )
    for kind in ("bf16", "fp16", "dropout", "streamed"):
        result[kind] = Trial(kind, [Kill("write", 0.5, 2), Kill("enter", 0, 5, _STEP)])
    return result


_STEP = "resnetv2.training.state:learning_rate"


class Noisy(nn.Module):
    """Draws from torch's, Python's and NumPy's generators in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten()
        )
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        scale = 1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) if self.training else 1  # noqa: NPY002
        return self.head(self.body(x)) * scale


def options_of(kind: str, folder: Path) -> dict[str, Any]:
    """Arguments of `train_resnet_v2`."""
    common: dict[str, Any] = {
        "depth": 8, "backend": "aten", "device": "cpu", "batch_size": 64, "checkpoint_every": 3,
        "keep": 2, "log_steps": True, "verbose": False, "progress": False, "seed": 3,
    }  # fmt: skip
    if kind == "plain":
        return {
            **common, "steps": STEPS, "ema": 0.9, "drop_last": False, "label_smoothing": 0.1,
            "batch_size": 16, "limit_batches": 13,
        }  # fmt: skip
    if kind in ("bf16", "fp16"):
        return {**common, "steps": 9, "limit_batches": 7, "dtype": kind}
    if kind == "dropout":
        torch.manual_seed(0)
        return {**common, "steps": 9, "limit_batches": 7, "model": Noisy()}
    images = folder / "images"
    if not images.exists():
        write_images(images)
    return {
        **common, "data": f"imagefolder:{images}", "cache": "stream", "image_size": 16,
        "workers": 1, "batch_size": 8, "steps": 9,
    }  # fmt: skip


def write_images(folder: Path) -> None:
    """Toy PNGs: 40 to train with, 12 to test, of two classes."""
    from PIL import Image

    numbers = np.random.default_rng(0)
    for part, count in (("train", 20), ("test", 6)):
        for name in ("dark", "light"):
            (folder / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 150, (20, 24, 3)) + (100 if name == "light" else 0)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / part / name / f"{index}.png")


class Board:
    """What a child tells its parent, through memory that survives its death: the stage that it is
    in, the steps done, and how many calls it has made."""

    STAGES = ("start", "step", "checkpoint", "log", "test")

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 24)

    def write(self, place: int, value: int) -> None:
        self.memory[8 * place : 8 * place + 8] = struct.pack("q", value)

    def read(self, place: int) -> int:
        return int(struct.unpack("q", self.memory[8 * place : 8 * place + 8])[0])

    def clear(self) -> None:
        self.memory[:] = bytes(24)

    def tell(self) -> dict[str, Any]:
        return {"stage": self.STAGES[self.read(0)], "steps": self.read(1)}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def around(owner: Any, name: str, stage: str, board: Board) -> None:
    """Have the board show `stage` while a function runs."""
    function = getattr(owner, name)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        before = board.read(0)
        board.write(0, Board.STAGES.index(stage))
        try:
            return function(*arguments, **keywords)
        finally:
            board.write(0, before)

    setattr(owner, name, wrapped)


def arm(kill: Kill | None, calls: int, board: Board) -> None:
    """In the child, before the run: the stages, and what will kill it."""
    from resnetv2.training import checkpoint, files, log, loop
    from resnetv2.training.state import RunState

    # Its pictures would take most of a run's Python calls.
    loop.Loop._draw = lambda self, now: None  # type: ignore[method-assign]
    around(loop.Loop, "save", "checkpoint", board)
    around(log.RunLog, "_append", "log", board)
    around(loop, "evaluate_as", "test", board)
    rate = RunState.rate

    def count(run: Any, step: int) -> float:
        board.write(0, Board.STAGES.index("step"))
        board.write(1, run.done)
        return rate(run, step)

    RunState.rate = count  # type: ignore[method-assign]
    if kill is None or kill.how == "call":
        count_calls(None if kill is None else int(kill.at * calls), board)
    elif kill.how == "write":
        write = checkpoint.write_atomically
        seen = 0

        def counting(path: Path, *work: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == kill.number:
                size = max(file.stat().st_size for file in path.parents[2].glob("*/checkpoints/*"))
                tear(files._RecordingFile, int(kill.at * size))
            write(path, *work)

        checkpoint.write_atomically = counting
    elif kill.how == "line":
        append, lines = log.RunLog._append, 0

        def half(self: Any, line: bytes) -> None:
            nonlocal lines
            lines += 1
            if lines == kill.number:
                self._file.write(line[: max(1, int(kill.at * len(line)))])
                die()
            append(self, line)

        log.RunLog._append = half  # type: ignore[method-assign]
        around(log.RunLog, "_append", "log", board)
    elif kill.how == "enter":
        module, _, name = kill.function.partition(":")
        enter(sys.modules[module], name, kill.number)


def enter(owner: Any, name: str, number: int) -> None:
    function, seen = getattr(owner, name), 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            die()
        return function(*arguments, **keywords)

    setattr(owner, name, wrapped)


def tear(kind: Any, left: int) -> None:
    """Let the files of a class take `left` more bytes."""
    write = kind.write

    def torn(self: Any, data: Any) -> int:
        nonlocal left
        if len(data) >= left:
            write(self, bytes(data)[:left])
            die()
        left -= len(data)
        return int(write(self, data))

    kind.write = torn


def count_calls(last: int | None, board: Board) -> None:
    """Count this process' Python calls, and die at the `last`."""
    me, calls = os.getpid(), 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        if event != "call":
            return
        calls += 1
        if calls == last:
            die()
        if os.getpid() != me:
            sys.setprofile(None)
        if last is None:
            board.write(2, calls)

    sys.setprofile(profile)


def fork(work: Callable[[], None], seconds: float | None = None) -> tuple[int, str]:
    """Run `work` in a child, killed after some seconds if given: its wait status, and the
    traceback of what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            # The end of it: a pipe that nobody reads yet takes no more.
            os.write(writing, traceback.format_exc()[-4000:].encode())
        finally:
            os._exit(status)
    os.close(writing)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    # Not to its end: a killed run's workers hold it open a while.
    os.set_blocking(reading, False)
    with open(reading, "rb", buffering=0) as pipe:
        return status, (pipe.read(4000) or b"").decode(errors="replace")


def newest(run: Path) -> dict[str, Any]:
    from resnetv2.training.checkpoint import Checkpoints, read

    return read(Checkpoints(run / "checkpoints").files()[0])


def differences(mine: Any, theirs: Any, where: str = "") -> Iterator[str]:
    """Where two states differ in a bit, timings aside."""
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        same = mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if not same or mine.numpy().tobytes() != theirs.numpy().tobytes():
            yield where
    elif isinstance(mine, dict) and isinstance(theirs, dict):
        for key in {**mine, **theirs}:
            if key not in TIMING:
                yield from differences(mine.get(key), theirs.get(key), f"{where}/{key}")
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        if len(mine) != len(theirs):
            yield f"{where}: {len(mine)} and {len(theirs)}"
        for index, (a, b) in enumerate(zip(mine, theirs)):
            yield from differences(a, b, f"{where}/{index}")
    elif mine != theirs:
        yield f"{where}: {mine!r} and {theirs!r}"


def course(run: Path) -> list[dict[str, Any]]:
    """The steps and epochs in a run's log, without timings."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in record.items() if key not in TIMING}
        for record in records
        if record["event"] in ("step", "epoch")
    ]


class Kind:
    """A kind of run and its uninterrupted course, against which the others are held."""

    def __init__(self, name: str, folder: Path, board: Board) -> None:
        self.folder, self.board = folder / name, board
        self.options = options_of(name, folder)
        self.whole = self.folder / "whole"
        started = time.monotonic()
        status, error = fork(lambda: self.run(self.whole, None))
        assert status == 0, error
        self.seconds = time.monotonic() - started
        self.calls = board.read(2)
        self.state, self.course = newest(self.whole), course(self.whole)

    def run(self, out: Path, kill: Kill | None, count: bool = True) -> None:
        from resnetv2.training.run import train_resnet_v2

        if count or kill is not None:
            arm(kill, getattr(self, "calls", 0), self.board)
        train_resnet_v2(**self.options, out=out, resume="auto")

    def trial(self, name: str, kills: list[Kill]) -> dict[str, Any]:
        """Kill a run as asked, let it end, and compare it."""
        from resnetv2.training.checkpoint import read

        out = self.folder / name.replace(" ", "-")
        deaths: list[dict[str, Any]] = []
        for kill in kills:
            seconds = self.seconds * kill.at if kill.how == "clock" else None
            status, error = -1, ""
            while not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
                self.board.clear()
                status, error = fork(lambda: self.run(out, kill), seconds)  # noqa: B023  # run at once
                if seconds is None or error:
                    break
                seconds /= 2  # it had ended already, which is no kill
                if status == 0:
                    out = out.with_name(out.name + "-again")
            death = {**self.board.tell(), "how": kill.how, "error": error}
            death["killed"] = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            death["checkpoints"] = len(list(out.glob("checkpoints/step-*.pt")))
            death["torn"] = len(list(out.glob("checkpoints/.*.partial")))
            deaths.append(death)
        status, error = fork(lambda: self.run(out, None, count=False))
        found = [f"the resumed run failed, wait status {status}: {error}"]
        if status == 0:
            found = list(differences(newest(out), self.state))
            found += differences(course(out), self.course, "metrics.jsonl")
            best = [read(at / "checkpoints" / "best.pt") for at in (out, self.whole)]
            found += differences(*best, "best.pt")
            left = [path.name for path in out.rglob("*.partial")]
            found += [f"left behind: {name}" for name in left]
        return {"deaths": deaths, "differs": found[:10]}


def main(folder: Path) -> None:
    import tqdm

    from resnetv2.training import loop
    from resnetv2.training.run import train_resnet_v2

    tqdm.tqdm.monitor_interval = 0  # a thread would not survive a fork
    torch.set_num_threads(1)
    loop.plot_curves = lambda *arguments: None  # a second for each run, and no part of its state
    warm = {"depth": 8, "backend": "aten", "device": "cpu", "steps": 2, "verbose": False}
    train_resnet_v2("digits", **warm, ema=0.9, limit_batches=2)
    board, kinds, results = Board(), {}, {}
    for name, trial in trials().items():
        if trial.kind not in kinds:
            kinds[trial.kind] = Kind(trial.kind, folder, board)
        results[name] = kinds[trial.kind].trial(name, trial.kills)
    (folder / "results.json").write_text(json.dumps(results))


def one(folder: Path, kind: str, out: Path, step: int) -> None:
    """A run in a process of its own, which imports what it needs as it goes.

    step: it is killed there; 0 for a run that may end.
    """
    torch.set_num_threads(1)
    from resnetv2.training import loop
    from resnetv2.training.run import train_resnet_v2

    loop.plot_curves = lambda *arguments: None
    if step:
        arm(Kill("enter", number=step, function=_STEP), 0, Board())
    train_resnet_v2(**options_of(kind, folder), out=out, resume="auto")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        one(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
