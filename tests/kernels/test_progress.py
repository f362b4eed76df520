"""What is said of compiling: on a terminal, not before it takes long, gone when it is over."""

from __future__ import annotations

import io
import sys

import pytest

from resnetv2.kernels.progress import Compiling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """Each kernel takes as many seconds as it is told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def compiled(stream: io.StringIO, seconds: list[float], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    clock = Clock()
    compiling = Compiling(clock)
    for each in seconds:
        with compiling.kernel():
            clock.now += each
    return stream.getvalue()


def test_says_nothing_for_some_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(Terminal(), [1.0, 1.5, 0.4, 0.5], monkeypatch) == ""


def test_says_how_many_and_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that the cache had are not counted."""
    said = compiled(Terminal(), [2.0, 0.01, 2.0, 1.0], monkeypatch)
    assert said == "\r\033[Kcompiling kernels: 2 in 4 s, kept for later runs\r\033[K"


def test_says_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiled(io.StringIO(), [9.0, 9.0], monkeypatch) == ""


def test_a_kernel_that_fails_leaves_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    compiling = Compiling()
    compiling.seconds = 5.0
    with pytest.raises(RuntimeError), compiling.kernel():
        raise RuntimeError
    assert stream.getvalue().endswith("\r\033[K")


def test_launches_come_by(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = pytest.importorskip("resnetv2.kernels.launch")
    clock = Clock()
    compiling = Compiling(clock)
    monkeypatch.setattr(launch, "COMPILING", compiling)

    def run(*args: object, **options: object) -> None:
        clock.now += 2.0

    launch._first({(1,): run}, (1,), (), {})
    assert (compiling.kernels, compiling.seconds) == (1, 2.0)
