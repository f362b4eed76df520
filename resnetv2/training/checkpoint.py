"""Checkpoints of a run: written whole or not at all, verified when read, the last few kept.

A file appears under its name only after its bytes are on the disk (``resnetv2.training.files``): a
process killed at any point, or a disk that fills up, leaves the older checkpoints as they were.
Checkpoints are ``torch.save``'s zip archives, whose entries carry a CRC-32; reading checks every
one before anything is taken from it.
"""

import contextlib
import errno
import os
import pickle
import re
import stat
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import InputError
from .files import make_folder, reason_of, write_atomically

__all__ = ["FORMAT", "Checkpoints", "check_parts", "read"]

# Raised by one when a file of this version can no longer be read by the version before it.
FORMAT = 1

_STEP = re.compile(r"step-(\d{8,})\.pt")
_BEST = "best.pt"
_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
}


class Checkpoints:
    """The checkpoints in one folder: ``step-00001234.pt`` for the last few, ``best.pt``.

    Two processes that save into one folder take turns: of two files with one name the one finished
    later stays, and each removes old ones as if all were its own.

    Args:
        folder: is created by the first ``save``.
        keep: so many of the newest stay, at least 1. ``best.pt`` does not count.

    Raises:
        InputError: ``keep`` is below 1.
    """

    def __init__(self, folder: Path | str, keep: int = 3) -> None:
        if keep < 1:
            raise InputError(f"keep must be at least 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        # Files that ``load`` could not use: they do not count as kept ones.
        self._unusable: set[Path] = set()

    @property
    def best(self) -> Path:
        """Where the best checkpoint is, if there is one."""
        return self.folder / _BEST

    def files(self) -> list[Path]:
        """The checkpoints that are there, newest (by the step in the name) first, best.pt not."""
        try:
            found = [path for path in self.folder.iterdir() if _STEP.fullmatch(path.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise InputError(f"cannot look into {self.folder}: {reason_of(error)}") from error
        return sorted(found, key=_step_of, reverse=True)

    def save(self, state: dict[str, Any], step: int, best: bool = False) -> Path:
        """Write the state after ``step`` steps, and only then remove the ones it makes too many.

        A tensor that is a part of a larger storage is written without the rest of it.

        Args:
            state: of tensors and plain data (numbers, strings, None, dicts, lists, tuples).
            step: optimizer steps done. Files of later steps are left alone, whoever wrote them.
            best: ``best.pt`` becomes this state too: before the step's own file, so that a run
                killed in between does the step again and finds it the best again.

        Returns:
            The path of the step's file.

        Raises:
            InputError: it cannot be written. The line says which checkpoints are left.
            TypeError: ``state`` has something that ``read`` would refuse.
        """
        content = {**_plain(state, "state"), "format": FORMAT, "step": step}
        path = self.folder / f"step-{step:08d}.pt"
        try:
            make_folder(self.folder)
            names = (self.best, path) if best else (path, None)
            write_atomically(names[0], lambda file: torch.save(content, file), names[1])
        except InputError as error:
            raise InputError(f"{error}; {self._left(error)}") from error
        self._unusable.discard(path)
        self._remove_older(step)
        return path

    def load(
        self, which: str | Path = "auto", warn: Callable[[str], object] = print
    ) -> tuple[Path, dict[str, Any]] | None:
        """Read a checkpoint.

        Args:
            which: ``auto`` for the newest usable one of this folder, ``best.pt`` if no other is
                usable; ``best`` for ``best.pt``; or a path: of a file, of a run's folder, or of a
                folder with checkpoints, in which the newest usable one is taken.
            warn: is called with one line for every file that cannot be used and is passed over.

        Returns:
            The path and the state, tensors on the CPU. None if ``which`` is ``auto`` and the folder
            has no checkpoint at all.

        Raises:
            InputError: no checkpoint at the path, or none of those there can be used.
        """
        if which == "auto":
            return self._newest(warn)
        if which == "best":
            return self.best, read(self.best)
        path = Path(which)
        if not os.path.isdir(path):
            return path, read(path)
        for folder in (path / "checkpoints", path):
            here = self if folder == self.folder else Checkpoints(folder)
            found = here._newest(warn)
            if found is not None:
                return found
        raise InputError(f"no checkpoint in {path}: expected step-*.pt there or in checkpoints/")

    def clear(self) -> None:
        """Remove every checkpoint, for a new run in an old one's place. Other files stay.

        Raises:
            InputError: one cannot be removed.
        """
        for path in [*self.files(), self.best]:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"cannot remove {path}: {reason_of(error)}") from error
        self._unusable.clear()

    def _remove_older(self, step: int) -> None:
        """Leave the last ``keep`` usable files up to ``step``, and none older than those."""
        files = [file for file in self.files() if _step_of(file) <= step]
        kept = [file for file in files if file not in self._unusable][: self.keep]
        for file in files:
            if len(kept) == self.keep and _step_of(file) < _step_of(kept[-1]):
                # Another process may have removed it, and a file too many does no harm.
                with contextlib.suppress(OSError):
                    file.unlink()

    def _newest(self, warn: Callable[[str], object]) -> tuple[Path, dict[str, Any]] | None:
        candidates = self.files()
        if os.path.exists(self.best):
            candidates.append(self.best)
        if not candidates:
            return None
        errors: list[InputError] = []
        for path, following in zip(candidates, [*candidates[1:], None], strict=True):
            try:
                return path, read(path)
            except InputError as error:
                errors.append(error)
                self._unusable.add(path)
                if following is not None:
                    warn(f"{error}; trying {following.name} instead")
        raise InputError(
            f"none of the {len(candidates)} checkpoints in {self.folder} can be used; "
            f"the newest: {errors[0]}"
        ) from errors[0]

    def _left(self, error: InputError) -> str:
        """The checkpoints that are left after a failed save, and how to go on from them."""
        reason = error.__cause__
        number = reason.errno if isinstance(reason, OSError) else None
        advice = _ADVICE.get(number or 0, "mend that")
        files = [file for file in self.files() if file not in self._unusable]
        if not files:
            return f"there is no older checkpoint: {advice} and start again"
        older = "the older checkpoint is" if len(files) == 1 else "the older checkpoints are"
        return (
            f"{older} untouched (newest: {files[0].name}): "
            f"{advice} and go on from there with --resume auto"
        )


def read(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint after checking all of it; tensors come to the CPU.

    Every entry's CRC-32 is computed in a first, streaming pass. Nothing in the file is executed:
    tensors and plain data only.

    Raises:
        InputError: no such file, or it is damaged, of another program or of a newer version. The
            line names the file and says which.
    """
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "no file"
            raise InputError(f"{path} is {kind}, expected a checkpoint")
        with path.open("rb") as file:
            state = _read(file, path)
    except FileNotFoundError as error:
        raise InputError(f"no checkpoint at {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}") from error
    if not (
        isinstance(state, dict)
        and type(state.get("format")) is int
        and type(state.get("step")) is int
        and state["format"] >= 1
    ):
        raise InputError(
            f"{path} is not a checkpoint of resnetv2 but another program's file, "
            "or weights without the state of a run"
        )
    if state["format"] > FORMAT:
        raise InputError(
            f"{path} was written by a newer version of resnetv2 (format {state['format']}, "
            f"this one reads up to {FORMAT}): upgrade to use it"
        )
    return state


# The parts of a checkpoint.
_PARTS: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "run": dict,
    "processes": int,
    "machine": dict,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "ema": (dict, type(None)),
    "history": list,
    "seconds": (int, float),
    "best": (int, float),
    "sums": list,
    "random": list,
}


def check_parts(state: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint that ``read`` takes and that lacks what a run goes on from.

    Raises:
        InputError: names the file and the first part that is missing or of another type.
    """
    # Versions before it was kept wrote none.
    state = {"machine": {}, **state}
    for name, kind in _PARTS.items():
        if not isinstance(state.get(name, ...), kind):
            what = f"its {name} is of another kind" if name in state else f"it has no {name}"
            raise InputError(f"{path} is no checkpoint that a run has written: {what}")
    if state["step"] < 0:
        raise InputError(f"{path} is no checkpoint that a run has written: step {state['step']}")


def _read(file: BinaryIO, path: Path) -> Any:
    start = file.read(4)
    if not start:
        raise InputError(f"{path} is empty, not a checkpoint")
    try:
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
    except MemoryError:
        raise
    # zipfile raises many things where bad offsets, names and methods lead it.
    except Exception as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        if start == b"PK\x03\x04"[: len(start)]:
            raise InputError(f"{path} is a damaged checkpoint, cut off or overwritten") from error
        raise InputError(f"{path} is not a checkpoint of resnetv2") from error
    if damaged is not None:
        entry = damaged.partition("/")[2] or damaged
        raise InputError(f"{path} is a damaged checkpoint: {entry} fails its checksum")
    file.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} is not a checkpoint of resnetv2: it holds objects other than tensors and "
            "plain data, which are not loaded"
        ) from error
    except Exception as error:
        # An archive with valid checksums in which torch finds no checkpoint.
        raise InputError(f"{path} is not a checkpoint of resnetv2") from error


def _plain(value: Any, where: str) -> Any:
    """``value`` as ``torch.load(weights_only=True)`` takes it back.

    A tensor that is a part of a larger storage is copied, so that the rest of it is not written.
    Numbers and strings of derived types (numpy's float64, torch's version) become plain ones.
    """
    if isinstance(value, Tensor):
        value = value.detach()
        if (
            value.layout == torch.strided
            and value.numel() * value.element_size() < value.untyped_storage().nbytes()
        ):
            return value.clone()
        return value
    if isinstance(value, OrderedDict):
        result: OrderedDict[Any, Any] = OrderedDict(_items(value, where))
        # A state_dict carries its modules' versions there.
        if hasattr(value, "_metadata"):
            result._metadata = value._metadata  # type: ignore[attr-defined]
        return result
    if isinstance(value, dict):
        return dict(_items(value, where))
    if value is None or isinstance(value, bool | bytes | torch.dtype | torch.device | torch.Size):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    raise TypeError(
        f"{where} is {type(value).__module__}.{type(value).__qualname__}: a checkpoint holds "
        "tensors and plain data"
    )


def _items(values: dict[Any, Any], where: str) -> list[tuple[Any, Any]]:
    return [
        (_plain(key, where), _plain(value, f"{where}[{key!r}]")) for key, value in values.items()
    ]


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])
