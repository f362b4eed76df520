"""Checkpoints: whole or not there, whatever kills the writer; nothing damaged is used."""

import errno
import multiprocessing
import os
import pickle
import resource
import signal
import stat
import threading
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resnetv2.errors import InputError
from resnetv2.training import files
from resnetv2.training.checkpoint import FORMAT, Checkpoints, check_parts, read
from resnetv2.training.files import write_atomically

# Children start from a server that has imported torch once, and has no threads to fork.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "resnetv2.training.checkpoint"])


def state_at(step: int, size: int = 20_000) -> dict[str, Any]:
    """A state that its step decides to the bit."""
    generator = torch.Generator().manual_seed(step)
    return {
        "model": {"weight": torch.randn(size, generator=generator)},
        "generator": generator.get_state(),
        "history": [{"epoch": 1, "loss": step / 3}],
    }


def is_state_at(state: dict[str, Any], step: int) -> bool:
    expected = state_at(step)
    return (
        state["step"] == step
        and state["format"] == FORMAT
        and torch.equal(state["model"]["weight"], expected["model"]["weight"])
        and torch.equal(state["generator"], expected["generator"])
        and state["history"] == expected["history"]
    )


def names(checkpoints: Checkpoints) -> list[str]:
    return [path.name for path in checkpoints.files()]


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def no_warning(line: str) -> None:
    raise AssertionError(line)


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last  # type: ignore[call-overload]
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state["numbers"] = {"nan": float("nan"), "tuple": (1, None, True), "dtype": torch.float16}
    path = Checkpoints(tmp_path / "run" / "checkpoints").save(state, 7)
    assert path.name == "step-00000007.pt"

    loaded = read(path)
    assert loaded["step"] == 7
    assert isinstance(loaded["model"], OrderedDict)
    assert loaded["model"]._metadata == state["model"]._metadata
    for name, tensor in state["model"].items():
        assert torch.equal(loaded["model"][name], tensor)
        assert loaded["model"][name].stride() == tensor.stride()
    assert loaded["numbers"]["tuple"] == (1, None, True)
    assert loaded["numbers"]["dtype"] is torch.float16
    assert loaded["numbers"]["nan"] != loaded["numbers"]["nan"]
    momentum = loaded["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, state["optimizer"]["state"][0]["momentum_buffer"])


def test_numbers_and_strings_of_other_types_come_back_plain(tmp_path: Path) -> None:
    state = {"loss": np.float64(0.5), "torch": torch.__version__, "flag": True}
    loaded = read(Checkpoints(tmp_path).save(state, 0))
    assert [type(loaded[key]) for key in state] == [float, str, bool]
    assert loaded["torch"] == str(torch.__version__)


def test_what_could_not_be_read_again_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"state\['model'\]\[1\] is numpy.ndarray"):
        Checkpoints(tmp_path).save({"model": [1, np.ones(2)]}, 0)
    assert list(tmp_path.iterdir()) == []


def test_part_of_a_large_storage_is_saved_alone(tmp_path: Path) -> None:
    storage = torch.randn(1_000_000)
    shared = torch.randn(1000)
    state = {
        "part": storage[10:20],
        "one": shared,
        "two": shared,
        "columns": storage[:4].view(2, 2).t(),
    }
    path = Checkpoints(tmp_path).save(state, 0)
    assert path.stat().st_size < 4000 + 4000
    loaded = read(path)
    assert torch.equal(loaded["part"], storage[10:20])
    assert torch.equal(loaded["columns"], state["columns"])
    assert loaded["one"].data_ptr() == loaded["two"].data_ptr()


def test_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-1.pt").write_text("not a name of ours")
    for step in range(10, 60, 10):
        checkpoints.save(state_at(step), step, best=step == 20)
    assert names(checkpoints) == ["step-00000050.pt", "step-00000040.pt"]
    assert is_state_at(read(checkpoints.best), 20)
    assert {"notes.txt", "step-1.pt"} <= everything(tmp_path).keys()
    assert len(everything(tmp_path)) == 5


