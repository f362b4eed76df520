"""The files of a run beside its checkpoints: config.yaml, metrics.jsonl, TensorBoard's events.

metrics.jsonl has one JSON object a line, readable while the run goes on. A run that was killed and
goes on leaves the same lines as one that was not, and a ``resume`` line for each time.
"""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import InputError
from .checkpoint import Checkpoints
from .files import make_folder, reason_of, write_atomically

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["RunLog", "check_folder", "holds_a_run", "read_config", "write_config"]

_METRICS = "metrics.jsonl"
_CONFIG = "config.yaml"

# The events that carry a step and belong to the course of a run. An epoch's step is the number of
# steps done, a step's its index, so that step n is not done yet in a checkpoint of n steps.
_DONE_AT = {"step": 1, "epoch": 0, "resume": 0, "end": 0, "memory": 0}


class RunLog:
    """metrics.jsonl, and TensorBoard's scalars if asked for. A context manager.

    Args:
        folder: of the run, created if missing. None: nothing is written.
        config: what the run was asked for and ran with, the first line (event ``config``).
        resume_step: None starts a new file, in place of an old one. A number of steps goes on
            with the old file: what it holds beyond that many steps is dropped, as is a last line
            that a kill tore, lines of unknown events stay, and an event ``resume`` is added, with
            what differs from the configuration so far as ``changes``. A missing file is started.
        tensorboard: write ``tensorboard/`` too. What an earlier part of the run wrote there beyond
            ``resume_step`` is marked as void, and TensorBoard does not show it.

    Raises:
        InputError: the folder or a file in it cannot be written, in one line.
        ImportError: ``tensorboard`` is asked for and not installed.
    """

    def __init__(
        self,
        folder: Path | str | None,
        config: dict[str, Any],
        *,
        resume_step: int | None = None,
        tensorboard: bool = False,
    ) -> None:
        self._file: io.FileIO | None = None
        self._summary: SummaryWriter | None = None
        if folder is None:
            return
        self.folder = Path(folder)
        self.path = self.folder / _METRICS
        # First, as it alone can fail without a file written.
        writer = _summary_writer() if tensorboard else None
        make_folder(self.folder)
        header = _clean({"event": "config", **config})
        lines = [] if resume_step is None else self._lines_up_to(resume_step)
        known = _last_config(lines)
        if known is None:
            lines = [_line(header), *lines]
        if resume_step is not None:
            note: dict[str, Any] = {"event": "resume", "step": resume_step}
            changes = _changes(known, header) if known is not None else {}
            lines.append(_line({**note, "changes": changes} if changes else note))
        write_atomically(self.path, lambda file: file.writelines(lines))
        try:
            # Appending: a second run in this folder would spoil no line.
            self._file = io.FileIO(self.path, "ab")
            if writer is not None:
                self._summary = writer(str(self.folder / "tensorboard"), purge_step=resume_step)
        except OSError as error:
            self.close()
            raise InputError(f"cannot write to {self.folder}: {reason_of(error)}") from error

    def write(self, record: dict[str, Any]) -> None:
        """Add a line; it is in the file, whole, when this returns.

        Numbers that are not finite become null. What is not JSON (a path, a dtype) is written as a
        string, a tensor of one element as its number.

        Args:
            record: with ``event``. Of events ``step`` (``step`` from 0) and ``epoch`` (``step``:
                steps done) the numbers are scalars for TensorBoard too, at the index of the last
                step done: a step's under ``step/``, an epoch's ``train_*`` and ``test_*`` under
                ``train/`` and ``test/``.

        Raises:
            InputError: the system refuses, such as on a full disk; no part of the line is left.
        """
        if self._file is not None:
            self._append(_line(_clean(record)))
        if self._summary is not None:
            try:
                self._add_scalars(record)
            except OSError as error:
                where = self.folder / "tensorboard"
                raise InputError(f"cannot write {where}: {reason_of(error)}") from error

    def sync(self) -> None:
        """Have everything written so far on the disk, as before a checkpoint that relies on it.

        Raises:
            InputError: the system refuses.
        """
        try:
            if self._file is not None:
                os.fsync(self._file.fileno())
            if self._summary is not None:
                self._summary.flush()
        except OSError as error:
            raise InputError(f"cannot write to {self.folder}: {reason_of(error)}") from error

    def close(self) -> None:
        """Close the files. What TensorBoard cannot write any more is lost without an error."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        if self._summary is not None:
            with contextlib.suppress(OSError):
                self._summary.close()
        self._file = self._summary = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        assert self._file is not None
        start = None
        try:
            start = os.fstat(self._file.fileno()).st_size
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            # Half a line would make one broken line of this and the next.
            if start is not None:
                with contextlib.suppress(OSError):
                    self._file.truncate(start)
            raise InputError(
                f"cannot write {self.path}: {reason_of(error)}; checkpoints are untouched: "
                "mend that and go on with --resume auto"
            ) from error

    def _lines_up_to(self, resume_step: int) -> list[bytes]:
        """The old file's lines that belong to a run of ``resume_step`` steps so far."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise InputError(f"cannot read {self.path}: {reason_of(error)}") from error
        kept = []
        for index, line in enumerate(lines):
            record = _parsed(line)
            if record is None and index == len(lines) - 1:
                continue
            if not _is_beyond(record, resume_step):
                kept.append(line if line.endswith(b"\n") else line + b"\n")
        return kept

    def _add_scalars(self, record: dict[str, Any]) -> None:
        assert self._summary is not None
        event, step = record.get("event"), record.get("step")
        if event not in ("step", "epoch") or step is None:
            return
        for key, value in record.items():
            if key in ("event", "step", "epoch") or not _is_number(value):
                continue
            if event == "step":
                tag = f"step/{key}"
            else:
                part, _, rest = key.partition("_")
                tag = f"{part}/{rest}" if part in ("train", "test") and rest else key
            # An epoch after n steps stands at its last one, n - 1: purge_step=n leaves it.
            self._summary.add_scalar(tag, value, step if event == "step" else step - 1)


