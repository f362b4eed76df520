"""The file of measured choices: what is written is found again, and nothing else is used."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="choices are of Triton's kernels")

from resnetv2.kernels import choices
from resnetv2.kernels.choices import ATEN, DGRAD, FORWARD, FUSED, WRITTEN, Choice
from resnetv2.kernels.operands import Geometry
from tests.support.yardstick import DEVICE

X = torch.empty(2, 16, 8, 8, device=DEVICE)
WEIGHT, GEOMETRY = (16, 16, 3, 3), Geometry(padding=(1, 1))
TILE = (32, 16, 16, 4, 1, True)
HERE = choices.device_name(X)
assert HERE is not None


@pytest.fixture(autouse=True)
def _no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RESNETV2_CACHE_DIR", str(tmp_path))
    choices.forget()
    yield
    choices.forget()


def key(operation: str = FORWARD, batch: int = 2, dtype: torch.dtype = torch.bfloat16) -> str:
    return choices.key(operation, (batch, 16, 8, 8), WEIGHT, GEOMETRY, dtype)


def find(operation: str = FORWARD, dtype: torch.dtype = torch.bfloat16) -> Choice | None:
    return choices.find(operation, X, WEIGHT, GEOMETRY, dtype)


def write(device: str = HERE, **entries: Choice) -> str:
    return choices.write(device, entries or {key(): Choice(WRITTEN, TILE, {"written": 1e-5})})


def content() -> Any:
    return json.loads(choices.path().read_text())


def test_what_is_written_is_found() -> None:
    assert find() is None
    digest = write()
    assert find() == Choice(WRITTEN, TILE, {"written": 1e-5})
    assert choices.measured(HERE).digest == digest
    assert find(DGRAD) is find(dtype=torch.float16) is None
    assert choices.known(X, WEIGHT, GEOMETRY) == {FORWARD: (WRITTEN,)}
    assert choices.known(X, (16, 16, 1, 1), GEOMETRY) == {}


def test_tf32_is_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = key(dtype=torch.float32)
    monkeypatch.setattr(choices, "allow_tf32", lambda: True)
    assert key(dtype=torch.float32) != exact
    assert key().endswith("bfloat16")


def test_a_second_measurement_adds_to_the_first() -> None:
    write()
    other = key(batch=4)
    write("another GPU", **{other: Choice(ATEN)})
    first = choices.measured(HERE).digest
    write(HERE, **{other: Choice(ATEN)})
    assert choices.measured(HERE).choices.keys() == {key(), other}
    assert choices.measured(HERE).digest != first
    assert content()["devices"].keys() == {HERE, "another GPU"}
    assert [*choices.path().parent.iterdir()] == [choices.path()]


def test_times_are_not_in_the_digest() -> None:
    first = write()
    assert write(HERE, **{key(): Choice(WRITTEN, TILE, {"written": 2e-5})}) == first
    assert write(HERE, **{key(): Choice(ATEN)}) != first


def test_a_process_reads_it_once() -> None:
    """Whoever replaces it meanwhile changes no choice of a run in hand."""
    write()
    assert find() is not None
    text = choices.path().read_text()
    choices.path().unlink()
    assert find() is not None
    choices.forget()
    assert find() is None
    choices.path().write_text(text)


def test_another_devices_file_is_not_used() -> None:
    write("NVIDIA A100, sm_80, 108 multiprocessors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is None
    note = choices.measured(HERE).note
    assert f"has choices for NVIDIA A100, sm_80, 108 multiprocessors, none for {HERE}" in note


def test_another_versions_file_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    write()
    now = {**choices.versions(), "triton": "9.9"}
    monkeypatch.setattr(choices, "versions", lambda: now)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is None
    was = content()["devices"][HERE]["versions"]["triton"]
    note = choices.measured(HERE).note
    assert f"was measured with resnetv2 {now['resnetv2']}" in note
    assert note.index(f"triton {was}") < note.index("here are") < note.index("triton 9.9")
    # Measured anew, it has those alone.
    write(HERE, **{key(batch=4): Choice(ATEN)})
    assert choices.measured(HERE).choices.keys() == {key(batch=4)}


def tile(section: Any) -> None:
    section["choices"][key()]["tile"][0] = 64


def how(section: Any) -> None:
    section["choices"][key()]["how"] = "by hand"


def short(section: Any) -> None:
    section["choices"][key()]["tile"] = [64]


def gone(section: Any) -> None:
    section["choices"] = []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (tile, "expected choices with digest"),
        (how, "expected one of fused, written, aten, apart .* got 'by hand'"),
        (short, r".*a tile of 6 numbers .* got 'written' and \[64\]"),
        (gone, r"expected an object of choices, got \[\]"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tampered_file_warns_once(change: Callable[[Any], None], said: str) -> None:
    write()
    found = content()
    change(found["devices"][HERE])
    choices.path().write_text(json.dumps(found))
    choices.forget()
    with pytest.warns(RuntimeWarning, match=f"is not used: {said}"):
        assert find() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find() is find(DGRAD) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "expected JSON, got 1 bytes that are none"),
        (b"\xff\xfe", "expected JSON"),
        (b"[1, 2]", "expected format 1, got None"),
        (b'{"format": 2}', "expected format 1, got 2"),
        (b'{"format": 1, "devices": [1]}', r"expected objects by device, got \[1\]"),
    ],
)
def test_a_damaged_file_warns_and_is_replaced(text: bytes, said: str) -> None:
    choices.path().write_bytes(text)
    with pytest.warns(RuntimeWarning, match=said):
        assert find() is None
    write()
    assert find() == Choice(WRITTEN, TILE, {"written": 1e-5})


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RESNETV2_CACHE_DIR", str(tmp_path / "file" / "folder"))
    assert find() is None
    for attempt in (choices.check_writable, write):
        with pytest.raises(OSError, match="file"):
            attempt()


def test_a_write_that_fails_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    write()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write(HERE, **{key(): Choice(ATEN)})
    choices.forget()
    assert find() == Choice(WRITTEN, TILE, {"written": 1e-5})
    assert [*choices.path().parent.iterdir()] == [choices.path()]


def test_what_is_forced_comes_first() -> None:
    write()
    with choices.forced({DGRAD: Choice(FUSED)}):
        assert find(DGRAD) == Choice(FUSED)
        assert find() is None
    assert find() is not None