def test_best_is_no_second_copy_on_the_disk(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state_at(1), 1, best=True)
    assert path.samefile(checkpoints.best)
    # Once more, as a resumed run does.
    checkpoints.save(state_at(1), 1, best=True)
    assert everything(tmp_path).keys() == {"best.pt", path.name}


def test_best_is_copied_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    checkpoints = Checkpoints(tmp_path)
    path = checkpoints.save(state_at(1), 1, best=True)
    assert not path.samefile(checkpoints.best)
    assert path.read_bytes() == checkpoints.best.read_bytes()
    assert is_state_at(read(path), 1)
    assert everything(tmp_path).keys() == {"best.pt", path.name}


def test_a_run_that_goes_on_from_an_older_one_keeps_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        Checkpoints(tmp_path).save(state_at(step), step)
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_at(15), 15)
    assert names(checkpoints) == [f"step-000000{step}.pt" for step in (30, 20, 15)]


def test_a_damaged_one_does_not_count_as_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (10, 20):
        checkpoints.save(state_at(step), step)
    checkpoints.files()[0].write_bytes(b"PK\x03\x04")
    assert checkpoints.load("auto", lambda line: None) is not None
    checkpoints.save(state_at(25), 25)
    assert names(checkpoints) == [f"step-000000{step}.pt" for step in (25, 20, 10)]
    checkpoints.save(state_at(30), 30)
    assert names(checkpoints) == ["step-00000030.pt", "step-00000025.pt"]


def test_clear_removes_checkpoints_only(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(1), 1, best=True)
    (tmp_path / "notes.txt").write_text("mine")
    checkpoints.clear()
    assert everything(tmp_path).keys() == {"notes.txt"}
    assert checkpoints.load() is None


def test_keep_is_at_least_one() -> None:
    with pytest.raises(InputError, match="keep must be at least 1, got 0"):
        Checkpoints("somewhere", keep=0)


def test_content_is_on_the_disk_before_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the name, before an older checkpoint is removed."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = checkpoints.save(state_at(1), 1)
    calls: list[str] = []
    fsync, replace, unlink = os.fsync, os.replace, Path.unlink

    def recorded_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        calls.append("fsync folder" if is_folder else "fsync file")
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> None:
        calls.append(f"replace {target.name}")
        assert is_state_at(read(source), 2)
        replace(source, target)

    def recorded_unlink(path: Path, missing_ok: bool = False) -> None:
        calls.append(f"remove {path.name}")
        unlink(path, missing_ok)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    monkeypatch.setattr(Path, "unlink", recorded_unlink)
    new = checkpoints.save(state_at(2), 2)
    assert calls == ["fsync file", f"replace {new.name}", "fsync folder", f"remove {old.name}"]


def send_and_wait(connection: Connection) -> None:
    connection.send("here")
    time.sleep(60)


def saver_that_stops(folder: Path, step: int, where: str, connection: Connection) -> None:
    """Save `step` and stand still at a point of it: after so many bytes, or about a call."""
    if where.isdigit():
        left = int(where)
        write = files._RecordingFile.write

        def slow_write(file: Any, data: Any) -> int:
            nonlocal left
            data = memoryview(data).cast("B")
            left -= write(file, data[: min(left, len(data))]) if left else 0
            if left == 0:
                send_and_wait(connection)
            return len(data)

        files._RecordingFile.write = slow_write  # type: ignore[method-assign]
    else:
        moment, name, *_ = where.split("-")
        original: Callable[..., Any] = getattr(os, name)

        def stopping(*arguments: Any) -> Any:
            if moment == "before":
                send_and_wait(connection)
            result = original(*arguments)
            send_and_wait(connection)
            return result

        setattr(os, name, stopping)
    Checkpoints(folder, keep=1).save(state_at(step), step, best=where.endswith("best"))
    connection.send("done")


# The archive of `state_at` has about 87 kB: in front, in the tensor's data, in the directory.
BYTES = ["1", "64", "50000", "86000"]
CALLS = [
    f"{moment}-{name}"
    for name in ("fsync", "replace", "link-best", "replace-best")
    for moment in ("before", "after")
]


