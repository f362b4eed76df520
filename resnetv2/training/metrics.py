"""The measurements of a run, and its result."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class EpochMetrics:
    """One epoch. Losses are means over images in nats, accuracies in 0..1.

    The training figures are those of the augmented batches while the weights still moved, the loss
    with label smoothing; the test figures are those of the moving average, where there is one.
    ``seconds`` and ``images_per_second`` are of the training part alone.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    seconds: float
    images_per_second: float


@dataclass
class TrainingResult:
    """The result of ``train``.

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
