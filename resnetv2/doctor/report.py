"""What doctor found: a table, a verdict in a sentence, and the same as JSON.

The JSON is an object with

- ``schema``: 1, the version of this description, counted up where a reader would have to change;
- ``quick``, ``seconds``, ``time`` (ISO 8601, UTC): which checks were asked for, how long they took;
- ``environment``: ``versions``, ``system``, ``device``, ``threads``, ``backend``, ``variables``,
  ``missing`` (objects of ``what``, ``why``, ``command``), ``choices`` (what ``doctor --tune``
  measured: ``file``, the ``number`` and ``digest`` of those that are used, a ``note`` where none
  is), and of a GPU ``capability``, ``memory_bytes``, ``cuda`` and ``driver``;
- ``checks``: objects of ``part``, ``name``, ``state`` ("right", "wrong" or "not checked"),
  ``detail`` (why, in a sentence; may be empty) and ``figures`` (numbers by name);
- ``right`` (whether no check is "wrong") and ``verdict``.

Parts and their figures: ``kernel`` (``of_allowed``: the error over the one that the yardstick
allows), ``unit`` (the same for whole units of odd shapes), ``bits``, and ``speed`` (``seconds`` of
a step, ``to_eager`` its ratio to un-graphed eager's, ``peak_bytes`` beyond parameters and
gradients, ``peak_to_eager``, ``host_seconds`` on a GPU).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..core.memory import format_bytes
from ..core.table import text_table
from ..errors import InputError

SCHEMA = 1
RIGHT, WRONG, NOT_CHECKED = "right", "wrong", "not checked"
STATES = (RIGHT, WRONG, NOT_CHECKED)
PARTS = {
    "kernel": "kernels against float64",
    "unit": "units of odd shapes against float64",
    "bits": "the same bits twice",
    "speed": "against eager PyTorch",
}


@dataclass(frozen=True)
class Check:
    """One check: a row of the report. part: one of ``PARTS``; state: one of ``STATES``."""

    part: str
    name: str
    state: str
    detail: str = ""
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Diagnosis:
    """All that ``doctor`` found; prints as tables and a verdict.

    right: whether nothing is wrong: what could not be checked is not.
    """

    environment: dict[str, Any]
    checks: tuple[Check, ...]
    verdict: str
    quick: bool
    seconds: float
    time: str

    @property
    def right(self) -> bool:
        return all(check.state != WRONG for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """The JSON's object; see the module."""
        return {"schema": SCHEMA, "right": self.right, **asdict(self)}

    def write(self, path: str | Path) -> None:
        """Write the JSON.

        Raises:
            InputError: the file cannot be written.
        """
        text = json.dumps(self.as_dict(), indent=1, allow_nan=False) + "\n"
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from error

    def __str__(self) -> str:
        lines = _environment(self.environment)
        for part, title in PARTS.items():
            checks = [check for check in self.checks if check.part == part]
            if checks:
                lines += ["", _heading(title, checks), *_rows(part, checks)]
        return "\n".join([*lines, "", self.verdict])


def _environment(facts: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    device = facts["device"]
    if "capability" in facts:
        major, minor = facts["capability"]
        driver = f", driver {facts['driver']}" if facts["driver"] else ""
        memory = format_bytes(facts["memory_bytes"])
        device += f" (sm_{major}{minor}, {memory}, CUDA {facts['cuda']}{driver})"
    lines = [versions, f"{device}, {facts['threads']} threads, backend {facts['backend']}"]
    lines += [f"{name}={value}" for name, value in facts["variables"].items()]
    measured = facts["choices"]
    if measured["number"]:
        lines.append(
            f"measured choices: {measured['number']} of {measured['file']}, "
            f"digest {measured['digest']}"
        )
    elif measured["note"]:
        lines.append(f"measured choices: none: {measured['note']}")
    lines += [
        f"missing: {each['what']} ({each['why']}): {each['command']}" for each in facts["missing"]
    ]
    return lines


def _heading(title: str, checks: list[Check]) -> str:
    counts = [(state, sum(check.state == state for check in checks)) for state in STATES]
    return f"{title}: " + ", ".join(f"{number} {state}" for state, number in counts if number)


def _rows(part: str, checks: list[Check]) -> list[str]:
    """The table of a part: all of its speeds; elsewhere what is not right."""
    if part == "speed":
        header = ("step", "time", "of eager", "peak", "of eager", "host", "")
        rows = [
            (
                check.name,
                _milliseconds(check.figures.get("seconds")),
                _ratio(check.figures.get("to_eager")),
                _bytes(check.figures.get("peak_bytes")),
                _ratio(check.figures.get("peak_to_eager")),
                _milliseconds(check.figures.get("host_seconds")),
                check.detail if check.state == RIGHT else f"{check.state}: {check.detail}",
            )
            for check in checks
        ]
        return text_table(header, rows, [False, *5 * [True], False]).splitlines()
    lines = [
        f"  {check.name}: {check.state}: {check.detail}" for check in checks if check.state != RIGHT
    ]
    lines += [f"  {c.name}: {c.detail}" for c in checks if c.state == RIGHT and c.detail]
    largest = [check.figures["of_allowed"] for check in checks if "of_allowed" in check.figures]
    if largest:
        lines.append(f"  largest error: {max(largest):.2g} of what is allowed")
    return lines


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g} ms"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def _bytes(value: float | None) -> str:
    return "" if value is None else format_bytes(int(value))
