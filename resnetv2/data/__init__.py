"""Image data sets: decoded once into memory or streamed, and batches of either."""

from ..errors import InputError
from .batches import Batches, ImageData, Split
from .datasets import CACHES, DATASETS, as_image_data, create_synthetic_dataset, load_data
from .streaming import FolderData

__all__ = [
    "CACHES",
    "DATASETS",
    "Batches",
    "FolderData",
    "ImageData",
    "InputError",
    "Split",
    "as_image_data",
    "create_synthetic_dataset",
    "load_data",
]
