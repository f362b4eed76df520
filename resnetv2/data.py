"""Image data sets that live in memory as tensors.

A data set is decoded once into a uint8 tensor; shuffling, cropping, flipping and normalising are
a few vectorised operations a batch, on the device that trains. That is faster than worker
processes for images of CIFAR's size, and every random number comes from one seeded generator on
the CPU, so that two runs from one seed see bitwise the same batches.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from tqdm import tqdm

from resnetv2._torchvision import import_torchvision

DATASETS = "digits, cifar10, cifar100, imagefolder:PATH, synthetic"


class InputError(ValueError):
    """What the user asked for cannot be had: a wrong name, path or value, in one line."""


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

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A training and a test set with what is needed to make batches of them.

    `crop_padding` pixels are padded on each side before a crop of the original size is drawn at
    random, and `flip` mirrors half of the images: the paper's augmentation is 4 and True
    (section 4, "Implementation details"). Both apply to training batches only.
    """

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]
    crop_padding: int = 4
    flip: bool = True

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
    """Normalised batches (B, C, H, W), float32, channels_last, with labels (B,).

    Args:
        data: the data set, on the CPU.
        batch_size: images a batch.
        generator: a CPU generator; it draws the order, the crops and the flips.
        device: where the data set is kept and the batches are made.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.generator = generator
        self.mean, self.std = (value.to(device) for value in data.statistics())
        self.data = data.to(torch.device(device))

    @property
    def steps(self) -> int:
        """Training batches an epoch. The last, smaller one is left out unless it is the only one:
        its statistics would be noisier than all others'."""
        return max(1, len(self.data.train) // self.batch_size)

    def training(self) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in a new random order, augmented."""
        split = self.data.train
        order = torch.randperm(len(split), generator=self.generator)
        for step in range(self.steps):
            index = order[step * self.batch_size : (step + 1) * self.batch_size]
            index = index.to(split.images.device, non_blocking=True)
            images = self._normalise(split.images[index])
            yield self._augment(images).permute(0, 3, 1, 2), split.labels[index]

    def testing(self, batch_size: int = 500) -> Iterator[tuple[Tensor, Tensor]]:
        """The test set in order, as it is."""
        split = self.data.test
        for images, labels in zip(
            split.images.split(batch_size), split.labels.split(batch_size), strict=True
        ):
            yield self._normalise(images).permute(0, 3, 1, 2), labels

    def _normalise(self, images: Tensor) -> Tensor:
        return (images.float() - self.mean) / self.std

    def _augment(self, images: Tensor) -> Tensor:
        """Crop and flip `images` (B, H, W, C) each by itself. Padding is 0, the mean pixel."""
        batch, height, width, _ = images.shape
        padding = self.data.crop_padding
        # Drawn whether used or not: the order of later epochs does not depend on the options.
        top = torch.randint(0, 2 * padding + 1, (batch, 1), generator=self.generator)
        left = torch.randint(0, 2 * padding + 1, (batch, 1), generator=self.generator)
        mirrored = torch.rand(batch, 1, generator=self.generator) < 0.5
        if not padding and not self.data.flip:
            return images
        rows = top + torch.arange(height)
        columns = left + torch.arange(width)
        if self.data.flip:
            columns = torch.where(mirrored, columns.flip(1), columns)
        padded = F.pad(images, (0, 0, padding, padding, padding, padding))
        device = images.device
        return padded[
            torch.arange(batch, device=device)[:, None, None],
            rows.to(device)[:, :, None],
            columns.to(device)[:, None, :],
        ]


def create_synthetic_dataset(
    num_samples: int = 800,
    num_classes: int = 10,
    image_size: int = 32,
    channels: int = 3,
    *,
    noise: float = 1.0,
    seed: int = 0,
) -> TensorDataset:
    """Images that can be learned without any data: one smooth pattern a class, plus white noise.

    Args:
        num_samples: number of images; the classes are as equally frequent as it allows.
        num_classes: number of classes.
        image_size: height and width in pixels.
        channels: channels an image.
        noise: standard deviation of the noise; the patterns' is 1.
        seed: the same seed gives bitwise the same data set.

    Returns:
        TensorDataset of images (num_samples, channels, image_size, image_size), float32, and labels
        (num_samples,), int64, in random order.

    Raises:
        InputError: a size is not positive, or the noise is negative.
    """
    sizes = {
        "num_samples": num_samples,
        "num_classes": num_classes,
        "image_size": image_size,
        "channels": channels,
    }
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if noise < 0:
        raise InputError(f"noise must not be negative, got {noise}")
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(num_classes, channels, 4, 4, generator=generator)
    patterns = F.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)
    deviation = patterns.std(dim=(1, 2, 3), keepdim=True, correction=0)
    patterns = patterns / deviation.clamp_min(1e-6)
    labels = torch.arange(num_samples) % num_classes
    labels = labels[torch.randperm(num_samples, generator=generator)]
    shape = (num_samples, channels, image_size, image_size)
    images = patterns[labels] + noise * torch.randn(shape, generator=generator)
    return TensorDataset(images, labels)


def load_data(
    name: str,
    *,
    root: str | Path = "data",
    image_size: int | None = None,
    progress: bool | None = None,
    seed: int = 0,
) -> ImageData:
    """Load a data set by name.

    Args:
        name: `digits` (scikit-learn's 1,797 handwritten digits, 8x8, no download), `cifar10` or
            `cifar100` (found under `root` or downloaded there), `imagefolder:PATH` (PATH/train and
            PATH/test with a folder of images for each class), or `synthetic`.
        root: where torchvision's CIFAR lies or goes.
        image_size: resize the shorter side to this many pixels and crop the centre square.
        progress: show a bar while images are decoded; None means only on a terminal.
        seed: of the synthetic images.

    Raises:
        InputError: an unknown name, a missing path, an empty folder, images of different sizes, ...
        ImportError: a package that the data set needs is missing.
    """
    kind, _, path = name.partition(":")
    if image_size is not None and image_size < 1:
        raise InputError(f"the image size must be at least 1, got {image_size}")
    if kind == "imagefolder":
        if not path:
            raise InputError(
                "imagefolder needs a path with a train and a test folder: imagefolder:PATH"
            )
        return _load_image_folder(Path(path).expanduser(), image_size, progress)
    loaders: dict[str, Callable[[], ImageData]] = {
        "digits": _load_digits,
        "cifar10": lambda: _load_cifar("CIFAR10", Path(root).expanduser()),
        "cifar100": lambda: _load_cifar("CIFAR100", Path(root).expanduser()),
        "synthetic": lambda: as_image_data(
            create_synthetic_dataset(3000, image_size=image_size or 32, seed=seed), "synthetic"
        ),
    }
    if name not in loaders:
        raise InputError(f"unknown data set {name!r}: choose from {DATASETS}")
    data = loaders[name]()
    if image_size is not None:
        data = replace(
            data, train=_resize(data.train, image_size), test=_resize(data.test, image_size)
        )
    return data


def as_image_data(
    data: TensorDataset | tuple[TensorDataset, TensorDataset] | ImageData, name: str = "tensors"
) -> ImageData:
    """Wrap tensors (images (N, C, H, W), labels (N,)) as `ImageData`, without augmentation.

    Of a single data set the last fifth is held out as the test set.
    """
    if isinstance(data, ImageData):
        return data
    if isinstance(data, TensorDataset):
        if len(data) < 2:
            raise InputError("a single data set is split in two and needs at least two images")
        cut = min(len(data) - 1, max(1, len(data) * 4 // 5))
        train, test = (
            TensorDataset(*(tensor[part] for tensor in data.tensors))
            for part in (slice(cut), slice(cut, None))
        )
    else:
        train, test = data
    training, testing = _tensor_split(train), _tensor_split(test)
    count = 1 + max(int(split.labels.max()) for split in (training, testing))
    classes = tuple(str(label) for label in range(count))
    return ImageData(name, training, testing, classes, crop_padding=0, flip=False)


def _tensor_split(dataset: TensorDataset) -> Split:
    if not isinstance(dataset, TensorDataset) or len(dataset.tensors) != 2:
        raise InputError("tensors come as TensorDataset(images (N, C, H, W), labels (N,))")
    images, labels = dataset.tensors
    if images.dim() != 4:
        raise InputError(f"images must be (N, C, H, W), got shape {tuple(images.shape)}")
    return Split(images.permute(0, 2, 3, 1).contiguous(), labels)


def _load_digits() -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "the data set 'digits' needs scikit-learn: python -m pip install scikit-learn"
        ) from error
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=0
    )
    images = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(3)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # A mirrored digit is another digit, or none; one pixel of shift is an eighth of the image.
    return ImageData(
        "digits",
        train=Split(images[train], labels[train]),
        test=Split(images[test], labels[test]),
        classes=tuple(map(str, digits.target_names)),
        crop_padding=1,
        flip=False,
    )


def _load_cifar(class_name: str, root: Path) -> ImageData:
    import_torchvision()
    from torchvision import datasets

    try:
        train, test = (
            getattr(datasets, class_name)(root, train=training, download=True)
            for training in (True, False)
        )
    # urllib's URLError is an OSError; torchvision raises RuntimeError for a damaged file.
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{class_name} is not under {root} and could not be downloaded ({error}). "
            "Without a network use digits, imagefolder:PATH or synthetic"
        ) from error

    def split(part: Any) -> Split:
        return Split(torch.from_numpy(part.data), torch.tensor(part.targets, dtype=torch.int64))

    return ImageData(class_name.lower(), split(train), split(test), tuple(train.classes))


def _load_image_folder(path: Path, image_size: int | None, progress: bool | None) -> ImageData:
    import_torchvision()
    from torchvision.datasets import ImageFolder

    folders = {}
    for part in ("train", "test"):
        if not (path / part).is_dir():
            raise InputError(
                f"{path / part} is not a folder: imagefolder:PATH needs PATH/train and PATH/test, "
                "each with a folder of images for every class"
            )
        try:
            folders[part] = ImageFolder(path / part)
        # An empty folder, or a class without an image; torchvision's message names the class.
        except FileNotFoundError as error:
            raise InputError(" ".join(str(error).split())) from error
    train, test = folders["train"], folders["test"]
    if train.classes != test.classes:
        differing = sorted(set(train.classes) ^ set(test.classes))
        raise InputError(
            f"{path}: train and test have different classes; only one of them has {differing}"
        )
    return ImageData(
        path.name,
        train=_decode(train.samples, image_size, "decoding train", progress),
        test=_decode(test.samples, image_size, "decoding test", progress),
        classes=tuple(train.classes),
    )


def _decode(
    samples: Sequence[tuple[str, int]], image_size: int | None, title: str, progress: bool | None
) -> Split:
    """Decode image files into one uint8 tensor (N, H, W, 3)."""
    first = _read_image(samples[0][0], image_size)
    _check_memory(len(samples) * first.nbytes, f"{len(samples):,} images of {_pixels(first)}")
    images = np.empty((len(samples), *first.shape), dtype=np.uint8)
    bar = tqdm(samples, desc=title, unit="image", leave=False, disable=_disabled(progress))
    for index, (path, _) in enumerate(bar):
        image = _read_image(path, image_size)
        if image.shape != first.shape:
            raise InputError(
                f"images differ in size: {samples[0][0]} is {_pixels(first)}, {path} is "
                f"{_pixels(image)}; --image-size N resizes and crops all to NxN"
            )
        images[index] = image
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return Split(torch.from_numpy(images), labels)


def _read_image(path: str, image_size: int | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"cannot read the image {path}: {error}") from error
    if image_size is not None and image.size != (image_size, image_size):
        from torchvision.transforms import functional

        image = functional.center_crop(functional.resize(image, image_size), [image_size])
    return np.asarray(image)


def _resize(split: Split, image_size: int) -> Split:
    height, width = split.images.shape[1:3]
    if (height, width) == (image_size, image_size):
        return split
    scale = image_size / min(height, width)
    size = [max(image_size, round(side * scale)) for side in (height, width)]
    images = F.interpolate(
        split.images.permute(0, 3, 1, 2).float(), size=size, mode="bilinear", antialias=True
    )
    top, left = ((side - image_size) // 2 for side in size)
    images = images[:, :, top : top + image_size, left : left + image_size]
    if not split.images.is_floating_point():
        images = images.round()
    return Split(images.permute(0, 2, 3, 1).contiguous().to(split.images.dtype), split.labels)


def _check_memory(needed: int, what: str) -> None:
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return  # not a POSIX system: the allocation itself will tell
    if needed > 0.8 * physical:
        raise InputError(
            f"{what} take {needed / 2**30:.0f} GiB, more than this machine's memory allows; "
            "--image-size makes them smaller"
        )


def _disabled(progress: bool | None) -> bool | None:
    """tqdm's `disable`, whose None means: not on a terminal."""
    return None if progress is None else not progress


def _pixels(image: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def _size(split: Split) -> str:
    height, width, channels = split.images.shape[1:]
    return f"{width}x{height} with {channels} channels"
