"""The options of a study, their checks, and the data set that they name."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

from ..data.batches import ImageData, Split
from ..data.datasets import as_image_data, load_data
from ..errors import InputError
from ..names import DTYPES
from ..training.environment import select_device
from ..training.schedule import learning_rate

SCHEDULES = ("constant", "paper", "step")
NOISE = 800


@dataclass(frozen=True)
class StudyOptions:
    """The options of a study. Each study names the fields that it uses and its own defaults.

    Args:
        data: a name of `resnetv2.data.load_data`, "noise" (800 images of white noise with random
            labels, which a net can only learn by heart), or an `ImageData`.
        root, image_size: see `load_data`.
        depth: layers of the nets, or several numbers where a study compares depths.
        width: channels of the blocks, or of the first stage's.
        stages: 3 is the paper's CIFAR net, whose width doubles twice; 1 is a stack of equal blocks,
            two layers each ("25 blocks of 64" is depth 50 in one stage).
        epochs, batch_size, lr, momentum, weight_decay: of SGD.
        schedule: "constant"; "step": a tenth every `step_epochs` epochs; "paper": warm-up at lr/10,
            then a tenth at a half and at three quarters of the run.
        warmup_steps: of "paper"; None keeps the paper's proportion.
        augment: whether training images are cropped and flipped, as the data set says.
        seeds: runs a variant, with seeds 0, 1, ...
        train_images, test_images: at most so many, drawn evenly from the classes; None for all.
        target: test accuracy, 0..1, whose first epoch is reported.
        samples: random inputs, of studies that draw them.
        dtype: "fp32", or "bf16" or "fp16" under autocast.
        device: "auto" is a GPU where there is one.
        progress: show progress bars; None means only on a terminal.
    """

    data: str | ImageData = "digits"
    root: str | Path = "data"
    image_size: int | None = None
    depth: int | Sequence[int] = 20
    width: int = 64
    stages: int = 3
    epochs: int = 5
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: str = "paper"
    step_epochs: int = 10
    warmup_steps: int | None = None
    augment: bool = True
    seeds: int = 3
    train_images: int | None = None
    test_images: int | None = None
    target: float = 0.9
    samples: int = 100
    dtype: str = "fp32"
    device: str = "auto"
    progress: bool | None = None

    def __post_init__(self) -> None:
        for name in (
            "width",
            "epochs",
            "batch_size",
            "step_epochs",
            "seeds",
            "train_images",
            "test_images",
            "samples",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if not self.depths or any(depth < 1 for depth in self.depths):
            raise InputError(f"depth must be at least 1, got {listed(self.depths)}")
        if max(self.depths) >= 100_000:
            raise InputError(f"depth must be below 100000, got {listed(self.depths)}")
        if not 0 < self.lr < math.inf:
            raise InputError(f"the learning rate must be positive, got {self.lr}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be in 0..1 and below 1, got {self.momentum}")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"weight_decay must be a number from 0 on, got {self.weight_decay}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise InputError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        for name, most in (("stages", 8), ("width", 8192)):
            if not 1 <= getattr(self, name) <= most:
                raise InputError(f"{name} must be in 1..{most}, got {getattr(self, name)}")
        if not 0 <= self.target <= 1:
            raise InputError(f"target is an accuracy in 0..1, got {self.target}")
        if self.schedule not in SCHEDULES:
            raise InputError(
                f"unknown schedule {self.schedule!r}: choose from {', '.join(SCHEDULES)}"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}: choose from {', '.join(DTYPES)}")

    @property
    def depths(self) -> tuple[int, ...]:
        """All depths asked for."""
        return (self.depth,) if isinstance(self.depth, int) else tuple(self.depth)

    @property
    def one_depth(self) -> int:
        """The depth, where a study takes one."""
        if len(self.depths) != 1:
            raise InputError(f"this study takes one depth, got {listed(self.depths)}")
        return self.depths[0]

    @property
    def place(self) -> torch.device:
        """The device. Raises InputError where there is none of that name."""
        return select_device(self.device)

    def load(self) -> ImageData:
        """The data set, within the limits and with the augmentation asked for."""
        if isinstance(self.data, ImageData):
            data = self.data
        elif self.data == "noise":
            data = _noise(self.image_size or 32)
        else:
            data = load_data(
                self.data,
                root=self.root,
                image_size=self.image_size,
                cache="memory",
                progress=self.progress,
            )
        if not self.augment:
            data = replace(data, crop_padding=0, flip=False)
        return replace(
            data,
            train=_first_of_each_class(data.train, self.train_images),
            test=_first_of_each_class(data.test, self.test_images),
        )

    def rate(self, step: int, steps_an_epoch: int) -> float:
        """Learning rate at `step`, from 0, of the whole run."""
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "step":
            return self.lr * 0.1 ** (step // steps_an_epoch // self.step_epochs)
        return learning_rate(step, self.epochs * steps_an_epoch, self.lr, self.warmup_steps)


def listed(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _noise(size: int) -> ImageData:
    """White noise with random labels. The test set is the training set: other images of noise
    would share no pattern with it."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(NOISE, 3, size, size, generator=generator)
    labels = torch.randint(10, (NOISE,), generator=generator)
    dataset = TensorDataset(images, labels)
    return as_image_data((dataset, dataset), "noise")


def _first_of_each_class(split: Split, limit: int | None) -> Split:
    """At most `limit` images, the first of each class in turn, in their own order."""
    if limit is None or limit >= len(split):
        return split
    rank = torch.zeros_like(split.labels)
    for label in split.labels.unique():
        mine = split.labels == label
        rank[mine] = torch.arange(int(mine.sum()))
    chosen = torch.argsort(rank, stable=True)[:limit].sort().values
    return Split(split.images[chosen], split.labels[chosen])
