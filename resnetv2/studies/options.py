"""The options of a study, their checks, and the data set that they name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.utils.data import TensorDataset

from ..data.batches import ImageData, Split
from ..data.datasets import as_image_data, load_data
from ..errors import InputError
from ..names import DTYPES
from ..training.environment import select_device
from ..training.fields import Between, Choice, Option, documented, fields_of
from ..training.schedule import learning_rate

SCHEDULES = ("constant", "paper", "step")
NOISE = 800


Count = Annotated[int, Between(1)]


@documented
@dataclass(frozen=True)
class StudyOptions:
    """The options of a study. Each study names the fields that it uses and its own defaults.

    Args:
        {options}
        progress: show progress bars; None means only on a terminal.

    ``data`` may also be an ``ImageData``, and ``depth`` several numbers where a study compares
    depths.

    Raises:
        InputError: one line that names the option, what it may be, and what came.
    """

    data: Annotated[
        str | ImageData,
        Option(
            "digits (no download), cifar10, imagefolder:PATH, ..., or noise: 800 images of white "
            "noise with random labels, which a net can only learn by heart.",
            metavar="NAME",
        ),
    ] = "digits"
    root: Annotated[str | Path, Option("Where CIFAR lies or is downloaded to.")] = "data"
    image_size: Annotated[
        Count | None, Option("Resize and crop all images to this many pixels.")
    ] = None
    depth: Annotated[
        int | Sequence[int],
        Between(1, 100_000),
        Option("Layers; several where a study compares depths."),
    ] = 20
    width: Annotated[
        int,
        Between(1, 8192, open_high=False),
        Option("Channels of the blocks, or of the first stage's."),
    ] = 64
    stages: Annotated[
        int,
        Between(1, 8, open_high=False),
        Option(
            "Stages of doubling width. 3: the paper's CIFAR net; 1: a stack of equal blocks of two "
            "layers each."
        ),
    ] = 3
    epochs: Annotated[Count, Option("Passes over the training images.")] = 5
    batch_size: Annotated[Count, Option("Images a step.")] = 128
    lr: Annotated[float, Between(0, open_low=True), Option("Learning rate.")] = 0.1
    momentum: Annotated[float, Between(0, 1), Option("Of SGD.")] = 0.9
    weight_decay: Annotated[float, Between(0), Option("Of SGD.")] = 1e-4
    schedule: Annotated[
        str,
        Choice(SCHEDULES),
        Option(
            "step: a tenth every so many epochs; paper: warm-up at lr/10, then a tenth at 1/2 and "
            "at 3/4 of the run."
        ),
    ] = "paper"
    step_epochs: Annotated[Count, Option("Epochs to a tenth of the rate, with step.")] = 10
    warmup_steps: Annotated[
        Annotated[int, Between(0)] | None,
        Option("Steps at lr/10, with paper.", default="the paper's proportion"),
    ] = None
    augment: Annotated[
        bool, Option("Crop and flip training images, as the data set says.", off="no-augment")
    ] = True
    seeds: Annotated[Count, Option("Runs of each variant, with seeds 0, 1, ...")] = 3
    train_images: Annotated[
        Count | None, Option("At most so many images to train on, evenly from the classes.")
    ] = None
    test_images: Annotated[Count | None, Option("At most so many images to test on.")] = None
    target: Annotated[
        float,
        Between(0, 1, open_high=False),
        Option("Test accuracy whose first epoch is reported."),
    ] = 0.9
    samples: Annotated[Count, Option("Random inputs, of studies that draw them.")] = 100
    dtype: Annotated[str, Choice(DTYPES), Option("bf16 and fp16 train under autocast.")] = "fp32"
    device: Annotated[str, Option("cpu, cuda, cuda:1, ...", default="a GPU where there is one")] = (
        "auto"
    )
    progress: bool | None = None

    def __post_init__(self) -> None:
        for field in fields_of(StudyOptions).values():
            if field.name == "depth":
                if not self.depths:
                    raise InputError("depth must be a whole number, or several, got none")
                for depth in self.depths:
                    field.checked(depth)
            elif not isinstance(self.data, ImageData) or field.name != "data":
                object.__setattr__(self, field.name, field.checked(getattr(self, field.name)))

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
