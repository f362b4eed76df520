"""Train a pre-activation ResNet: the public names of ``training``."""

from .data.datasets import create_synthetic_dataset
from .errors import InputError
from .names import DTYPES
from .training.config import TrainConfig
from .training.loop import DivergenceError, Interrupted
from .training.metrics import EpochMetrics
from .training.result import TrainingResult
from .training.run import train, train_resnet_v2
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
