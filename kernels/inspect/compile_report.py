"""The compile matrix as a page and a CSV, for a folder of bench/reports."""

from __future__ import annotations

import csv
import json
import platform
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import triton

from . import dryrun
from .cases import DTYPES, UNITS
from .compile_row import Row

# Triton's key of a kernel is of this machine.
COLUMNS = (*(f.name for f in fields(Row) if f.name != "key"), "versions")
Entry = dict[str, str]

_ABOUT = """Compiled without a GPU for the launches of the units in kernels/inspect/cases.py, by
`python -m resnetv2.kernels.inspect.compile --report bench/reports/compile` ({}), with `--all` for
every unit, target and dtype instead of a selection. Every
distinct kernel is a row of kernels.csv. Registers and spilled bytes are a thread's, shared memory
is a program's in bytes, seconds are of processor time for one kernel. Each column gives the largest
value; spills are the number of kernels that spill, with the most bytes in brackets."""


def versions() -> str:
    """What compiled: the compilers that triton carries are told by its version."""
    return f"triton {triton.__version__}, torch {torch.__version__}, {platform.machine()}"


def _entry(row: Row) -> Entry:
    values = {**asdict(row), "versions": versions()}
    values["spilled"] = max(row.spilled, row.local)
    values["constants"] = json.dumps(row.constants, separators=(",", ":"))
    values["grid"] = json.dumps(list(row.grid))
    return {name: "" if values[name] is None else str(values[name]) for name in COLUMNS}


def read(folder: Path) -> tuple[list[Row], set[str]]:
    """The rows of a folder's kernels.csv, and the versions that compiled them."""
    with (folder / "kernels.csv").open(newline="") as lines:
        entries = list(csv.DictReader(lines))
    convert: dict[str, Callable[[str], Any]] = {
        "str": str, "int": int, "int | None": int, "float | None": float,
        "dict[str, Any]": json.loads, "Sequence[int]": json.loads,
    }  # fmt: skip
    rows = []
    for entry in entries:
        values: dict[str, Any] = {"key": ""}
        for column in fields(Row):
            kind, text = str(column.type), entry.get(column.name, "")
            if column.name != "key":
                missing = not text and kind.endswith("None")
                values[column.name] = None if missing else convert[kind](text)
        rows.append(Row(**values))
    return rows, {entry["versions"] for entry in entries}


def write(folder: Path, rows: Sequence[Row]) -> None:
    """Write kernels.csv and README.md into ``folder``.

    Rows of targets and dtypes that are not among ``rows`` are kept: a matrix takes hours, and may
    be compiled in parts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "kernels.csv"
    entries = [_entry(row) for row in rows]
    new = {(e["target"], e["dtype"]) for e in entries}
    if file.exists():
        with file.open(newline="") as lines:
            entries += [e for e in csv.DictReader(lines) if (e["target"], e["dtype"]) not in new]
    targets, dtypes, names = list(dryrun.DEVICES), list(DTYPES), [unit.name for unit in UNITS]

    def position(entry: Entry) -> tuple[int, int, int]:
        return (
            targets.index(entry["target"]),
            dtypes.index(entry["dtype"]),
            names.index(_unit(entry)),
        )

    entries.sort(key=position)
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(entries)
    (folder / "README.md").write_text(page(entries))


def _unit(entry: Entry) -> str:
    return entry["case"].split(":")[0]


def _largest(entries: Iterable[Entry], column: str) -> float:
    return max((float(e[column]) for e in entries if e[column]), default=0.0)


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    rows = [head, ["---", *["--:"] * (len(head) - 1)], *lines]
    return "\n".join("| " + " | ".join(str(v) for v in row) + " |" for row in rows)


def _groups(
    entries: Sequence[Entry], key: Callable[[Entry], str]
) -> Iterable[tuple[str, list[Entry]]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(key(entry), []).append(entry)
    return found.items()


def _worst(entries: Sequence[Entry]) -> list[str]:
    spills = [e for e in entries if float(e["spilled"])]
    return [
        str(len(entries)),
        f"{_largest(entries, 'registers'):.0f}",
        f"{len(spills)} ({_largest(spills, 'spilled'):.0f})" if spills else "0",
        f"{_largest(entries, 'shared'):,.0f}",
        f"{_largest(entries, 'seconds'):.1f}",
    ]


def page(entries: Sequence[Entry]) -> str:
    """The page: each target's worst kernels, its slowest to compile, and its units."""
    by_target = list(_groups(entries, lambda e: e["target"]))
    slowest = [
        (target, max(found, key=lambda e: float(e["seconds"] or 0))) for target, found in by_target
    ]
    head = ("kernels", "registers", "spills", "shared", "seconds")
    parts = [
        "# What compilers make of the kernels",
        textwrap.fill(_ABOUT.format("; ".join(sorted({e["versions"] for e in entries}))), 100),
        "## Targets",
        _table(
            ("target", "dtypes", *head, "shared memory of the device"),
            [
                (
                    target,
                    ", ".join(dict.fromkeys(e["dtype"] for e in found)),
                    *_worst(found),
                    f"{dryrun.DEVICES[target].shared_memory:,}",
                )
                for target, found in by_target
            ],
        ),
        "## Slowest to compile",
        _table(
            ("target", "seconds", "dtype", "kernel", "case"),
            [(t, e["seconds"], e["dtype"], f"`{e['kernel']}`", e["case"]) for t, e in slowest],
        ),
        "## Units",
        _table(
            ("unit", "target", *head),
            [
                (unit, target, *_worst(found))
                for unit, of_unit in _groups(entries, _unit)
                for target, found in _groups(of_unit, lambda e: e["target"])
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"
