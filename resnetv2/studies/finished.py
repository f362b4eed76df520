"""Nets of a study that are trained, kept in a file: a study that is stopped goes on behind them.

A net is told by all that decides its numbers: the variant's name and seed, the options, the data,
device, threads and versions. One that was trained otherwise is trained again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ..data.batches import ImageData
from ..training.environment import machine
from ..training.metrics import EpochMetrics
from .histories import History
from .options import StudyOptions

_file: ContextVar[Path | None] = ContextVar("file", default=None)


@contextlib.contextmanager
def kept_in(file: Path) -> Iterator[None]:
    """Let ``train_variant`` keep what it has trained in ``file``, and take what is there."""
    token = _file.set(file)
    try:
        yield
    finally:
        _file.reset(token)


def count(file: Path) -> int:
    """Nets that a file holds."""
    return len(_records(file))


def find(name: str, seed: int, data: ImageData, options: StudyOptions) -> History | None:
    """The record of a net that was trained just so."""
    file = _file.get()
    if file is None:
        return None
    key = _key(name, seed, data, options)
    for record in _records(file):
        if record["key"] == key:
            history = History(**record["history"])
            history.epochs = [EpochMetrics(**entry) for entry in record["history"]["epochs"]]
            return history
    return None


def keep(history: History, data: ImageData, options: StudyOptions) -> None:
    """Add a trained net to the file, if there is one."""
    file = _file.get()
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    key = _key(history.variant, history.seed, data, options)
    with file.open("a", encoding="utf-8") as text:
        text.write(json.dumps({"key": key, "history": asdict(history)}) + "\n")


def _records(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError):  # the last line of a process that was killed
            found.append(json.loads(line))
    return found


def _key(name: str, seed: int, data: ImageData, options: StudyOptions) -> str:
    given = {f.name: getattr(options, f.name) for f in fields(options)}
    for other in ("data", "root", "progress", "seeds", "device"):
        given.pop(other, None)
    split = hashlib.sha256()
    for part in (data.train, data.test):
        split.update(part.images.numpy().tobytes())
        split.update(part.labels.numpy().tobytes())
    facts = [name, seed, given, data.crop_padding, data.flip, split.hexdigest()]
    return hashlib.sha256(repr([*facts, machine(options.place)]).encode()).hexdigest()
