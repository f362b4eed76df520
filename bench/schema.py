"""The one form in which results are kept: a row per figure, in CSV."""

from __future__ import annotations

import csv
import multiprocessing
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from resnetv2.measuring.cases import STEP

SUITES = ("unit", "depth", "models", "limits", "kernel", "accuracy", "host", "extreme depth")
REPORTS = Path(__file__).parent / "reports"
CSV_NAME = "report.csv"
MODE = STEP


@dataclass(frozen=True)
class Row:
    """One figure of one provider for one case.

    value: in ``unit``; p20, p50, p80 where it was measured repeatedly. ratio_to_eager and
    ratio_to_compile: medians over rounds of the ratio within a round. spread: distance of that
    ratio's p20 and p80 over its median (of the figure itself, where there is no ratio). note: why
    there is no value, or what to know about it.
    """

    suite: str
    case: str
    provider: str
    mode: str
    metric: str
    unit: str
    value: float | None
    p20: float | None = None
    p50: float | None = None
    p80: float | None = None
    ratio_to_eager: float | None = None
    ratio_to_compile: float | None = None
    spread: float | None = None
    trials: int = 0
    note: str = ""
    device: str = ""
    versions: str = ""
    dtype: str = ""
    layout: str = ""
    command: str = ""


class Rows:
    """Rows of a report, to be looked up."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)

    def where(self, **columns: str) -> list[Row]:
        """Rows whose columns have these values, in order."""
        return [r for r in self.rows if all(getattr(r, k) == v for k, v in columns.items())]

    def one(self, **columns: str) -> Row | None:
        """The first such row, or None where there is none."""
        return next(iter(self.where(**columns)), None)

    def value(self, **columns: str) -> float | None:
        """Its value, or None where there is no such row or it has no value."""
        row = self.one(**columns)
        return None if row is None else row.value

    def names(self, column: str, **columns: str) -> list[str]:
        """Distinct values of a column, in order."""
        return list(dict.fromkeys(getattr(r, column) for r in self.where(**columns)))


_TYPES = {f.name: f.type for f in fields(Row)}
_DIGITS = 5  # significant, of what is written


def _write_value(value: object) -> object:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    return "" if value is None else value


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as CSV, floats to five significant digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(_TYPES), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _write_value(value) for name, value in asdict(row).items()})


def read(path: Path) -> list[Row]:
    """The rows of a CSV that ``write`` wrote.

    Raises:
        ValueError: other columns.
    """
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != list(_TYPES):
            raise ValueError(f"expected the columns {', '.join(_TYPES)} in {path}")
        return [Row(**{name: _parse(name, text) for name, text in r.items()}) for r in reader]


def _parse(name: str, text: str) -> object:
    if _TYPES[name] == "str":
        return text
    if _TYPES[name] == "int":
        return int(text)
    return float(text) if text else None


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """``new`` in place of the suites that it holds; suites in the order of ``SUITES``."""
    renewed = {row.suite for row in new}
    rows = [row for row in old if row.suite not in renewed] + list(new)
    return sorted(rows, key=lambda row: SUITES.index(row.suite))


def renew(folder: Path, rows: Iterable[Row], threads: int, command: str) -> None:
    """Put a run's rows into the CSV of ``folder``, in place of those of the same suites.

    What a row says of the run itself stays.
    """
    run = {
        "device": device_name(),
        "versions": versions(threads),
        "layout": "channels_last",
        "command": command,
    }
    path = folder / CSV_NAME
    old = read(path) if path.exists() else []
    renewed = [
        replace(row, **{name: getattr(row, name) or value for name, value in run.items()})
        for row in rows
    ]
    write(path, merge(old, renewed))


def device_name() -> str:
    """A folder's name for this machine's GPU, or for its processor."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"cpu-{platform.machine()}-{multiprocessing.cpu_count()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions(threads: int) -> str:
    """Versions of what was measured, and on a CPU the number of threads."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in ("triton", "resnetv2"):
        try:
            parts.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        parts.append(f"CUDA {torch.version.cuda}")
    else:
        parts.append(f"{threads} threads")
    return ", ".join(parts)
