"""Train a pre-activation ResNet: the public names of ``training``."""

from .data.datasets import create_synthetic_dataset
from .errors import InputError
from .training.config import TrainConfig
from .training.evaluate import DTYPES
from .training.loop import (
    DivergenceError,
    EpochMetrics,
    Interrupted,
    TrainingResult,
    train,
    train_resnet_v2,
)
from .training.schedule import learning_rate

__all__ = [
    "DTYPES",
    "DivergenceError",
    "EpochMetrics",
    "InputError",
    "Interrupted",
    "TrainConfig",
    "TrainingResult",
    "create_synthetic_dataset",
    "learning_rate",
    "train",
    "train_resnet_v2",
]
