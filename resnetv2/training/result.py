"""The result of a run: its model and its epochs, as a table and as curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from ..core.table import Cells, html_lines, html_table, text_table
from ..errors import InputError
from .metrics import EpochMetrics

if TYPE_CHECKING:
    from .plots import Picture

# A longer table is folded in a notebook.
_LONG = 12


@dataclass
class TrainingResult:
    """The result of ``train``; prints and shows itself as a table of epochs.

    ``step_losses`` holds the loss of every training step of this call, ``config`` the options and
    facts of the run, as in the first line of metrics.jsonl. ``averaged`` is the moving average of
    the weights that was tested, None without one.
    """

    model: nn.Module
    config: dict[str, Any]
    history: list[EpochMetrics] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    averaged: nn.Module | None = None

    @property
    def test_accuracy(self) -> float:
        """Test accuracy after the last epoch, 0..1."""
        return self.history[-1].test_accuracy

    @property
    def title(self) -> str:
        """The net, its data and how it was trained, in one line."""
        facts = self.config
        return (
            f"{facts['model']} on {facts['data']}, {facts['backend']} backend, {facts['dtype']}, "
            f"seed {facts['seed']}"
        )

    def plot(self) -> Picture:
        """Loss and error against epochs; a notebook shows the figure as a cell's last line.

        Raises:
            InputError: no epoch is finished.
        """
        from .plots import draw_curves  # matplotlib takes its time

        if not self.history:
            raise InputError("there is nothing to plot: no epoch of this run is finished")
        return draw_curves(self.history, self.title)

    def __str__(self) -> str:
        return f"{self.title}\n{text_table(*self._table())}"

    def _repr_html_(self) -> str:
        table = html_table(*self._table())
        if len(self.history) > _LONG:
            last = f"{100 * self.test_accuracy:.2f} % test accuracy"
            summary = html_lines([f"{len(self.history)} epochs, {last}"], "summary")
            table = f"<details>\n{summary}\n{table}\n</details>"
        return f"{html_lines([self.title])}\n{table}"

    def _table(self) -> Cells:
        names = ("epoch", "lr", "training loss", "accuracy", "test loss", "accuracy", "seconds")
        rows = [
            (
                str(entry.epoch),
                f"{entry.lr:.4g}",
                f"{entry.train_loss:.4f}",
                f"{100 * entry.train_accuracy:.2f} %",
                f"{entry.test_loss:.4f}",
                f"{100 * entry.test_accuracy:.2f} %",
                f"{entry.seconds:.1f}",
            )
            for entry in self.history
        ]
        return names, rows, [True] * len(names)