@pytest.mark.parametrize("point", BYTES + CALLS)
def test_kill_at_a_point_of_a_save(tmp_path: Path, point: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(state_at(1), 1, best=True)
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=saver_that_stops, args=(tmp_path, 2, point, theirs))
    process.start()
    assert ours.poll(30)
    assert ours.recv() == "here"
    process.kill()
    process.join()

    found = checkpoints.load("auto", no_warning)
    assert found is not None
    assert is_state_at(found[1], 2 if point == "after-replace" else 1)
    best = 2 if point == "after-replace-best" else 1
    assert is_state_at(read(checkpoints.best), best)
    # The next save takes over the file that was left, and all is as if nothing had happened.
    checkpoints.save(state_at(2), 2)
    assert is_state_at(read(checkpoints.best), best)
    assert everything(tmp_path).keys() == {"best.pt", "step-00000002.pt"}
    checkpoints.save(state_at(2), 2, best=True)
    assert everything(tmp_path).keys() == {"best.pt", "step-00000002.pt"}


def saver_of(folder: Path, steps: range, connection: Connection) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    for step in steps:
        checkpoints.save(state_at(step), step, best=True)
    connection.send("done")


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    pipes = [PROCESSES.Pipe() for _ in range(2)]
    processes = [
        PROCESSES.Process(target=saver_of, args=(tmp_path, range(30), theirs))
        for _, theirs in pipes
    ]
    for process in processes:
        process.start()
    for (ours, _), process in zip(pipes, processes, strict=True):
        assert ours.poll(60)
        assert ours.recv() == "done"
        process.join()
    checkpoints = Checkpoints(tmp_path)
    assert names(checkpoints)[:2] == ["step-00000029.pt", "step-00000028.pt"]
    for path in checkpoints.files():
        assert is_state_at(read(path), int(path.stem[5:]))
    assert is_state_at(read(checkpoints.best), 29)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".partial")]


@pytest.mark.parametrize("moment", ["1", "50000", "before-fsync", "before-replace"])
def test_a_second_writer_waits_for_the_first(tmp_path: Path, moment: str) -> None:
    """And takes its file over when it is killed."""
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=saver_that_stops, args=(tmp_path, 1, moment, theirs))
    process.start()
    assert ours.poll(30)
    second = threading.Thread(target=lambda: Checkpoints(tmp_path).save(state_at(2), 2))
    second.start()
    second.join(0.3)
    assert second.is_alive(), "it has written beside a living writer"
    process.kill()
    process.join()
    second.join(30)
    assert everything(tmp_path).keys() == {"step-00000002.pt"}
    assert is_state_at(read(tmp_path / "step-00000002.pt"), 2)


def refusing(number: int, size: int) -> type[files._RecordingFile]:
    """A disk with room for so many bytes, as a process sees it."""

    class Refusing(files._RecordingFile):
        def write(self, data: Any) -> int:
            room = size - self.tell()
            if room <= 0:
                self.error = OSError(number, os.strerror(number))
                raise self.error
            return super().write(memoryview(data).cast("B")[:room])

    return Refusing


REFUSALS = {
    errno.ENOSPC: "No space left on device; the older checkpoints are untouched (newest: "
    "step-00000002.pt): free some space and go on from there with --resume auto",
    errno.EDQUOT: "free some of your quota",
    errno.EROFS: "make the folder writable",
    errno.EIO: "mend that and go on",
}


@pytest.mark.parametrize("best", [False, True], ids=["step", "best"])
@pytest.mark.parametrize(
    ("number", "size"),
    [(errno.ENOSPC, size) for size in (0, 1, 700, 50_000)] + [(n, 86_000) for n in REFUSALS],
)
def test_no_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, size: int, best: bool
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2):
        checkpoints.save(state_at(step), step, best=True)
    before = everything(tmp_path)
    monkeypatch.setattr(files, "_RecordingFile", refusing(number, size))
    with pytest.raises(InputError) as error:
        checkpoints.save(state_at(3), 3, best=best)
    name = "best.pt" if best else "step-00000003.pt"
    assert one_line(error).startswith(f"cannot write {tmp_path / name}: {os.strerror(number)}; ")
    assert REFUSALS[number] in str(error.value)
    assert everything(tmp_path) == before
    monkeypatch.undo()
    checkpoints.save(state_at(3), 3)
    assert names(checkpoints) == ["step-00000003.pt", "step-00000002.pt"]


