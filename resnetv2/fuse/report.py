"""What ``explain`` finds, for people to read."""

from __future__ import annotations

from typing import NamedTuple

from ..core.table import Cells, html_lines, html_table, text_table


class BlockReport(NamedTuple):
    """One row of a ``Report``: a module that is a pre-activation block or resembles one.

    path: dotted, from the model. class_name: of the original class. fused: whether it runs fused
    now. kind: as what, such as "basic, projection from preact"; empty where it is none. reason:
    why it does not run fused, or empty. by: what computes each convolution of one that is fused
    (kernels/README.md, "Which implementation runs"), a star behind what was measured.
    """

    path: str
    class_name: str
    fused: bool
    kind: str
    reason: str
    by: str = ""


class Report(NamedTuple):
    """What ``explain`` found; prints and shows itself as a table, like rows in one line.

    blocks: all rows, in the model's order. chains: paths of the Sequentials whose blocks run as
    one chain. memory: of memory "auto", the modes chosen and their predicted peaks; else empty.
    measured: which file of ``resnetv2 doctor --tune`` is used, or why it is not; or empty.
    """

    blocks: tuple[BlockReport, ...]
    chains: tuple[str, ...] = ()
    memory: str = ""
    measured: str = ""

    @property
    def fused(self) -> tuple[BlockReport, ...]:
        """The rows of the blocks that run fused."""
        return tuple(row for row in self.blocks if row.fused)

    def __str__(self) -> str:
        if not self.blocks:
            return _NO_BLOCK
        return "\n".join([text_table(*self._table()), *self._notes()])

    def _repr_html_(self) -> str:
        if not self.blocks:
            return html_lines([_NO_BLOCK])
        return f"{html_table(*self._table())}\n{html_lines(self._notes())}"

    def _table(self) -> Cells:
        lines = []
        start = 0
        for stop in range(1, len(self.blocks) + 1):
            row = self.blocks[start]
            if stop < len(self.blocks) and self.blocks[stop][1:] == row[1:]:
                continue
            last = self.blocks[stop - 1].path
            number = stop - start
            path = row.path or "(the model)"
            path = path if number == 1 else f"{path} ... {last} ({number})"
            fused = "yes" if row.fused else "no"
            lines.append((path, row.class_name, fused, row.kind, row.by, row.reason))
            start = stop
        names = ("path", "class", "fused", "as", "by", "reason")
        return names, lines, [False] * len(names)

    def _notes(self) -> list[str]:
        notes = [f"{len(self.fused)} of {len(self.blocks)} fused"]
        if self.chains:
            paths = ", ".join(path or "(the model)" for path in self.chains)
            notes.append(f"run as chains: {paths}")
        if self.measured:
            notes.append(self.measured)
        return notes + self.memory.splitlines()


_NO_BLOCK = "no pre-activation block, and nothing that resembles one"
