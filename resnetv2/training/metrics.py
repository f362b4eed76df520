"""The measurements of a run."""

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
