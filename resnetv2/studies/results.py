"""The result of a study: tables, conclusions and figures, as text, as JSON and as PNGs."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.table import html_lines, html_table, text_table
from ..errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; a cell is text, a number or None ("not measured")."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.title}: {len(self.columns)} columns, a row of {len(row)}")

    def column(self, name: str) -> list[Any]:
        """The cells under `name`."""
        index = list(self.columns).index(name)
        return [row[index] for row in self.rows]

    def cells(self) -> list[list[str]]:
        """The rows as they are shown."""
        return [[show(cell) for cell in row] for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns hold no words."""
        columns = range(len(self.columns))
        return [not any(isinstance(row[i], str) for row in self.rows) for i in columns]

    def __str__(self) -> str:
        return f"{self.title}\n{text_table(self.columns, self.cells(), self.numeric())}"

    def _repr_html_(self) -> str:
        table = html_table(self.columns, self.cells(), self.numeric())
        return f"{html_lines([self.title], 'h4')}\n{table}"


def show(value: Any) -> str:
    """A cell as text: four significant digits, thousands separated, "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        if value == 0 or 1e-3 <= abs(value) < 1e5:
            digits = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
            return f"{value:,.{min(digits, 4)}f}"
        return f"{value:.2e}"
    return str(value)


@dataclass
class Result:
    """The result of one run of a study.

    Args:
        tables: what is printed and shown.
        conclusions: sentences made from this run's numbers.
        figures: matplotlib Figures by name (file name and heading; words joined by "-").
        series: further numbers, as JSON, for plots of one's own: curves, histograms, ...
        notes: what a reader must know to read the numbers (conditions, limits).

    `Study` fills the rest: name, title, question, settings (the options that the study uses, with
    device and versions), seconds, and the command that gives the same.
    """

    tables: list[Table]
    conclusions: list[str]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str = ""
    title: str = ""
    question: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    command: str = ""

    def table(self, title: str) -> Table:
        """The table whose title begins with `title`."""
        return next(table for table in self.tables if table.title.startswith(title))

    def record(self) -> dict[str, Any]:
        """Everything but the figures as JSON-able values; numbers that are not finite are null."""
        return _plain(
            {
                "name": self.name,
                "title": self.title,
                "question": self.question,
                "command": self.command,
                "settings": self.settings,
                "seconds": self.seconds,
                "tables": [
                    {"title": table.title, "columns": table.columns, "rows": table.rows}
                    for table in self.tables
                ],
                "conclusions": self.conclusions,
                "notes": self.notes,
                "series": self.series,
            }
        )

    def save(self, out: str | Path) -> list[Path]:
        """Write results.json and a PNG for each figure into the folder `out`; returns the paths.

        Raises:
            InputError: the folder cannot be made or written to.
        """
        folder = Path(out)
        paths = []
        try:
            folder.mkdir(parents=True, exist_ok=True)
            paths.append(folder / "results.json")
            text = json.dumps(self.record(), indent=1, allow_nan=False)
            paths[0].write_text(text + "\n", encoding="utf-8")
            for name, figure in self.figures.items():
                paths.append(folder / f"{name}.png")
                figure.savefig(paths[-1], dpi=150, format="png")
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error}") from error
        return paths

    def __str__(self) -> str:
        parts = [f"{self.title}\n{self.question}", *map(str, self.tables)]
        if self.conclusions:
            parts.append("\n".join(f"* {sentence}" for sentence in self.conclusions))
        if self.notes:
            parts.append("\n".join(f"Note: {note}" for note in self.notes))
        return "\n\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [html_lines([self.title], "h3"), html_lines([self.question])]
        if self.conclusions:
            parts.append(f"<ul>\n{html_lines(self.conclusions, 'li')}\n</ul>")
        parts += [_image(name, figure) for name, figure in self.figures.items()]
        parts += [table._repr_html_() for table in self.tables]
        parts.append(html_lines(self.notes))
        return "\n".join(parts)


def _image(name: str, figure: Figure) -> str:
    """The figure inside the page, at its own size."""
    file = io.BytesIO()
    figure.savefig(file, dpi=150, format="png")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    # CSS pixels are 96 to an inch: sharp on a dense screen.
    width = round(96 * figure.get_size_inches()[0])
    words = escape(name.replace("-", " "))
    return f'<img alt="{words}" width="{width}" src="data:image/png;base64,{data}">'


def _plain(value: Any) -> Any:
    """Nested dictionaries and lists of what JSON knows."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    raise TypeError(f"a result holds text and numbers, got {type(value).__name__}")
