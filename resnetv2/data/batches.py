"""Batches of a data set: in a random order, augmented, normalised, on the device that trains.

Images that fit are kept there as uint8, and shuffling, cropping, flipping and normalising are a
few vectorised operations a batch. Every random number is a function of (seed, epoch, step) and of
the place in the global batch: a run that is resumed in the middle of an epoch, or that is spread
over several processes, sees the images that one uninterrupted process would see, bit for bit.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from .host import check_memory
from .streaming import (
    CROPS,
    ORDER,
    Decoder,
    FolderData,
    Gatherer,
    load_batches,
    random_numbers,
)


@dataclass(frozen=True)
class Split:
    """Images (N, H, W, C), uint8 or floating, and their labels (N,), int64 from 0."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4:
            raise InputError(f"images must be (N, H, W, C), got shape {tuple(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise InputError(
                f"labels must be int64 of shape ({len(self.images)},), one for each image, got "
                f"{self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if len(self.images) == 0:
            raise InputError("a data set needs at least one image")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def nbytes(self) -> int:
        """Bytes of the images."""
        return self.images.nbytes

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A training and a test set with what is needed to make batches of them.

    `crop_padding` pixels are padded on each side before a crop of the original size is drawn at
    random, and `flip` mirrors half of the images: the paper's augmentation is 4 and True
    (section 4, "Implementation details"). Both apply to training batches only. `white` is the value
    that 255 of an image file has here, None where images do not come from files. `cache_reason`
    says why the images are in memory.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    crop_padding: int = 4
    flip: bool = True
    white: int | None = 255
    cache_reason: str = "tensors"

    cache: ClassVar[str] = "memory"

    def __post_init__(self) -> None:
        if self.train.images.shape[1:] != self.test.images.shape[1:]:
            raise InputError(
                f"{self.name}: training images are {_size(self.train)}, test images "
                f"{_size(self.test)}; --image-size N makes them equal"
            )
        for split in (self.train, self.test):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise InputError(
                    f"{self.name}: labels must be in 0..{len(self.classes) - 1}, got {low}..{high}"
                )

    @property
    def channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[1], self.train.images.shape[2]

    def to(self, device: torch.device) -> "ImageData":
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,) of the training images, float32, computed in float64."""
        images = self.train.images
        total = torch.zeros(self.channels, dtype=torch.float64)
        square = torch.zeros_like(total)
        for chunk in images.split(4096):  # the whole in float64 would be eight times its size
            values = chunk.reshape(-1, self.channels).double()
            total += values.sum(0)
            square += values.square().sum(0)
        count = images.numel() // self.channels
        mean = total / count
        # 0..255 in float64: E[x^2] - E[x]^2 loses nothing here. A constant channel keeps std 1.
        std = (square / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(std > 0, std, torch.ones_like(std)).float()


class Batches:
    """Normalised batches (B, C, H, W), float32, channels_last, with labels (B,), int64.

    Args:
        data: the data set, on the CPU.
        batch_size: images a batch over all processes; each has its equal share of it.
        seed: not negative; decides the order, the crops and the flips, with epoch and step.
        device: where the batches are made, and the data set is kept if it is an `ImageData` that
            takes at most half of a GPU's free memory. One that takes more stays on the host, and
            batches are copied from pinned memory while the step before still runs.
        rank, world_size: this process and how many there are.
        workers: processes that decode a `FolderData`, or pick images that stay on the host; with 0
            this process does. Resident images need none.
        crop_padding, flip: instead of the data set's own. A `FolderData` is cropped as
            RandomResizedCrop does, whatever the padding, but for 0, which means no random crop.
        drop_last: leave out an epoch's last, smaller batch, unless it is the only one: its
            statistics would be noisier than all others'. If it is kept and the processes do not
            divide it, their shares differ by one image.

    Raises:
        InputError: sizes that are not positive, a batch that the processes do not divide, a last
            batch with fewer images than processes, images of a batch that memory cannot hold.
    """

    def __init__(
        self,
        data: ImageData | FolderData,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        *,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        crop_padding: int | None = None,
        flip: bool | None = None,
        drop_last: bool = True,
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        for name, value in (("seed", seed), ("workers", workers), ("crop_padding", crop_padding)):
            if value is not None and value < 0:
                raise InputError(f"{name} must not be negative, got {value}")
        if not 0 <= rank < world_size:
            raise InputError(f"the rank must be in 0..{world_size - 1}, got {rank}")
        if batch_size % world_size:
            raise InputError(
                f"a batch of {batch_size} images cannot be divided by {world_size} processes: "
                f"take a multiple of {world_size}"
            )
        self.batch_size = batch_size
        self.seed = seed
        self.device = torch.device(device)
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self._count = len(data.train)
        whole, rest = divmod(self._count, batch_size)
        self.steps = max(1, whole if drop_last or not rest else whole + 1)
        smallest = min(self.size(0), self.size(self.steps - 1))
        if smallest < world_size:
            raise InputError(
                f"the last batch of {self._count} training images has {smallest}, fewer than "
                f"the {world_size} processes: take another batch size, or leave it out"
            )
        self.flip = data.flip if flip is None else flip
        self.crop_padding = crop_padding
        self.resident = False
        if isinstance(data, FolderData):
            share = batch_size // world_size
            check_memory(
                # The workers' two batches each as bytes, this process' one as float32.
                share * data.size**2 * 3 * (2 * workers + 4),
                f"batches of {share} images of {data.size}x{data.size}",
                "a smaller --image-size or --batch-size needs less",
            )
        else:
            self.crop_padding = data.crop_padding if crop_padding is None else crop_padding
            most = min(data.image_size)
            if crop_padding is not None and crop_padding > most:
                raise InputError(
                    f"crop_padding must be at most the images' {most} pixels, got {crop_padding}"
                )
            self.resident = _fits(data, self.device)
        self.mean, self.std = (value.to(self.device) for value in data.statistics())
        if isinstance(data, ImageData) and self.resident:
            data = data.to(self.device)
        self.data = data

    @property
    def augmentation(self) -> str:
        """The augmentation of training images, in words."""
        if isinstance(self.data, ImageData):
            crop = f"crops of images padded by {self.crop_padding}" if self.crop_padding else ""
        else:
            crop = "" if self.crop_padding == 0 else "resized crops of 8 to 100 % of the area"
        return ", ".join(filter(None, (crop, "flips" if self.flip else ""))) or "none"

    def size(self, step: int) -> int:
        """Images in the global batch of `step`, from 0."""
        return min(self.batch_size, self._count - step * self.batch_size)

    def training(
        self, epoch: int = 1, start: int = 0
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """This process' shares of the batches of `epoch` from step `start` on, augmented.

        Batches before `start` are not made. Raises InputError for a file that cannot be read.
        """
        if epoch < 0 or not 0 <= start <= self.steps:
            raise InputError(
                f"an epoch from 0 and a step in 0..{self.steps} are needed, got {epoch} and {start}"
            )
        order = random_numbers(self.seed, ORDER, epoch).permutation(self._count)
        steps = range(start, self.steps)
        shares = [order[i * self.batch_size :][self._share(self.size(i))] for i in steps]
        return self._training(epoch, zip(steps, self._load(shares, epoch), strict=True))

    def _training(
        self, epoch: int, batches: Iterator[tuple[int, tuple[Tensor, Tensor]]]
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        for step, (images, labels) in batches:
            images = self._normalise(images)
            if isinstance(self.data, ImageData):
                images = self._augment(images, epoch, step)
            yield images.permute(0, 3, 1, 2), labels

    def testing(
        self, batch_size: int = 500, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """This process' share of the test set, in order and as it is. It may have none.

        limit: at most so many batches, of images at equal distances: folders are sorted by class.
        """
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        mine = np.arange(len(self.data.test))[self._share(len(self.data.test))]
        if limit is not None and limit * batch_size < len(mine):
            count = limit * batch_size
            mine = mine[np.arange(count) * len(mine) // count]
        shares = [mine[first : first + batch_size] for first in range(0, len(mine), batch_size)]
        for images, labels in self._load(shares, None):
            yield self._normalise(images).permute(0, 3, 1, 2), labels

    def _share(self, count: int) -> slice:
        """This rank's part of `count` images."""
        return slice(
            count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size
        )

    def _load(
        self, shares: list[np.ndarray[Any, Any]], epoch: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (B, H, W, C) as they are stored and labels, on the device, of training images in
        `epoch` or of test images if that is None."""
        if isinstance(self.data, ImageData):
            split = self.data.test if epoch is None else self.data.train
            if self.resident:
                for share in shares:
                    index = self._to_device(torch.from_numpy(share))
                    yield split.images[index], split.labels[index]
                return
            dataset: Dataset[Any] = Gatherer(split.images, split.labels)
        else:
            files = self.data.test if epoch is None else self.data.train
            draw = None if epoch is None else (self.seed, epoch)
            dataset = Decoder(files, self.data.size, draw, self.crop_padding != 0, self.flip)
        pin_memory = self.device.type == "cuda"
        for images, labels in load_batches(dataset, shares, self.workers, pin_memory):
            yield self._to_device(images), self._to_device(labels)

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda" and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def _augment(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """Crop and flip `images` (B, H, W, C) each by itself. Padding is 0, the mean pixel."""
        batch, height, width, _ = images.shape
        padding = self.crop_padding or 0
        if not padding and not self.flip:
            return images
        # For the global batch, and whether used or not: neither the number of processes nor the
        # options move what is drawn for an image.
        numbers, count = random_numbers(self.seed, CROPS, epoch, step), self.size(step)
        drawn = (
            numbers.integers(2 * padding + 1, size=(count, 1)),
            numbers.integers(2 * padding + 1, size=(count, 1)),
            numbers.random((count, 1)) < 0.5,
        )
        top, left, mirrored = (torch.from_numpy(each[self._share(count)]) for each in drawn)
        rows = top + torch.arange(height)
        columns = left + torch.arange(width)
        if self.flip:
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        return padded[
            torch.arange(batch, device=self.device)[:, None, None],
            self._to_device(rows)[:, :, None],
            self._to_device(columns)[:, None, :],
        ]


def _fits(data: ImageData, device: torch.device) -> bool:
    """Whether the images may stay on the device: a GPU's memory is for the training first."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return data.train.nbytes + data.test.nbytes <= free // 2


def _size(split: Split) -> str:
    height, width, channels = split.images.shape[1:]
    return f"{width}x{height} with {channels} channels"