def write_config(folder: Path | str, config: dict[str, Any]) -> None:
    """Write what a run was started with to config.yaml, for people and for ``read_config``.

    Tuples become lists; paths and other objects become strings.

    Raises:
        InputError: it cannot be written.
    """
    make_folder(Path(folder))
    text = yaml.safe_dump(_clean(config, finite=False), sort_keys=False, allow_unicode=True)
    content = ("# What this run was started with.\n" + text).encode()
    write_atomically(Path(folder) / _CONFIG, lambda file: file.write(content))


def read_config(folder: Path | str) -> dict[str, Any]:
    """Read a run's config.yaml.

    Raises:
        InputError: there is none, or it is not a YAML mapping; in one line.
    """
    path = Path(folder) / _CONFIG
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is no file, and a run has a file there: remove it")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{folder} is not the folder of a run: it has no {_CONFIG}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {reason_of(error)}") from error
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1}, column {mark.column + 1})"
        raise InputError(f"{path} is not YAML{where}") from error
    if not isinstance(config, dict):
        found = "nothing" if config is None else f"a {type(config).__name__}"
        raise InputError(f"{path} must be a mapping of options to values, it holds {found}")
    for key in config:
        if not isinstance(key, str):
            raise InputError(f"{path}: every option must be a name, got {key!r}")
    return config


def threads_of(folder: Path | str | None) -> int | None:
    """The CPU threads that the run in ``folder`` computes with; None where nothing tells."""
    if folder is None or not os.path.isfile(Path(folder) / _CONFIG):
        return None
    threads = read_config(folder).get("threads")
    return threads if isinstance(threads, int) and threads > 0 else None


def holds_a_run(folder: Path | str) -> str | None:
    """The files of a run in ``folder``, such as "metrics.jsonl, 3 checkpoints"; None if none.

    Raises:
        InputError: ``folder`` is a file, or may not be looked into.
    """
    folder = Path(folder)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        kind = "file" if os.path.exists(folder) else "broken link"
        raise InputError(f"{folder} is a {kind}, expected a folder")
    found = [name for name in (_CONFIG, _METRICS) if os.path.exists(folder / name)]
    checkpoints = Checkpoints(folder / "checkpoints")
    count = len(checkpoints.files())
    if count:
        found.append(f"{count} checkpoint{'s' if count > 1 else ''}")
    if os.path.exists(checkpoints.best):
        found.append(checkpoints.best.name)
    return ", ".join(found) or None


def check_folder(folder: Path | str) -> None:
    """Find out what a run's files would run into in ``folder``, before anything is made there.

    Raises:
        InputError: a folder where a file goes or the other way round, or no permission to write.
    """
    folder = Path(folder)
    checkpoints = Checkpoints(folder / "checkpoints")
    files = [folder / name for name in (_CONFIG, _METRICS, "curves.png")]
    for path in [*files, *checkpoints.files(), checkpoints.best]:
        if os.path.lexists(path) and not os.path.isfile(path):
            raise InputError(f"{path} is no file, and a run has a file there: remove it")
    for path in (checkpoints.folder, folder / "tensorboard"):
        if os.path.lexists(path) and not os.path.isdir(path):
            raise InputError(f"{path} is no folder, and a run has a folder there: remove it")
    for path in (checkpoints.folder, folder, *folder.absolute().parents):
        if os.path.exists(path):
            if not os.path.isdir(path):
                raise InputError(f"cannot make the folder {folder}: {path} is a file")
            if not os.access(path, os.W_OK | os.X_OK):
                raise InputError(
                    f"cannot write to {path}: make it writable, or take another folder by --out"
                )
            if path != checkpoints.folder:
                break


def _summary_writer() -> "type[SummaryWriter]":
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "TensorBoard's events need the package tensorboard: python -m pip install tensorboard"
        ) from error
    return SummaryWriter


def _line(record: dict[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False).encode() + b"\n"


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_beyond(record: Any, resume_step: int) -> bool:
    if not isinstance(record, dict) or record.get("event") not in _DONE_AT:
        return False
    step = record.get("step")
    return isinstance(step, int) and step + _DONE_AT[record["event"]] > resume_step


def _last_config(lines: list[bytes]) -> dict[str, Any] | None:
    """The configuration after ``lines``: the header's, with the changes of every resumption."""
    config: dict[str, Any] | None = None
    for record in map(_parsed, lines):
        if not isinstance(record, dict):
            continue
        if record.get("event") == "config":
            config = dict(record)
        elif record.get("event") == "resume" and config is not None:
            changes = record.get("changes")
            config.update(changes if isinstance(changes, dict) else {})
    return config


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    keys = dict.fromkeys((*now, *before))
    return {key: now.get(key) for key in keys if before.get(key) != now.get(key)}


def _clean(value: Any, finite: bool = True) -> Any:
    """``value`` of JSON's types; with ``finite``, NaN and the infinities are None."""
    if isinstance(value, dict):
        return {str(key): _clean(item, finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item, finite) for item in value]
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) or not finite else None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return _clean(value.item(), finite)
    return str(value)


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int | float) or getattr(value, "ndim", None) == 0
