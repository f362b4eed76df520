"""The measurements of a run."""

from collections.abc import Callable
from dataclasses import dataclass


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


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step. step: from 0. loss: as it was trained, the mean over all processes, in
    nats. lr: learning rate. memory: bytes in use after it, None unless ``log_steps``."""

    step: int
    loss: float
    lr: float
    memory: int | None = None


Callback = Callable[[StepMetrics | EpochMetrics], object]
