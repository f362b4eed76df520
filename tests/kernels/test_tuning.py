"""The autotuner, with a clock and a device of the test's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton")

from resnetv2.kernels import tuning
from resnetv2.kernels.launch import Config

TILES = [Config(64, 16, 16), Config(128, 16, 16), Config(64, 32, 16)]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No choices remembered, neither in this process nor in the file."""
    monkeypatch.setenv("RESNETV2_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})


def choose(times: dict[Config, float], key: tuple[Any, ...] = (8, "bf16")) -> Config:
    """Tune with ``times`` as the clock; a tile that is not in it must not be run."""
    ran: list[Config] = []

    def timer(run: Callable[[], Any]) -> float:
        run()
        return times[ran[-1]]

    return tuning.choose(
        "conv_forward", key, TILES, ran.append, timer=timer, device=lambda: "H100 9.0"
    )


FAST_MIDDLE = {TILES[0]: 2.0, TILES[1]: 1.0, TILES[2]: 3.0}
FAST_LAST = {TILES[0]: 2.0, TILES[1]: 3.0, TILES[2]: 1.0}


def test_takes_the_fastest_and_keeps_it() -> None:
    """Equal bits within a process: a second look at the clock would decide differently."""
    assert choose(FAST_MIDDLE) == TILES[1]
    assert choose(FAST_LAST) == TILES[1]
    assert choose(FAST_LAST, (16, "bf16")) == TILES[2]


def test_the_file_decides_for_later_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(FAST_MIDDLE)
    choose(FAST_LAST, (16, "bf16"))
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose({}) == TILES[1]
    assert choose({}, (16, "bf16")) == TILES[2]
    entries = json.loads(tuning.cache_file().read_text())
    assert len(entries) == 2
    assert all(key.startswith("H100 9.0/") for key in entries)
    assert not [p for p in tuning.cache_file().parent.iterdir() if p != tuning.cache_file()]


def test_a_tile_that_no_longer_exists_is_timed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(FAST_MIDDLE)
    path = tuning.cache_file()
    path.write_text(path.read_text().replace("128", "512"))
    monkeypatch.setattr(tuning, "_chosen", {})
    assert choose(FAST_LAST) == TILES[2]


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"a": 1}', '{"a": ["x"]}', "\xff"])
def test_a_file_that_cannot_be_understood_warns(text: str) -> None:
    tuning.cache_file().write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match="ignored"):
        assert choose(FAST_MIDDLE) == TILES[1]
    assert len(json.loads(tuning.cache_file().read_text())) == 1


def test_a_folder_that_cannot_be_written_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNETV2_CACHE_DIR", str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        assert choose(FAST_MIDDLE) == TILES[1]
    assert choose({}) == TILES[1]


def test_off_unless_asked_for_and_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RESNETV2_AUTOTUNE", raising=False)
    assert not tuning.enabled()
    monkeypatch.setenv("RESNETV2_AUTOTUNE", "1")
    monkeypatch.setattr(tuning.launch, "INTERPRET", False)
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: False)
    assert not tuning.enabled()
    monkeypatch.setattr(tuning.torch.cuda, "is_available", lambda: True)
    dry_run = SimpleNamespace(active=SimpleNamespace())
    monkeypatch.setattr(tuning.triton.runtime, "driver", dry_run)
    assert not tuning.enabled()
    monkeypatch.setattr(tuning.launch, "INTERPRET", True)
    assert not tuning.enabled()
