"""All results as one HTML page that needs nothing else: pictures and style are inside."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..errors import InputError
from .results import Result, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130
# A picture broader than this in inches is scrolled on a phone rather than shrunk to illegibility.
WIDE = 7.0
# A table of more rows is folded.
LONGEST_TABLE = 20

# A cell of text that stands for a number: with its spread, a count in brackets, or none at all.
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?( ± \S+)?( %)?( \(.*\))?|not reached|not finite|-")


def render(results: Sequence[Result]) -> str:
    """The page: contents, then each study with question, conclusions, figures, tables, settings.

    Raises:
        ValueError: no result.
    """
    if not results:
        raise ValueError("a page needs at least one result")
    source = resources.files("resnetv2.studies").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    seconds = sum(result.seconds for result in results)
    return environment.from_string(source).render(
        results=results,
        figures={result.name: list(map(_picture, result.figures.items())) for result in results},
        device=results[0].settings["device"],
        threads=results[0].settings["threads"],
        versions=results[0].settings["versions"],
        minutes=f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds",
        longest=LONGEST_TABLE,
        text_class=_text_class,
        setting=_setting,
    )


def write_page(results: Sequence[Result], path: str | Path) -> Path:
    """Write the page to `path`.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(results), encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error}") from error
    return path


def _picture(named: tuple[str, Figure]) -> dict[str, Any]:
    name, figure = named
    file = io.BytesIO()
    figure.savefig(file, dpi=DPI, format="png")
    width, height = figure.get_size_inches()
    # The demo's titles say all.
    caption = getattr(figure, "caption", "") or name.replace("-", " ").capitalize()
    return {
        "data": base64.b64encode(file.getvalue()).decode("ascii"),
        # CSS pixels are 96 to an inch: the picture at its own size, sharp on a dense screen.
        "width": round(96 * width),
        "height": round(96 * height),
        "wide": width > WIDE,
        "caption": caption,
        "alt": " ".join([caption, *_words_in(figure)]),
    }


def _words_in(figure: Figure) -> list[str]:
    """Its titles and legend, for who cannot see it."""
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    shown = [f"{title}." for title in dict.fromkeys(titles) if title]
    return [*shown, f"Shown: {', '.join(labels)}."] if labels else shown


def _text_class(table: Table, index: int) -> Markup:
    """The attribute of a cell in a column of words, which is set from the left."""
    cells = [row[index] for row in table.rows]
    words = any(isinstance(cell, bool) for cell in cells) or any(
        isinstance(cell, str) and not _NUMBER.fullmatch(cell) for cell in cells
    )
    return Markup(' class="text"') if words else Markup("")


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    if value is None:
        return "all or default"
    return str(value)