def test_no_space_is_noticed_as_late_as_at_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(InputError) as error:
        Checkpoints(tmp_path).save(state_at(3), 3)
    assert one_line(error).endswith("no older checkpoint: free some space and start again")
    assert everything(tmp_path) == {}


@pytest.mark.parametrize(
    ("limit", "size"), [(0, 20_000), (1, 20_000), (40_000, 20_000), (2_000_000, 1_000_000)]
)
def test_the_systems_own_limit_on_files(tmp_path: Path, limit: int, size: int) -> None:
    """Nothing simulated: the kernel refuses to write beyond it.

    Of a large tensor it does so inside torch.save, whose own error names positions only.
    """
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(1), 1)
    before = everything(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal SIGXFSZ, so that the call fails instead.
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(InputError) as error:
            checkpoints.save(state_at(2, size), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large; the older checkpoint is untouched (newest: step" in one_line(error)
    assert everything(tmp_path) == before
    checkpoints.save(state_at(2), 2)
    assert len(checkpoints.files()) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_a_writer_that_fails_leaves_what_was(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def write(file: Any) -> None:
        file.write(b"half of it")
        raise error

    with pytest.raises(error):
        write_atomically(path, write)
    assert everything(tmp_path) == {"file": b"before"}


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(InputError) as error:
        Checkpoints(tmp_path / "file" / "checkpoints").save(state_at(1), 1)
    assert "cannot make the folder" in one_line(error)
    assert Checkpoints(tmp_path / "file" / "checkpoints").load() is None


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :]


DAMAGES = {
    "empty": (lambda content: b"", "is empty"),
    "one-byte": (lambda content: content[:1], "is a damaged checkpoint, cut off"),
    "half": (lambda content: content[: len(content) // 2], "is a damaged checkpoint, cut off"),
    "last-byte-missing": (lambda content: content[:-1], "is a damaged checkpoint, cut off"),
    "zeros-at-the-end": (
        lambda content: content[:40_000] + bytes(len(content) - 40_000),
        "is a damaged checkpoint, cut off",
    ),
    "a-flipped-bit": (flipped, "is a damaged checkpoint: data/0 fails its checksum"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_next_usable_one_is_taken(
    tmp_path: Path, damage: Callable[[bytes], bytes], message: str
) -> None:
    checkpoints = Checkpoints(tmp_path)
    for step in (9, 100, 1000):
        checkpoints.save(state_at(step), step)
    for path in checkpoints.files()[:2]:
        path.write_bytes(damage(path.read_bytes()))
    lines: list[str] = []
    found = checkpoints.load("auto", lines.append)
    assert found is not None
    assert found[0].name == "step-00000009.pt"
    assert is_state_at(found[1], 9)
    assert len(lines) == 2
    assert f"{tmp_path / 'step-00001000.pt'} {message}" in lines[0]
    assert lines[0].endswith("; trying step-00000100.pt instead")
    assert lines[1].endswith("; trying step-00000009.pt instead")

    found[0].write_bytes(damage(found[0].read_bytes()))
    with pytest.raises(InputError) as error:
        checkpoints.load("auto", lambda line: None)
    expected = f"none of the 3 checkpoints in {tmp_path} can be used; the newest: "
    assert expected in one_line(error)
    assert message in one_line(error)


def test_best_is_the_last_resort(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_at(1), 1, best=True)
    path = checkpoints.save(state_at(2), 2)
    (tmp_path / "step-00000001.pt").unlink()
    path.write_bytes(b"")
    lines: list[str] = []
    found = checkpoints.load("auto", lines.append)
    assert found is not None
    assert found[0] == checkpoints.best
    assert lines == [f"{path} is empty, not a checkpoint; trying best.pt instead"]


def test_no_byte_can_change_unnoticed(tmp_path: Path) -> None:
    """Wherever a bit flips, the file is refused in one line or gives the same state."""
    checkpoints = Checkpoints(tmp_path)
    content = checkpoints.save(state_at(3, size=4), 3).read_bytes()
    path = tmp_path / "flipped.pt"
    refused = 0
    for position in range(0, len(content), 11):
        bit = 1 << position % 8
        changed = content[position] ^ bit
        path.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
        try:
            state = read(path)
        except InputError:
            refused += 1
            continue
        expected = state_at(3, size=4)
        assert torch.equal(state["model"]["weight"], expected["model"]["weight"])
        assert torch.equal(state["generator"], expected["generator"])
        assert (state["step"], state["history"]) == (3, expected["history"])
    assert refused > len(content) / 11 / 2


def as_torch(content: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path)


def as_bytes(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def as_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes/readme.txt", "no checkpoint")


class Trap:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


FOREIGN = {
    "text": (as_bytes(b"epochs: 10\n" * 9), "is not a checkpoint of resnetv2"),
    "image": (as_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "is not a checkpoint of resnetv2"),
    "zip": (as_zip, "is not a checkpoint of resnetv2"),
    "pickle": (as_bytes(pickle.dumps({"step": 1})), "is not a checkpoint of resnetv2"),
    "tensor": (as_torch(torch.ones(2)), "another program's file, or weights without"),
    "state-dict": (as_torch(nn.Linear(2, 2).state_dict()), "or weights without the state of a run"),
    "other-program": (as_torch({"format": "a", "step": 2}), "another program's file"),
    "whole-module": (as_torch(nn.Linear(2, 2)), "it holds objects other than tensors"),
    "old-torch": (
        lambda path: torch.save({"w": 1}, path, _use_new_zipfile_serialization=False),
        "is not a checkpoint of resnetv2",
    ),
    "newer": (
        as_torch({"format": FORMAT + 1, "step": 2}),
        f"newer version of resnetv2 (format {FORMAT + 1}, this one reads up to {FORMAT}): upgrade",
    ),
    "folder": (lambda path: path.mkdir(), "is a folder, expected a checkpoint"),
    "missing": (lambda path: None, "no checkpoint at "),
    "pipe": (lambda path: os.mkfifo(path), "is no file, expected a checkpoint"),
}


@pytest.mark.parametrize(("make", "message"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_files(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "step-00000002.pt"
    make(path)
    with pytest.raises(InputError) as error:
        read(path)
    assert message in one_line(error)
    assert str(path) in str(error.value)
    assert "weights_only" not in str(error.value)
    assert not recwarn.list


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    torch.save({"format": FORMAT, "step": 1, "model": Trap(tmp_path / "trap")}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="objects other than tensors and plain data"):
        read(tmp_path / "a.pt")
    assert not (tmp_path / "trap").exists()


def test_where_load_looks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints")
    assert checkpoints.load() is None
    first = checkpoints.save(state_at(1), 1, best=True)
    second = checkpoints.save(state_at(2), 2)

    elsewhere = Checkpoints(tmp_path / "other")
    for which, path in (
        (run, second),
        (str(run), second),
        (run / "checkpoints", second),
        (first, first),
    ):
        found = elsewhere.load(which, no_warning)
        assert found is not None
        assert found[0] == path
    best = checkpoints.load("best")
    assert best is not None
    assert best[1]["step"] == 1
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match=r"no checkpoint in .*other: expected step"):
        elsewhere.load(tmp_path / "other")
    with pytest.raises(InputError, match="no checkpoint at "):
        elsewhere.load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"no checkpoint at .*best\.pt"):
        elsewhere.load("best")


PARTS: dict[str, Any] = {
    "config": {}, "run": {}, "processes": 1, "model": {}, "optimizer": {}, "scaler": {},
    "ema": None, "history": [], "seconds": 0.0, "best": 0.0, "sums": [], "random": [],
}  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_or_of_another_kind(part: str) -> None:
    path = Path("step-00000001.pt")
    whole = {"step": 1, **PARTS}
    check_parts(whole, path)
    with pytest.raises(InputError, match=f"it has no {part}"):
        check_parts({name: value for name, value in whole.items() if name != part}, path)
    with pytest.raises(InputError, match=f"its {part} is of another kind"):
        check_parts({**whole, part: "text"}, path)
