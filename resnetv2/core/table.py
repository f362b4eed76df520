"""Tables as text, aligned columns under a rule of dashes, and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# What the functions below take: names, lines and sides of the columns.
Cells = tuple[Sequence[str], Sequence[Sequence[str]], Sequence[bool]]


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """A heading, a rule, and a line a row, without spaces at the ends of lines.

    Args:
        header: of each column.
        rows: as many cells each.
        right: whether a column's cells stand at its right edge, as numbers do.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows)]

    def line(cells: Sequence[str]) -> str:
        aligned = (
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(cells, widths, right, strict=True)
        )
        return "  ".join(aligned).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(header), rule, *map(line, rows)])


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """The same table in HTML, with its text escaped; arguments as for ``text_table``."""

    def line(tag: str, cells: Sequence[str]) -> str:
        sides = ("right" if at_right else "left" for at_right in right)
        inside = (
            f'<{tag} style="text-align: {side}">{escape(cell)}</{tag}>'
            for cell, side in zip(cells, sides, strict=True)
        )
        return f"<tr>{''.join(inside)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return f"<table>\n<thead>{line('th', header)}</thead>\n<tbody>\n{body}\n</tbody>\n</table>"


def html_lines(lines: Iterable[str], tag: str = "p") -> str:
    """Each line as an element of its own, escaped."""
    return "\n".join(f"<{tag}>{escape(line)}</{tag}>" for line in lines)


def counted(count: int, noun: str) -> str:
    """A number of things in words: "1 step", "1,000 steps"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
